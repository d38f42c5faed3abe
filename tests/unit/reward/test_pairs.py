from hypothesis import given
from hypothesis import strategies as st

from stages.data.records import Completion
from stages.data.token_pairs import TokenPair
from stages.reward.pairs import select_pairs
from tests.fakes import make_completion


def completions(finished: list[bool]) -> list[Completion]:
    return [
        make_completion(f"t{index}", sample_index=index, finished=is_finished)
        for index, is_finished in enumerate(finished)
    ]


def texts(pairs: list[TokenPair]) -> list[tuple[str, str]]:
    return [(pair.chosen_text, pair.rejected_text) for pair in pairs]


def test_each_way_of_selecting_gives_its_pairs() -> None:
    samples, scores = completions([True] * 4), [0.1, 0.9, 0.5, 0.3]  # order: t1 t2 t3 t0

    assert texts(select_pairs(samples, scores, "best_worst")[0]) == [("t1", "t0")]
    assert texts(select_pairs(samples, scores, "nested")[0]) == [("t1", "t0"), ("t2", "t3")]
    assert texts(select_pairs(samples, scores, "all")[0]) == [
        *(("t1", "t2"), ("t1", "t3"), ("t1", "t0")),
        *(("t2", "t3"), ("t2", "t0"), ("t3", "t0")),
    ]


def test_ties_are_dropped_and_counted() -> None:
    pairs, num_ties = select_pairs(completions([True] * 4), [0.5, 0.5, 0.5, 0.2], "nested")

    assert len(pairs) == 1  # best 0.5 against 0.2; the other two are equal
    assert num_ties == 1


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=6))
def test_an_unfinished_completion_never_beats_a_finished_one(samples: list[tuple[bool, int]]) -> None:
    finished = [is_finished for is_finished, _ in samples]
    state = {f"t{index}": sample for index, sample in enumerate(samples)}

    for select in ("best_worst", "nested", "all"):
        pairs, _ = select_pairs(completions(finished), [float(score) for _, score in samples], select)
        for chosen, rejected in texts(pairs):
            assert state[chosen] > state[rejected]  # finished first, then the score
