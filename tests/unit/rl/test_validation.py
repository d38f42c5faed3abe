import pytest
import torch

from stages.rl.rollouts import Reference
from stages.rl.validation import Evaluation, estimate_kl, is_better
from tests.fakes import make_completion
from tests.tiny import tiny_llama

TEMPERATURE = 0.8


def evaluation(score: float, kl_nats: float) -> Evaluation:
    return Evaluation(1, score=score, kl_nats=kl_nats, completion_tokens=20.0, finished_fraction=1.0)


def test_the_best_checkpoint_has_the_highest_score_within_the_kl_limit() -> None:
    assert is_better(evaluation(1.0, 7.9), None, max_kl_nats=8.0)
    assert is_better(evaluation(1.1, 7.9), evaluation(1.0, 1.0), max_kl_nats=8.0)
    assert not is_better(evaluation(0.9, 1.0), evaluation(1.0, 7.9), max_kl_nats=8.0)
    assert not is_better(evaluation(9.0, 8.1), evaluation(1.0, 1.0), max_kl_nats=8.0)
    assert not is_better(evaluation(9.0, float("nan")), evaluation(1.0, 1.0), max_kl_nats=8.0)


def test_kl_is_the_policys_logprob_less_the_references_on_the_policys_own_completions() -> None:
    completions = [make_completion("x", token_ids=ids) for ids in ((9, 10, 11), (12,), (13, 14, 258))]
    models = {"policy": tiny_llama(0), "reference": tiny_llama(1)}
    sums = {}
    for name, model in models.items():
        sums[name] = 0.0
        for completion in completions:
            start = len(completion.prompt_ids)
            ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
            logprobs = torch.log_softmax(model(ids).logits[0] / TEMPERATURE, dim=-1).detach()
            sums[name] += sum(
                float(logprobs[start + place - 1, token]) for place, token in enumerate(completion.token_ids)
            )

    policy, reference = (Reference(model, "fp32", TEMPERATURE) for model in models.values())
    found = estimate_kl(policy, reference, completions, max_tokens=8)

    expected = (sums["policy"] - sums["reference"]) / 3
    assert abs(expected) > 0.01
    assert found == pytest.approx(expected, abs=1e-4)
    assert estimate_kl(reference, policy, completions, max_tokens=8) == pytest.approx(-expected, abs=1e-4)
