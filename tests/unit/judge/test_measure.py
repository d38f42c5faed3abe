import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.data.text import TokenSequence
from stages.judge import measure
from stages.learner import logprobs
from tests.tiny import tiny_llama

SEQUENCES = [
    TokenSequence((5, 6, 7), (8, 9, 258)),
    TokenSequence((5,), (10, 258)),
    TokenSequence((1, 2), (3,)),
]


def predict(seed: int, micro_batch_tokens: int = 4096) -> measure.Predictions:
    model = tiny_llama(seed)
    return measure.predict_completions(model, SEQUENCES, micro_batch_tokens=micro_batch_tokens, dtype="fp32")


def full_logprobs(seed: int, sequence: TokenSequence, temperature: float) -> Tensor:
    """Every distribution that predicts a completion token, the plain way. [T, V]"""
    ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
    logits = tiny_llama(seed)(ids).logits[0, len(sequence.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def test_exact_kl_is_that_of_the_full_distributions_at_every_position() -> None:
    result = measure.sum_kl(predict(0), predict(1), temperature=0.7)

    for actual, sequence in zip(result, SEQUENCES, strict=True):
        mine, other = full_logprobs(0, sequence, 0.7), full_logprobs(1, sequence, 0.7)
        expected = (mine.exp() * (mine - other)).sum()
        assert expected > 1e-3  # the two models differ, so the comparison says something
        assert actual == pytest.approx(expected.item(), rel=1e-4)


def test_logprobs_are_summed_over_the_completion_alone() -> None:
    result = measure.sum_logprobs(predict(0), temperature=1.3)

    for actual, sequence in zip(result, SEQUENCES, strict=True):
        full = full_logprobs(0, sequence, 1.3)
        expected = sum(full[t, token].item() for t, token in enumerate(sequence.completion_ids))
        assert actual == pytest.approx(expected, rel=1e-5)


def test_kl_of_a_model_with_itself_is_zero() -> None:
    assert measure.sum_kl(predict(0), predict(0), temperature=1.0) == [0.0, 0.0, 0.0]


def test_micro_batches_change_nothing_but_rounding() -> None:
    whole = measure.sum_kl(predict(0), predict(1), 1.0)
    split = measure.sum_kl(predict(0, micro_batch_tokens=1), predict(1, micro_batch_tokens=1), 1.0)

    assert split == pytest.approx(whole, rel=1e-4)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 9), chunk=st.integers(1, 4), scale=st.floats(0.01, 5))
def test_chunking_changes_no_kl_and_none_is_negative(seed: int, rows: int, chunk: int, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden, other = torch.randn(rows, 6, generator=g), torch.randn(rows, 4, generator=g)
    weight, other_weight = torch.randn(11, 6, generator=g) * scale, torch.randn(11, 4, generator=g) * scale
    p, log_p = torch.softmax(hidden @ weight.T, -1), torch.log_softmax(hidden @ weight.T, -1)
    expected = (p * (log_p - torch.log_softmax(other @ other_weight.T, -1))).sum(-1)

    saved, logprobs.CHUNK = logprobs.CHUNK, chunk
    try:
        actual = logprobs.compute_kl(hidden, weight, other, other_weight, 1.0)
    finally:
        logprobs.CHUNK = saved

    torch.testing.assert_close(actual, expected.clamp(min=0), atol=1e-5, rtol=1e-4)
    assert actual.ge(0).all()


def test_kl_of_two_known_distributions() -> None:
    # p = (1/2, 1/2), q = (3/4, 1/4): 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3) = 0.143841
    uniform, skewed = torch.zeros(2, 1), torch.tensor([[3.0], [1.0]]).log()

    kl = logprobs.compute_kl(torch.ones(1, 1), uniform, torch.ones(1, 1), skewed, temperature=1.0)

    torch.testing.assert_close(kl, torch.tensor([0.143841]), atol=1e-6, rtol=0)


def test_models_over_different_sequences_are_refused() -> None:
    shorter = measure.predict_completions(tiny_llama(), SEQUENCES[:2], micro_batch_tokens=64, dtype="fp32")

    with pytest.raises(ValueError, match="different sequences"):
        measure.sum_kl(predict(0), shorter, 1.0)


def test_models_with_different_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ in \(positions, vocabulary\): \(2, 5\) and \(2, 4\)"):
        logprobs.compute_kl(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(4, 3), 1.0)


def test_rounding_never_makes_a_kl_negative() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 8, generator=g), torch.randn(4096, 8, generator=g)
    almost = hidden * (1 + 1e-7 * torch.randn(hidden.shape, generator=g))

    assert logprobs.compute_kl(hidden, weight, almost, weight, temperature=1.0).ge(0).all()
