from pathlib import Path
from typing import Any

import pytest

from stages.data.prepare import PreparedData, SplitData
from stages.data.records import Message, Prompt
from stages.data.store import write_task_data
from stages.data.tasks.task import make_prompt
from stages.models.source import PLAIN_TEMPLATE
from stages.plan.architecture import Architecture
from stages.plan.batches import plan_run
from stages.plan.checks import Finding, check_settings, check_source
from stages.plan.settings import Places
from stages.plan.tokenizers import check_tokenizers
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.unit.plan.plans import make_settings

TINY = Architecture(tiny_llama().config, "tiny")
GOLD = {"name": "pairs", "source": "inputs/data/a.jsonl", "gold": {"name": "model", "path": "inputs/model/gold"}}
HUMAN = {"name": "pairs", "source": "inputs/data/a.jsonl"}


def find(tmp_path: Path, **changes: Any) -> list[Finding]:
    settings = make_settings(tmp_path, **changes)
    return check_settings(settings, TINY, plan_run(settings.rl, settings.generation))


def texts(findings: list[Finding], verdict: str) -> str:
    return "\n".join(item.text for item in findings if item.verdict == verdict)


def test_the_default_settings_have_nothing_wrong(tmp_path: Path) -> None:
    assert texts(find(tmp_path), "wrong") == ""


@pytest.mark.parametrize(
    ("changes", "verdict", "message"),
    [
        ({"sft__max_tokens": 513}, "wrong", "sft.max_tokens=513 is above the model's context of 512 tokens"),
        ({"data__task": HUMAN, "pairs__relabel": True}, "wrong", "pairs.relabel=true needs a gold scorer"),
        ({"data__task": HUMAN}, "note", "promotion.win_rate_by='gold' without a gold scorer"),
        ({"rl__learner__offload_optimizer": "cpu"}, "not checked", "rl.learner: whether main memory holds what"),
        ({"rl__learner__micro_batch_tokens": 271}, "note", "rl.learner.micro_batch_tokens=271 holds no 272 tokens"),
        ({"rl__algorithm": {"name": "best_of_n"}}, "note", "best_of_n imitates samples of older weights"),
    ],
)
def test_what_does_not_go_together_is_found(
    tmp_path: Path, changes: dict[str, Any], verdict: str, message: str
) -> None:
    assert message in texts(find(tmp_path, **changes), verdict)


def test_files_of_the_user_that_are_not_there_are_said_to_be_not_checked(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, data__task=GOLD)

    found = texts(list(check_source(settings, tmp_path)), "not checked")

    assert "inputs/data/a.jsonl is not here yet" in found
    assert "inputs/model/gold is not here yet" in found


def test_tokenizers_that_are_not_there_are_said_to_be_not_checked(tmp_path: Path) -> None:
    (finding,) = check_tokenizers(make_settings(tmp_path), TINY, Places(tmp_path, tmp_path))

    assert finding == Finding("not checked", "tokenizers of base, policy, reward model: not here yet")


def test_equal_tokenizers_agree_and_the_padding_trap_is_named(tmp_path: Path) -> None:
    for name in ("sft", "reward", "base"):
        tiny_tokenizer().save_pretrained(tmp_path / "artifacts" / name)

    findings = list(check_tokenizers(make_settings(tmp_path), TINY, Places(tmp_path, tmp_path)))

    assert "tokenizers of policy and reward model agree" in texts(findings, "ok")
    assert "pad is eos ('<|im_end|>'): harmless here" in texts(findings, "ok")
    assert texts(findings, "wrong") == ""


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (500, Finding("ok", "prompt lengths: at most 300 tokens in 2 prompts, generation.max_prompt_tokens=500")),
        (299, Finding("note", "1 of 2 training prompts exceed generation.max_prompt_tokens=299 and would be dropped")),
        (9, Finding("wrong", "none of 2 training prompts fits into generation.max_prompt_tokens=9; raise it")),
    ],
)
def test_lengths_of_prepared_prompts_are_looked_at(tmp_path: Path, limit: int, expected: Finding) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE  # a byte is a token
    tokenizer.save_pretrained(tmp_path / "artifacts/sft")
    prompts = [make_prompt([Message("user", "x" * length)], group=str(length)) for length in (10, 300)]
    (tmp_path / "artifacts/data").mkdir()
    write_task_data(tmp_path / "artifacts/data", _prepare(prompts))
    settings = make_settings(tmp_path, generation__max_prompt_tokens=limit, reward__max_tokens=1000)

    assert expected in list(check_tokenizers(settings, TINY, Places(tmp_path, tmp_path)))


def _prepare(prompts: list[Prompt]) -> PreparedData:
    train, none = SplitData(prompts, [], None), SplitData([], [], None)
    return PreparedData({"train": train, "validation": none, "heldout": none}, 2, 0, 0, 0, 0)


def test_another_vocabulary_or_too_large_a_one_is_wrong(tmp_path: Path) -> None:
    larger = tiny_tokenizer()
    larger.add_tokens(["<more>"])
    larger.save_pretrained(tmp_path / "inputs/model/gold")
    tiny_tokenizer().save_pretrained(tmp_path / "artifacts/sft")
    settings = make_settings(tmp_path, data__task=GOLD)

    differ = list(check_tokenizers(settings, TINY, Places(tmp_path, tmp_path)))
    larger.save_pretrained(tmp_path / "artifacts/sft")
    too_large = list(check_tokenizers(settings, TINY, Places(tmp_path, tmp_path)))

    assert "tokenizers of policy and gold model differ" in texts(differ, "wrong")
    assert "260 tokens, but the model has 259" in texts(too_large, "wrong")


def test_a_missing_end_or_template_is_wrong(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "artifacts/base")
    places = Places(tmp_path, tmp_path)

    findings = list(check_tokenizers(make_settings(tmp_path), TINY, places))
    plain = list(check_tokenizers(make_settings(tmp_path, model__chat_template="plain"), TINY, places))

    assert "has no chat template; set model.chat_template to 'plain'" in texts(findings, "wrong")
    assert texts(plain, "wrong") == ""
