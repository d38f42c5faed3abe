from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.common.errors import InputError, RunError
from stages.data.records import Completion
from stages.generation.protocol import Request, SamplingPlan, Ticket
from stages.models.reward_model import init_reward_model
from stages.rl.algorithms.online_dpo import OnlineDpo
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.ledger.reader import LedgerReader, RecordedUpdate, read_ledger
from stages.rl.ledger.schema import LedgerHeader
from stages.rl.ledger.writer import Ledger
from stages.rl.mini_batch import MiniBatch, Preparation, Sampled, rebuild_mini_batch
from stages.rl.rollouts import Reference, compute_loss
from stages.rl.scoring import ScoredGroup
from stages.rl.value import ValueModel, compute_values
from tests.fakes import FakeScorer, make_completion
from tests.tiny import save_tiny_model, tiny_llama
from tests.unit.rl.algorithms.cases import make

SCORES = [0.0, 3.0, 1.0, 5.0, 5.0, 5.0]
"""Of two prompts with three samples each; the second has nothing to learn from."""
DIFFERENT = [0.0, 3.0, 1.0, 2.0, -1.0, 0.5]
"""Of the same, each with something to learn from."""


@dataclass(frozen=True, kw_only=True)
class WithProximal(OnlineDpo):
    """An algorithm that asks for proximal log-probabilities."""

    @property
    def needs_proximal(self) -> bool:
        return True


def make_sampled(number: int) -> Sampled:
    lengths = (1, 3, 2)
    group: tuple[Completion, ...] = tuple(
        replace(
            make_completion("x", prompt_id=f"p{number}", sample_index=index, token_ids=tuple(range(9, 9 + length))),
            first_policy_version=2,
            last_policy_version=2,
        )
        for index, length in enumerate(lengths)
    )
    return Sampled(Ticket(number, Request(f"p{number}", (1, 2), 0), SamplingPlan(3)), group)


def make_preparation(algorithm: Algorithm) -> Preparation:
    return Preparation(
        algorithm=algorithm,
        scorer=FakeScorer(SCORES),
        missing_eos_score=-1.0,
        reference=Reference(tiny_llama(0), "fp32", 1.0),
        learner=Reference(tiny_llama(1), "fp32", 1.0),
        max_tokens=64,
    )


def prepare(preparation: Preparation, sampled: list[Sampled], scores: list[float] = SCORES) -> MiniBatch:
    mini_batch = preparation.prepare(sampled, scores, (3, 1, 1))
    assert mini_batch is not None
    return mini_batch


DPO = OnlineDpo(samples_per_prompt=3, beta=0.1, loss="sigmoid")
WITH_PROXIMAL = WithProximal(samples_per_prompt=3, beta=0.1, loss="sigmoid")
RLOO = make("rloo", samples_per_prompt=3)
GRPO = make("grpo", samples_per_prompt=3)
UNSCALED = make("grpo", samples_per_prompt=3, scale="none")


def test_every_sample_has_a_row_and_only_the_chosen_ones_a_place() -> None:
    mini_batch = prepare(make_preparation(DPO), [make_sampled(4), make_sampled(5)])

    assert [(row.ticket, row.sample_index, row.place, row.score) for row in mini_batch.rows] == [
        (4, 0, 1, 0.0),  # the worst of its prompt
        (4, 1, 0, 3.0),  # the best
        (4, 2, None, 1.0),
        (5, 0, None, 5.0),
        (5, 1, None, 5.0),
        (5, 2, None, 5.0),
    ]
    assert {(row.update, row.rollout, row.mini_batch, row.staleness) for row in mini_batch.rows} == {(3, 1, 1, 1)}
    assert {row.staleness for row in mini_batch.rows_of(update=6, epoch=1)} == {4}
    assert mini_batch.num_units == 1


def test_proximal_logprobs_are_the_learners_where_they_are_asked_for() -> None:
    sampled = [make_sampled(4), make_sampled(5)]
    preparation = make_preparation(WITH_PROXIMAL)

    asked, unasked = prepare(preparation, sampled), prepare(make_preparation(DPO), sampled)

    (micro_batch,) = asked.micro_batches
    expected = preparation.learner.compute(micro_batch.sequences)
    assert micro_batch.inputs.proximal_logprobs is not None
    torch.testing.assert_close(micro_batch.inputs.proximal_logprobs, expected, rtol=0, atol=0)
    assert [len(row.proximal_logprobs or ()) for row in asked.rows] == [1, 3, 0, 0, 0, 0]
    assert unasked.micro_batches[0].inputs.proximal_logprobs is None
    assert {row.proximal_logprobs for row in unasked.rows} == {None}


def test_what_all_models_have_in_common_is_computed_once_and_goes_with_the_batch() -> None:
    model = tiny_llama(0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.1
    plain = replace(make_preparation(WITH_PROXIMAL), learner=Reference(model, "fp32", 1.0))
    shared = replace(plain, reference=Reference(tiny_llama(0), "fp32", 1.0, trunk_depth=1))

    (expected,) = prepare(plain, [make_sampled(4), make_sampled(5)]).micro_batches
    (micro_batch,) = prepare(shared, [make_sampled(4), make_sampled(5)]).micro_batches

    assert expected.sequences.trunk is None
    assert micro_batch.sequences.trunk is not None
    for name in ("reference_logprobs", "proximal_logprobs"):
        torch.testing.assert_close(getattr(micro_batch.inputs, name), getattr(expected.inputs, name), rtol=0, atol=0)


def test_reference_logprobs_that_came_with_the_samples_are_used_as_they_are() -> None:
    scored = ScoredGroup(scores=(), reference_logprobs=((-7.0,), (-1.0, -2.0, -3.0), None))
    sampled = [replace(make_sampled(4), scored=scored), make_sampled(5)]

    (micro_batch,) = prepare(replace(make_preparation(DPO), reference=None), sampled).micro_batches

    assert micro_batch.inputs.reference_logprobs.tolist() == [[-1.0, -2.0, -3.0], [-7.0, 0.0, 0.0]]


def test_without_a_reference_all_that_is_trained_on_must_bring_its_logprobs() -> None:
    scored = ScoredGroup(scores=(), reference_logprobs=(None, (-1.0, -2.0, -3.0), None))
    sampled = [replace(make_sampled(4), scored=scored), make_sampled(5)]

    with pytest.raises(RunError, match="ticket 4: a completion came without log-probabilities of the reference"):
        prepare(replace(make_preparation(DPO), reference=None), sampled)


def test_equal_scores_everywhere_give_no_mini_batch() -> None:
    assert make_preparation(DPO).prepare([make_sampled(4), make_sampled(5)], [2.0] * 6, (0, 0, 0)) is None


@pytest.mark.parametrize("name", ["online_dpo", "rloo", "grpo", "ppo"])
def test_how_a_mini_batch_is_cut_changes_neither_loss_nor_gradient(tmp_path: Path, name: str) -> None:
    critic = init_reward_model(save_tiny_model(tmp_path / "sft"), torch.float32, seed=3)
    preparation = replace(make_preparation(make(name, samples_per_prompt=3)), value=ValueModel(critic, "fp32"))

    whole = prepare(replace(preparation, max_tokens=10_000), [make_sampled(4), make_sampled(5)], DIFFERENT)
    cut = prepare(replace(preparation, max_tokens=8), [make_sampled(4), make_sampled(5)], DIFFERENT)

    assert (len(whole.micro_batches), len(cut.micro_batches)) == ((1, 2) if name == "online_dpo" else (1, 4))
    num_tokens = {"online_dpo": 2 * (1 + 3), "rloo": 12, "grpo": 12, "ppo": 12}[name]
    assert whole.totals.num_tokens == cut.totals.num_tokens == num_tokens
    for expected, found in zip(
        compute_gradients(preparation, whole, critic), compute_gradients(preparation, cut, critic), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def compute_gradients(preparation: Preparation, mini_batch: MiniBatch, critic: PreTrainedModel) -> list[Tensor]:
    """Of the policy's first matrix, and of the value model's if there is one."""
    algorithm, policy = preparation.algorithm, tiny_llama(1)
    for micro_batch in mini_batch.micro_batches:
        loss, _ = compute_loss(
            policy, micro_batch, algorithm=algorithm, totals=mini_batch.totals, reference=preparation.learner
        )
        loss.backward()
        if algorithm.value_model is not None:
            values = compute_values(critic, micro_batch.sequences)
            algorithm.value_model.compute_loss(values, micro_batch.inputs, mini_batch.totals)[0].backward()
    found = [next(model.parameters()).grad for model in (policy, critic)]
    critic.zero_grad()
    return [gradient for gradient in found if gradient is not None]


def record(path: Path, sampled: list[Sampled], mini_batch: MiniBatch) -> tuple[RecordedUpdate, LedgerReader]:
    """A ledger of one update."""
    ledger = Ledger.open(path, LedgerHeader(1, 2, 1, 2, 4, 3, False, "drain", 0, 10, "prompts", "model", 1.0))
    for item in sampled:
        ledger.add_group(item.ticket.number, 0, item.group, "generator-0")
    ledger.add_update(mini_batch.rows)
    ledger.flush()
    reader = read_ledger(path)
    (recorded,) = reader.updates()
    return recorded, reader


@pytest.mark.parametrize(("recorded_by", "replayed_by"), [(RLOO, DPO), (DPO, RLOO), (RLOO, GRPO), (GRPO, UNSCALED)])
def test_another_algorithm_cannot_be_trained_on_what_a_recorded_one_chose(
    tmp_path: Path, recorded_by: Algorithm, replayed_by: Algorithm
) -> None:
    sampled = [make_sampled(4), make_sampled(5)]
    recorded, reader = record(tmp_path, sampled, prepare(make_preparation(recorded_by), sampled))

    with pytest.raises(InputError, match=r"rl\.replay_from: update 3 was recorded with another rl\.algorithm"):
        rebuild_mini_batch(recorded, reader, make_preparation(replayed_by), is_resumed=False)


def test_a_recording_without_the_reference_is_not_replayed_where_it_is_needed(tmp_path: Path) -> None:
    sampled = [make_sampled(4), make_sampled(5)]
    plain, charged = (make("rloo", samples_per_prompt=3, kl_coef=kl_coef) for kl_coef in (0.0, 0.1))
    recorded, reader = record(tmp_path, sampled, prepare(make_preparation(plain), sampled))
    preparation = replace(make_preparation(charged), reference=None)

    with pytest.raises(InputError, match=r"rl\.replay_from: update 3 was recorded without log-probabilities"):
        rebuild_mini_batch(recorded, reader, preparation, is_resumed=False)


def test_in_a_replay_proximal_log_probabilities_are_the_learners_own(tmp_path: Path) -> None:
    sampled = [make_sampled(4), make_sampled(5)]
    preparation = make_preparation(WITH_PROXIMAL)
    recorded, reader = record(tmp_path, sampled, prepare(preparation, sampled))
    other = replace(preparation, learner=Reference(tiny_llama(2), "fp32", 1.0))

    again = rebuild_mini_batch(recorded, reader, other, is_resumed=False)

    for old, new in zip(prepare(other, sampled).micro_batches, again.micro_batches, strict=True):
        assert old.inputs.proximal_logprobs is not None
        assert new.inputs.proximal_logprobs is not None
        assert torch.equal(old.inputs.proximal_logprobs, new.inputs.proximal_logprobs)


@pytest.mark.parametrize("algorithm", [DPO, WITH_PROXIMAL, RLOO, GRPO])
def test_a_mini_batch_comes_back_from_the_ledger_bit_for_bit(tmp_path: Path, algorithm: Algorithm) -> None:
    sampled = [make_sampled(4), make_sampled(5)]
    preparation = make_preparation(algorithm)
    mini_batch = prepare(preparation, sampled)
    recorded, reader = record(tmp_path, sampled, mini_batch)
    # With other models behind it: everything must come from the ledger.
    elsewhere = replace(preparation, reference=preparation.learner, learner=preparation.reference)
    again = rebuild_mini_batch(recorded, reader, elsewhere, is_resumed=True)

    assert (again.num_units, again.rows) == (mini_batch.num_units, mini_batch.rows)
    for old, new in zip(mini_batch.micro_batches, again.micro_batches, strict=True):
        assert torch.equal(old.sequences.input_ids, new.sequences.input_ids)
        for name, tensor in vars(old.inputs).items():
            assert (tensor is None) == (getattr(new.inputs, name) is None)
            assert tensor is None or torch.equal(tensor, getattr(new.inputs, name))
