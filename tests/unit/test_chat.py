import io
from pathlib import Path

import pytest

from stages import chat
from stages.common.errors import InputError
from tests.tiny import save_tiny_model

PARAMS = """
generation: {max_new_tokens: 4, max_prompt_tokens: 90, dtype: fp32}
data: {seed: 0, task: {name: reviews}, num_validation_prompts: 1, num_heldout_prompts: 1}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    return tmp_path


@pytest.mark.usefixtures("project")
def test_without_a_policy_one_line_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"^artifacts/policy: no such model; run `make run` first$"):
        chat.main()


def test_piped_lines_are_answered_one_by_one_until_they_end(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(project / "artifacts/policy")
    monkeypatch.setattr("sys.stdin", io.StringIO("/temp 0\nThe film was\n/quit\nnever read\n"))

    chat.main()

    shown = capsys.readouterr().out
    assert shown.startswith("temperature: 0\n")
    assert len(shown) > len("temperature: 0\n\n")
