import json
from pathlib import Path

import pytest

from stages import prepare_data
from stages.common.errors import InputError, SettingError
from stages.data.store import read_demonstrations, read_pairs, read_prompts

REVIEWS = (
    "data: {seed: 0, num_validation_prompts: 20, num_heldout_prompts: 30, task: {name: reviews, num_prompts: %d}}\n"
)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "none").as_uri())


def snapshot() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("artifacts/data").iterdir()}


def test_the_stage_writes_every_split_and_its_counts() -> None:
    Path("params.yaml").write_text(REVIEWS % 96)

    prepare_data.main()

    data = Path("artifacts/data")
    assert [len(read_prompts(data, split)) for split in ("train", "validation", "heldout")] == [46, 20, 30]
    assert read_demonstrations(data, "train")
    assert read_pairs(data, "train") is None
    assert json.loads(Path("metrics/data.json").read_text())["data/prompts/train"] == 46


def test_the_same_settings_give_the_same_bytes() -> None:
    Path("params.yaml").write_text(REVIEWS % 96)
    prepare_data.main()
    first = snapshot()

    prepare_data.main()

    assert snapshot() == first


@pytest.mark.parametrize(
    ("params", "error"),
    [
        (REVIEWS % 40, SettingError),
        (REVIEWS.replace("{name: reviews, num_prompts: %d}", "{name: pairs, source: none.csv}"), InputError),
    ],
)
def test_a_failure_leaves_the_earlier_artifact_alone(params: str, error: type[ValueError]) -> None:
    Path("params.yaml").write_text(REVIEWS % 96)
    prepare_data.main()
    first = snapshot()
    Path("params.yaml").write_text(params)

    with pytest.raises(error):
        prepare_data.main()

    assert snapshot() == first
    assert [path.name for path in Path("artifacts").iterdir()] == ["data"]
