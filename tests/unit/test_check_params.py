from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.check_params import main
from stages.common.config import read_params
from stages.common.errors import SettingError


def write_params(folder: Path, section: str, key: str, value: Any) -> None:
    params = read_params()
    params[section][key] = value
    YAML().dump(params, folder / "params.yaml")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("rl", "num_eval_prompts", 81, "rl.num_eval_prompts=81 exceeds data.num_validation_prompts=80"),
        (
            *("rl", "algorithm", {"name": "remax", "greedy_max_tokens": 48}),
            "rl.algorithm.greedy_max_tokens=48 cuts nothing: allowed: below generation.max_new_tokens=48, or null",
        ),
        ("generation", "max_new_tokens", 49, "reward.max_tokens=136 is below generation.max_prompt_tokens"),
        (
            *("data", "task", {"name": "pairs", "source": "a.jsonl", "format": "transcripts"}),
            "data.task.format='transcripts' with model.chat_template='plain': nothing would say whose turn is whose",
        ),
        ("generation", "max_num_seqs", 3, "pairs.samples_per_prompt=6 exceeds generation.max_num_seqs=3, and vLLM"),
        ("judge", "samples_per_prompt", 129, "judge.samples_per_prompt=129 exceeds generation.max_num_seqs=128"),
        (
            *("rl", "algorithm", {"name": "rloo", "samples_per_prompt": 129}),
            "rl.algorithm.samples_per_prompt=129 exceeds generation.max_num_seqs=128",
        ),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, key: str, value: int, message: str
) -> None:
    params = read_params()
    params[section][key] = value
    params["model"]["chat_template"] = "plain"
    YAML().dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SettingError) as caught:
        main()

    assert str(caught.value).startswith(message)


def test_what_only_servers_can_do_is_refused_for_the_engine_in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = read_params()
    params["generation"]["engine"] = "transformers"
    params["rl"]["weight_update"] = "in_flight"
    YAML().dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SettingError, match=r"^rl.weight_update='in_flight' needs generation.engine='vllm'"):
        main()


def test_a_task_with_a_rule_needs_no_room_for_a_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = read_params()
    params["data"]["task"] = {"name": "problems", "source": "inputs/data/a.jsonl"}
    params["generation"]["max_new_tokens"] = 400
    YAML().dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)

    main()


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({"missing_eos_score": 0.5}, r"^rl.missing_eos_score=0.5 is above 0.000"),
        ({"algorithm": {"name": "dpo"}}, r"reward.max_tokens=136 .* = 488: rl.algorithm.name='dpo' would train on the"),
    ],
)
def test_with_a_rule_scores_and_lengths_are_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rl: dict[str, Any], message: str
) -> None:
    params = read_params()
    params["data"]["task"] = {"name": "problems", "source": "inputs/data/a.jsonl"}
    params["generation"]["max_new_tokens"] = 400
    params["rl"] |= rl
    YAML().dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SettingError, match=message):
        main()


def test_wrong_settings_of_all_sections_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = read_params()
    params["sft"]["num_epochs"] = 0
    params["judge"]["dtype"] = "fp16"
    YAML().dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SettingError) as caught:
        main()

    lines = str(caught.value).splitlines()
    assert [line.split("=")[0] for line in lines] == ["sft.num_epochs", "judge.dtype"]
