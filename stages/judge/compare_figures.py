"""What the compare page shows of a run's numbers: columns of its table, alarms, cautions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stages.judge.compared_run import ComparedRun

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, if it has one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Column:
    """A number of every run."""

    metric: str
    title: str
    meaning: str


COLUMNS = (
    Column(
        "gold_win_rate", "Gold win-rate", "share of prompts where the policy beats its SFT model by the gold scorer"
    ),
    Column("proxy_win_rate", "Proxy win-rate", "the same by the reward model or rule that was trained against"),
    Column("llm_win_rate", "LLM win-rate", "share of matches that the LLM judge gives to the policy, a tie half"),
    Column("llm_length_adjusted_win_rate", "LLM, length-adjusted", "the same with the pull of length taken out"),
    Column(
        "llm_length_controlled_win_rate",
        "LLM, length-controlled",
        "the same with the pull of length taken out, fitted over several runs",
    ),
    Column("kl_nats", "KL, nats", "KL(policy ‖ SFT) per completion"),
    Column("kl_nats_per_token", "KL per token", "the same divided by tokens"),
    Column("length_ratio", "Length ratio", "completion tokens, policy / SFT"),
    Column("finished_fraction_policy", "Finished", "share of completions that end by themselves"),
    Column("proxy_gold_disagreement", "Proxy ≠ gold", "share of comparisons they give to different models"),
    Column("pass_at_1_policy", "pass@1", "share of completions that are right"),
)
"""Those that no run has are left out of the page."""


def read_estimate(metrics: Metrics, name: str) -> Estimate | None:
    """A metric and its interval; None where the run has none."""
    if name not in metrics:
        return None
    return Estimate(metrics[name], metrics.get(f"{name}_interval_low"), metrics.get(f"{name}_interval_high"))


def find_alarms(metrics: Metrics) -> list[str]:
    """One line for each alarm that the judge raised, with its figures and what to look at."""
    return [describe(metrics) for name, describe in ALARMS.items() if metrics.get(name) == 1.0]


def has_alarms(metrics: Metrics) -> bool:
    """Whether the judge looked for any; runs of earlier versions did not."""
    return any(name in metrics for name in ALARMS)


def find_cautions(runs: Sequence[ComparedRun], num_shared: int) -> list[str]:
    """What makes numbers of these runs not comparable, one line each.

    Args:
        runs: those on the page.
        num_shared: samples that all of them have.
    """
    cautions = []
    counts = [len(run.samples) for run in runs]
    if any(count != num_shared for count in counts):
        cautions.append(
            f"The runs were judged on different prompts: they share {num_shared} samples, of "
            f"{', '.join(map(str, counts))}. Rates in the table are over each run's own."
        )
    judged = [run for run in runs if run.opponent is not None]
    if len({(run.opponent, run.judge_model, run.judge_settings) for run in judged}) > 1:
        pairs = ", ".join(dict.fromkeys(map(_describe_judge, judged)))
        cautions.append(f"The LLM judge was not the same, or compared with different opponents: {pairs}.")
    if not _have_one_sft_model(runs):
        cautions.append(
            "The SFT model answered differently: another model, engine or seed. Win-rates and KL are against them."
        )
    changed = [run.pipeline for run in runs if run.is_dirty]
    if changed:
        cautions.append(f"Files differed from the commit: {', '.join(changed)}.")
    return cautions


def _describe_judge(run: ComparedRun) -> str:
    mode, prompt, temperature = run.judge_settings
    return f"{run.judge_model or 'unknown'} ({mode}, {prompt}, temperature {temperature}) against {run.opponent}"


def _have_one_sft_model(runs: Sequence[ComparedRun]) -> bool:
    """As far as one sees: the same answers to the samples that all have."""
    shared = set.intersection(*(set(run.samples) for run in runs)) if runs else set()
    return all(run.samples[key].sft == runs[0].samples[key].sft for run in runs[1:] for key in shared)


def format_number(value: float) -> str:
    """Three figures, as people read them in a table; counts as they are."""
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:#.3g}"


def format_estimate(metrics: Metrics, name: str) -> str:
    """A number with its interval in brackets; a dash where there is none."""
    found = read_estimate(metrics, name)
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return format_number(found.value)
    return f"{format_number(found.value)} ({format_number(found.low)} … {format_number(found.high)})"


def _describe_proxy(other: str, title: str) -> Callable[[Metrics], str]:
    def describe(metrics: Metrics) -> str:
        proxy, rate = format_estimate(metrics, "proxy_win_rate"), format_estimate(metrics, other)
        return (
            f"Proxy up, {title} not: proxy win-rate {proxy}, {title} {rate}. The policy may exploit the reward model; "
            "sort the samples by disagreement."
        )

    return describe


def _describe_pair(title: str, names: tuple[str, ...], advice: str) -> Callable[[Metrics], str]:
    def describe(metrics: Metrics) -> str:
        figures = ", ".join(f"{name} {format_estimate(metrics, name)}" for name in names)
        return f"{title}: {figures}. {advice}"

    return describe


ALARMS: Mapping[str, Callable[[Metrics], str]] = {
    "alarm_proxy_without_gold": _describe_proxy("gold_win_rate", "gold"),
    "alarm_proxy_without_llm": _describe_proxy("llm_win_rate", "LLM judge"),
    "alarm_length": _describe_pair(
        "Length drifted", ("length_ratio",), "A scorer may like a length; sort the samples by length."
    ),
    "alarm_repetition": _describe_pair(
        "Repeats itself", ("repetition_policy", "repetition_sft"), "Read the longest samples."
    ),
    "alarm_unfinished": _describe_pair(
        "Breaks off", ("finished_fraction_policy", "finished_fraction_sft"), "Read the longest samples."
    ),
}
"""How each alarm of the judge is told; the judge logs 1 or 0."""
