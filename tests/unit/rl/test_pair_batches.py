import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.data.text import TokenSequence
from stages.data.token_pairs import PairExample
from stages.rl.config import DpoConfig
from stages.rl.pair_batches import PairStream, build_pair_batches, compute_batch_loss
from stages.rl.rollouts import Reference
from tests.tiny import tiny_llama

EOS = 258
DPO = DpoConfig(name="dpo", beta=0.5)


def make_pairs(number: int) -> list[PairExample]:
    """Pairs of different lengths."""
    return [
        PairExample(
            str(index),
            TokenSequence((1, 2 + index), (*range(40, 43 + index), EOS)),
            TokenSequence((1, 2 + index), (*range(90, 92 + index % 3), EOS)),
        )
        for index in range(number)
    ]


PAIRS = make_pairs(5)


@given(num_pairs=st.integers(1, 7), size=st.integers(1, 5), num_passes=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_pass_holds_every_pair_once(num_pairs: int, size: int, num_passes: int, seed: int) -> None:
    pairs = make_pairs(num_pairs)
    stream = PairStream(pairs, size, seed)

    seen = [pair.prompt_id for update in range(-(-num_pairs * num_passes // size)) for pair in stream.get(update)]

    for number in range(num_passes):
        counts = Counter(seen[number * num_pairs : (number + 1) * num_pairs])
        assert counts == Counter(pair.prompt_id for pair in pairs)


def test_an_update_gets_its_pairs_whatever_was_asked_for_before() -> None:
    used = PairStream(PAIRS, 3, seed=0)
    for update in (0, 9, 2, 5):
        used.get(update)

    assert [used.get(update) for update in range(12)] == [PairStream(PAIRS, 3, seed=0).get(u) for u in range(12)]


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    pairs = make_pairs(12)

    orders = [tuple(pair.prompt_id for pair in PairStream(pairs, 12, seed).get(u)) for seed in (0, 1) for u in (0, 1)]

    assert len(set(orders)) == 4


def test_before_any_update_learner_and_reference_agree_to_the_last_bit() -> None:
    reference = Reference(tiny_llama(seed=3), "bf16", temperature=0.7)

    batches = build_pair_batches(PAIRS, reference, max_tokens=48)

    assert len(batches) > 1
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, metrics = compute_batch_loss(
                tiny_llama(seed=3), batch, algorithm=DPO, temperature=0.7, num_pairs=len(PAIRS)
            )
        assert metrics["dpo/margin"].value == 0.0


def test_how_pairs_are_cut_into_micro_batches_changes_neither_loss_nor_gradient() -> None:
    reference = Reference(tiny_llama(seed=3), "fp32", temperature=1.0)
    losses, gradients = [], []
    for max_tokens in (1, 40, 10_000):
        model = tiny_llama(seed=4)
        batches = build_pair_batches(PAIRS, reference, max_tokens)
        shares = [compute_batch_loss(model, b, algorithm=DPO, temperature=1.0, num_pairs=5)[0] for b in batches]
        torch.stack(shares).sum().backward()
        losses.append(torch.stack(shares).sum().detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))

    assert len(build_pair_batches(PAIRS, reference, 1)) == 5  # a pair is never cut in two
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 40, 60, 10_000])
def test_a_micro_batch_keeps_to_its_tokens_and_a_longer_pair_is_alone(max_tokens: int) -> None:
    batches = build_pair_batches(PAIRS, Reference(tiny_llama(), "fp32", temperature=1.0), max_tokens)

    assert sum(len(batch.sequences) for batch in batches) == 10
    assert all(len(b.sequences) == 2 or b.sequences.input_ids.numel() <= max_tokens for b in batches)


def test_the_loss_is_that_of_whole_completions_with_their_ends_at_the_temperature() -> None:
    policy, reference = tiny_llama(seed=4), tiny_llama(seed=3)
    pair = PAIRS[1]

    def log_ratio(side: TokenSequence) -> float:
        ids = torch.tensor([side.prompt_ids + side.completion_ids])
        start = len(side.prompt_ids) - 1
        total = 0.0
        for model, sign in ((policy, 1), (reference, -1)):
            table = torch.log_softmax(model(ids).logits[0].detach() / 0.7, dim=-1)
            total += sign * sum(table[start + t, token].item() for t, token in enumerate(side.completion_ids))
        return total

    (batch,) = build_pair_batches([pair], Reference(reference, "fp32", temperature=0.7), max_tokens=10_000)
    loss, _ = compute_batch_loss(policy, batch, algorithm=DPO, temperature=0.7, num_pairs=1)

    delta = log_ratio(pair.chosen) - log_ratio(pair.rejected)
    assert abs(delta) > 0.01
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5 * delta)), abs=1e-4)
