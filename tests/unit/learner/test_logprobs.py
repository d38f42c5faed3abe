import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from stages.data.batches import SequenceBatch, collate
from stages.data.text import TokenSequence
from stages.learner import logprobs
from tests.tiny import tiny_llama

SEQUENCES = [
    TokenSequence((5, 6, 7), (8, 9, 258)),
    TokenSequence((5,), (10, 258)),
    TokenSequence((1, 2), (3,)),
]


def test_logprobs_are_those_of_the_full_softmax_at_the_sampling_temperature() -> None:
    model, batch = tiny_llama(), collate(SEQUENCES)

    result = logprobs.compute_logprobs(model, batch, temperature=0.7)

    for row, sequence in enumerate(SEQUENCES):
        ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
        full = torch.log_softmax(model(ids).logits[0] / 0.7, dim=-1)
        for t, token in enumerate(sequence.completion_ids):
            expected = full[len(sequence.prompt_ids) - 1 + t, token]
            torch.testing.assert_close(result[row, t], expected, atol=1e-5, rtol=1e-5)
    assert result[~batch.completion_mask].eq(0).all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 9), chunk=st.integers(1, 5))
def test_chunking_changes_neither_logprobs_nor_gradients(seed: int, rows: int, chunk: int) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (rows,), generator=g)
    upstream = torch.randn(rows, generator=g)
    plain = torch.log_softmax((hidden @ weight.T).float() / 0.8, -1).gather(1, targets[:, None]).squeeze(1)
    expected = torch.autograd.grad((plain * upstream).sum(), (hidden, weight))

    saved, logprobs.CHUNK = logprobs.CHUNK, chunk
    try:
        chunked = logprobs.gather_logprobs(hidden, weight, targets, 0.8)
        actual = torch.autograd.grad((chunked * upstream).sum(), (hidden, weight))
    finally:
        logprobs.CHUNK = saved

    torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


def test_padding_changes_no_logprob() -> None:
    model = tiny_llama()
    alone = logprobs.compute_logprobs(model, collate(SEQUENCES[1:2]))

    together = logprobs.compute_logprobs(model, collate(SEQUENCES))

    torch.testing.assert_close(together[1:2, :2], alone, atol=1e-5, rtol=1e-5)


def test_a_large_vocabulary_has_fewer_rows_of_logits() -> None:
    assert [logprobs.count_rows(vocabulary) for vocabulary in (32_000, 49_152, 128_000, 2**40)] == [256, 256, 98, 1]


def test_the_gradient_of_a_cast_head_is_that_of_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=g)
    weight = torch.randn(logprobs.TABLE_ROWS + 3, 8, generator=g, requires_grad=True)  # two parts of the table
    targets = torch.tensor([0, 1, 2, logprobs.TABLE_ROWS, logprobs.TABLE_ROWS + 2])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = logprobs.gather_logprobs(hidden, weight, targets, 0.8)
        logits = (hidden.bfloat16() @ weight.bfloat16().T).float() / 0.8
    plain = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)

    torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-5)
    actual, expected = (torch.autograd.grad(item.sum(), weight)[0] for item in (mine, plain))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)  # bf16 keeps 8 bits


def test_a_frozen_head_is_cast_once_until_other_weights_are_put_into_it() -> None:
    trained, frozen, batch = tiny_llama(), tiny_llama(), collate(SEQUENCES)
    frozen.requires_grad_(False)
    head = frozen.get_output_embeddings()

    assert torch.equal(_compute_in_bf16(frozen, batch), _compute_in_bf16(trained, batch))
    kept = vars(head)[logprobs._KEPT].weight
    assert torch.equal(_compute_in_bf16(frozen, batch), _compute_in_bf16(trained, batch))
    assert vars(head)[logprobs._KEPT].weight is kept
    assert kept.dtype == torch.bfloat16

    before = _compute_in_bf16(trained, batch)
    for model in (trained, frozen):
        model.load_state_dict(tiny_llama(seed=1).state_dict())
    assert torch.equal(_compute_in_bf16(frozen, batch), _compute_in_bf16(trained, batch))
    assert not torch.equal(_compute_in_bf16(frozen, batch), before)
    assert torch.equal(logprobs.compute_logprobs(frozen, batch), logprobs.compute_logprobs(trained, batch))


@torch.no_grad()
def _compute_in_bf16(model: PreTrainedModel, batch: SequenceBatch) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return logprobs.compute_logprobs(model, batch)
