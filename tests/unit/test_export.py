import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stages.common.errors import InputError
from stages.export import export_policy
from stages.release.model_card import MARK
from tests.tiny import CHAT_TEMPLATE, save_tiny_model, tiny_llama

PARAMS = """
model: {source: {kind: hub, repo: someone/base}}
generation: {max_new_tokens: 40, max_prompt_tokens: 88, temperature: 0.7}
"""
LOCK = """
schema: '2.0'
stages:
  prepare_data: {cmd: x, outs: [{path: artifacts/data, md5: 0123abc.dir}]}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    Path("dvc.lock").write_text(LOCK)
    Path("metrics").mkdir()
    metrics = {"gold_win_rate": 0.75, "gold_win_rate_interval": [0.6, 0.9], "second_win_rate": None}
    Path("metrics/judge.json").write_text(json.dumps(metrics))
    save_tiny_model(Path("artifacts/policy"))
    return tmp_path


@pytest.mark.usefixtures("project")
def test_export_loads_as_a_plain_model_with_its_sampling_settings() -> None:
    export_policy(Path("exported/policy"))

    model = AutoModelForCausalLM.from_pretrained("exported/policy")
    tokenizer = AutoTokenizer.from_pretrained("exported/policy")
    ids = torch.tensor([[257, 5, 6]])
    torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert model.generation_config.temperature == 0.7
    assert not json.loads(Path("exported/policy/generation_config.json").read_text())["_from_model_config"]
    settings = GenerationConfig.from_pretrained("exported/policy")
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.7, 0, 1.0)
    assert settings.max_new_tokens == 40
    assert settings.eos_token_id == 258


@pytest.mark.usefixtures("project")
def test_a_policy_that_dvc_protects_becomes_files_that_can_be_written() -> None:
    for path in Path("artifacts/policy").iterdir():
        path.chmod(0o444)

    export_policy(Path("out"))

    assert all(path.stat().st_mode & 0o200 for path in Path("out").iterdir())


def test_card_names_base_model_data_settings_and_metrics(project: Path) -> None:
    export_policy(project / "anywhere")

    card = (project / "anywhere/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "base_model: someone/base" in card
    assert "| artifacts/data | `0123abc.dir` |" in card
    assert "| judge/gold_win_rate | 0.75 |" in card
    assert "| judge/gold_win_rate_interval | 0.6 … 0.9 |" in card
    assert "second_win_rate" not in card
    assert "temperature: 0.7" in card
    assert "Licence" in card


@pytest.mark.usefixtures("project")
def test_an_earlier_export_is_replaced_and_anything_else_is_left_alone() -> None:
    export_policy(Path("out"))
    Path("out/stale").touch()

    export_policy(Path("out"))

    assert not Path("out/stale").exists()
    assert MARK in Path("out/README.md").read_text()
    with pytest.raises(InputError, match=r"artifacts/policy: exists and is no earlier export"):
        export_policy(Path("artifacts/policy"))
    with pytest.raises(InputError, match="exists and is no earlier export"):
        export_policy(Path("."))


@pytest.mark.usefixtures("project")
def test_a_missing_policy_and_a_failed_export_leave_nothing() -> None:
    Path("artifacts/policy/tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not a readable tokenizer"):
        export_policy(Path("out"))
    Path("artifacts/policy").rename("elsewhere")

    with pytest.raises(InputError, match=r"^artifacts/policy: no such model; run `make run` first$"):
        export_policy(Path("out"))

    assert not Path("out").exists()


@pytest.mark.usefixtures("project")
def test_settings_that_the_policy_was_not_made_with_are_refused() -> None:
    Path("dvc.yaml").write_text("stages: {train_policy: {cmd: x, params: [generation], outs: [artifacts/policy]}}")
    made = "{max_new_tokens: 40, max_prompt_tokens: 88, temperature: 1.0}"
    Path("dvc.lock").write_text(
        f"{LOCK}  train_policy: {{cmd: x, params: {{params.yaml: {{generation: {made}}}}}, outs: []}}\n"
    )

    with pytest.raises(InputError, match=r"made with generation\.temperature=1\.0, params\.yaml has 0\.7; run"):
        export_policy(Path("out"))
    Path("params.yaml").write_text(PARAMS.replace("0.7", "1.0"))
    export_policy(Path("out"))


DVC_YAML = """
stages:
  train_policy: {cmd: x, outs: [artifacts/policy]}
  sample_policy: {cmd: x, deps: [artifacts/policy], outs: [artifacts/samples, metrics/samples.json]}
  judge_policy: {cmd: x, deps: [artifacts/samples], outs: [metrics/judge.json]}
"""
JUDGED_LOCK = """
schema: '2.0'
stages:
  train_policy: {{cmd: x, outs: [{{path: artifacts/policy, md5: {trained}.dir}}]}}
  sample_policy:
    cmd: x
    deps: [{{path: artifacts/policy, md5: aa.dir}}]
    outs: [{{path: artifacts/samples, md5: dd.dir}}, {{path: metrics/samples.json, md5: ee}}]
  judge_policy:
    cmd: x
    deps: [{{path: artifacts/samples, md5: dd.dir}}]
    outs: [{{path: metrics/judge.json, md5: ff}}]
"""


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(("trained", "is_shown"), [("aa", True), ("bb", False)])
def test_a_verdict_on_an_earlier_policy_is_not_on_the_card(trained: str, is_shown: bool) -> None:
    Path("metrics/samples.json").write_text('{"kl_nats": 2.5}')
    Path("metrics/sft.json").write_text('{"eval_loss": 1.5}')
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("dvc.lock").write_text(JUDGED_LOCK.format(trained=trained))

    export_policy(Path("out"))

    card = Path("out/README.md").read_text()
    shown = [name in card for name in ("judge/gold_win_rate", "samples/kl_nats", "artifacts/samples")]
    assert shown == [is_shown] * 3
    assert "| sft/eval_loss | 1.5 |" in card
    assert f"{trained}.dir" in card
