import pytest

from stages.generation.protocol import Request
from stages.reward.config import PairsConfig
from stages.reward.label import label_samples, warn_without_pairs
from tests.fakes import FakeGenerator, FakeScorer


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
