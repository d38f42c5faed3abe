import torch

from stages.rl.records import LossInputs, Predictions, Rollout, Totals
from tests.unit.rl.algorithms.cases import make


def test_the_best_finished_sample_is_imitated_and_prompts_without_one_are_left_out() -> None:
    rollout = Rollout(
        scores=torch.tensor([9.0, 1.0, 2.0, 4.0, 4.0, 4.0]),
        is_finished=torch.tensor([False, True, True, True, True, True]),
        is_greedy=torch.zeros(6, dtype=torch.bool),
        groups=torch.tensor([0, 0, 0, 1, 1, 1]),
    )

    units, metrics = make("best_of_n", samples_per_prompt=3).select(rollout)

    assert [unit.rows for unit in units] == [(2,)]
    assert metrics["best_of_n/tied_prompts"].value == 0.5
    assert metrics["best_of_n/score_margin"].value == -7.0  # 2 less the 9 that has no end


def test_loss_is_the_negative_sum_of_its_logprobs() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    zeros = torch.zeros(2, 2)

    loss, _ = make("best_of_n").compute_loss(
        Predictions(logprobs), LossInputs(mask, torch.zeros(2), zeros, zeros, zeros), Totals(4, 6)
    )

    assert loss.item() == 1.5  # (1 + 2 + 3) / 4
