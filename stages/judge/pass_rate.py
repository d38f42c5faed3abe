"""pass@1 and pass@k of both models, for tasks whose gold scorer is a rule: how often one of k completions is right.

Paper: Chen et al. 2021, arXiv:2107.03374, equation 1: the mean over problems of 1 − C(n − c, k) / C(n, k), for n
completions of which c are right. Departures: the interval, which the paper has not, and whole numbers throughout, where
its appendix multiplies floats.
"""

from collections import defaultdict
from math import comb

from stages.common.statistics import bootstrap_interval
from stages.judge.comparison import Comparison, ScoredSamples
from stages.judge.evaluate import Metrics

PASS = "pass_at"


def estimate_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability, 0 … 1, that at least one of k completions is right; without bias.

    Args:
        num_samples: n, completions of the problem.
        num_correct: c, those that are right; 0 … n.
        k: completions one may choose from; 1 … n.

    Raises:
        ValueError: a number outside its range; n completions say nothing about more than n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"k={k} and num_correct={num_correct} with num_samples={num_samples}; allowed: 1 … {num_samples} for k, "
            f"0 … {num_samples} for num_correct"
        )
    choices = comb(num_samples, k)
    return (choices - comb(num_samples - num_correct, k)) / choices


def measure_pass_rates(comparison: Comparison, seed: int) -> Metrics:
    """`pass_at_{k}_sft`, `pass_at_{k}_policy` and their 95 % intervals, for every k up to the samples a prompt has.

    A completion is right if gold, the rule, gives it 1; finished or not plays no part.

    Args:
        comparison: of both models, scored by a rule as gold.
        seed: of the bootstrap, which resamples prompts.
    """
    counts = {"sft": _count_by_prompt(comparison.sft), "policy": _count_by_prompt(comparison.policy)}
    most = min(num_samples for of_model in counts.values() for num_samples, _ in of_model.values())
    metrics: Metrics = {}
    for k in range(1, most + 1):
        for model, of_model in counts.items():
            values = [estimate_pass_at_k(num_samples, num_correct, k) for num_samples, num_correct in of_model.values()]
            metrics[f"{PASS}_{k}_{model}"] = sum(values) / len(values)
            metrics[f"{PASS}_{k}_{model}_interval"] = list(bootstrap_interval(values, list(of_model), seed))
    return metrics


def _count_by_prompt(samples: ScoredSamples) -> dict[str, tuple[int, int]]:
    """Completions and right ones of each prompt, in the prompts' order."""
    assert samples.gold is not None
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for completion, score in zip(samples.completions, samples.gold, strict=True):
        verdicts[completion.prompt_id].append(score == 1.0)
    return {prompt_id: (len(of_prompt), sum(of_prompt)) for prompt_id, of_prompt in verdicts.items()}
