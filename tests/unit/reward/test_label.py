from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.data.prepare import PreparedData, SplitData
from stages.data.store import write_task_data
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Request
from stages.reward.config import PairsConfig
from stages.reward.label import LabelledPairs, label_samples, label_splits, warn_without_pairs
from tests.fakes import FakeGenerator, FakeScorer
from tests.tiny import save_tiny_model
from tests.unit.judge.judgements import prompt


def test_each_prompts_samples_are_paired_by_their_own_scores() -> None:
    requests = [Request(name, (1, 2), seed) for seed, name in enumerate("ab")]
    gold = FakeScorer([0.1, 0.9, 0.5, 0.4, 0.4, 0.3])  # of a's three samples, then of b's

    labelled = label_samples(FakeGenerator(), gold, requests, 7, PairsConfig(samples_per_prompt=3, select="all"))

    assert [(pair.chosen_text, pair.rejected_text) for pair in labelled.pairs] == [
        *(("a-1", "a-2"), ("a-1", "a-0"), ("a-2", "a-0")),
        *(("b-0", "b-2"), ("b-1", "b-2")),  # b-0 and b-1 are equal
    ]
    assert labelled.num_ties == 1
    assert [item.text for item in labelled.samples] == ["a-0", "a-1", "a-2", "b-0", "b-1", "b-2"]
    assert labelled.num_prompts_too_long == 7


def test_completions_that_all_score_alike_give_no_pair(caplog: pytest.LogCaptureFixture) -> None:
    requests = [Request("a", (1, 2), 0)]
    config = PairsConfig(samples_per_prompt=3, select="all")

    labelled = label_samples(FakeGenerator(), FakeScorer([0.0, 0.0, 0.0]), requests, 0, config)
    warn_without_pairs({"train": labelled})

    assert (labelled.pairs, labelled.num_ties, len(labelled.samples)) == ([], 3, 3)
    assert caplog.messages == ["no pairs: the completions of each prompt all score alike split=train num_ties=3"]


def test_prompts_that_are_all_too_long_are_named_before_anything_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model(tmp_path / "sft")
    split = SplitData(prompts=[prompt("a")], demonstrations=[], pairs=None)
    (tmp_path / "data").mkdir()
    write_task_data(tmp_path / "data", PreparedData({"train": split, "validation": split}, 2, 0, 0, 0, 0))
    config, generation = PairsConfig(samples_per_prompt=2), GenerationConfig(max_new_tokens=8, max_prompt_tokens=1)

    with pytest.raises(InputError, match=r"no training prompt fits into generation\.max_prompt_tokens=1$"):
        label_splits(tmp_path / "data", tmp_path / "sft", FakeScorer([]), config, generation, tmp_path)
    warn_without_pairs({"validation": LabelledPairs([], [], [], num_ties=0, num_prompts_too_long=9)})
    assert "no prompt fits into generation.max_prompt_tokens split=validation num_prompts_too_long=9" in caplog.text
