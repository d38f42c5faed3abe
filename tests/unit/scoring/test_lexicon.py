from stages.scoring.lexicon import LengthScorer, TextblobScorer, VaderScorer
from tests.fakes import make_completion

TEXTS = ["It was wonderful and I loved it.", "It was awful and I hated it.", "It was on the table."]
COMPLETIONS = [make_completion(text) for text in TEXTS]


def test_both_lexicons_order_good_before_neutral_before_bad() -> None:
    for scorer in (VaderScorer(), TextblobScorer()):
        good, bad, neutral = scorer.score(COMPLETIONS)
        assert 1 >= good > neutral > bad >= -1
        assert neutral == 0.0


def test_length_counts_words() -> None:
    assert LengthScorer().score(COMPLETIONS) == [7.0, 7.0, 5.0]
