"""The figures of `make bench`: which script measures each at a small size, its target, and where the number lies."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Read = Callable[[Any], float]
"""The figure, from a script's JSON."""


PREFLIGHT = "ReMax, all of 8 layers, bf16, vocabulary 128,000"
"""The configuration that `make bench` measures of preflight_second.json."""


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    name: str
    read: Read | None
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    @property
    def target(self) -> str:
        """As it is shown."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}{self.unit}"
        return "–" if self.at_most is None else f"≤ {self.at_most:g}{self.unit}"

    def is_met(self, value: float) -> bool | None:
        """None where there is no target."""
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most


@dataclass(frozen=True)
class Script:
    """One run of a script."""

    name: str
    """Its file in bench/."""
    arguments: tuple[str, ...]
    figures: tuple[Figure, ...]
    needs_inputs: bool = False
    """Whether it reads the artifacts of a finished pipeline."""
    skip: str = ""
    """Why it is not part of the table's runs; shown in place of a number."""
    counts_seconds: bool = True
    """Whether a figure depends on the machine's speed, so that nothing may run beside it."""


def scripts(inputs: Path, workspace: Path, trl_python: str | None) -> tuple[Script, ...]:
    """All of them, in the order they run.

    Args:
        inputs: folder with the artifacts of a finished pipeline.
        workspace: for whatever they write.
        trl_python: interpreter of an environment with TRL.
    """
    sft, reward, project = str(inputs / "sft"), str(inputs / "reward"), str(inputs.parent)
    given = ("--inputs", str(inputs))
    no_trl = "" if trl_python else "needs --trl-python"
    return (
        Script(
            "limits_generator.py",
            ("--rounds", "1", "--updates", "2", "--prompts", "8", *given),
            (
                Figure("generator / vLLM offline, at once", lambda r: r["summary"]["at once"]["ratio"], at_least=0.95),
                Figure("generator / vLLM offline, window", lambda r: r["summary"]["window"]["ratio"], at_least=0.95),
            ),
            needs_inputs=True,
        ),
        Script(
            "limits_run.py",
            ("--runs", str(inputs.parent / "metrics/policy.json")),
            (Figure("publish and ledger / wall", lambda r: r["summary"]["publish_and_ledger"], at_most=0.02),),
            needs_inputs=True,
        ),
        Script(
            "limits_start.py",
            ("--rounds", "1", "--stages", "train_policy", "--project", project),
            (
                Figure("`dvc repro`, nothing to do", read_nothing("dvc repro"), at_most=4, unit=" s"),
                Figure("`make run`, nothing to do", read_nothing("make run"), at_most=4, unit=" s"),
                Figure("train_policy, to its first work", read_start("train_policy"), unit=" s"),
            ),
            needs_inputs=True,
        ),
        Script(
            "limits_scaling.py",
            ("--model", sft, "--rounds", "1", "--prompts", "4", "16", "--tokens", "24", "--layers", "15"),
            (
                Figure("slope, learner against prompts", lambda r: r["summary"]["learner, prompts"]["slope"]),
                Figure("slope, generator against prompts", lambda r: r["summary"]["generator, prompts"]["slope"]),
            ),
            needs_inputs=True,
        ),
        Script(
            "overlap.py",
            ("--rounds", "1", "--updates", "5", "--arms", "sync, one core each", "async 1, drain", *given),
            (
                Figure("overlap efficiency", read_async("overlap_efficiency"), at_least=0.90),
                Figure("publish / wall, between updates", read_async("publish_share"), at_most=0.02),
            ),
            needs_inputs=True,
        ),
        Script(
            "memory.py",
            (
                *("--model", sft, "--reward", reward, "--algorithms", "ppo", "remax"),
                *("--trainable-layers", "all", "--updates", "1", "--completions", "4", "--bytes-only"),
            ),
            (Figure("ReMax's saving against PPO, by the paper's sum", read_saving),),
            needs_inputs=True,
            counts_seconds=False,
        ),
        Script(
            "trunk.py",
            ("--model", sft, "--reward", reward, "--algorithms", "ppo", "--rounds", "1", "--completions", "8"),
            (Figure("processor time saved by a common trunk, PPO", lambda r: r["algorithms"]["ppo"]["saved"]),),
            needs_inputs=True,
        ),
        Script(
            "cpu.py",
            (
                *("--model", sft, "--reward", reward, "--questions", "heap", "waiting, beside other work"),
                *("--rounds", "1", "--updates", "1", "--completions", "4"),
            ),
            (
                Figure("time saved by kept memory, RLOO", lambda r: r["rows"][0]["saved"]),
                Figure("time saved by shorter waiting, beside other work", lambda r: r["rows"][1]["saved"]),
            ),
            needs_inputs=True,
        ),
        Script(
            "judge_throughput.py",
            ("--matches", "100", "--concurrency", "8", "--workspace", str(workspace)),
            (Figure("judge, ideal time / time", lambda r: 1 / r["arms"][0]["wall_over_ideal"]),),
        ),
        Script(
            "judge_traces.py",
            ("--num-traces", "50"),
            (Figure("traces per second, SQLite", lambda r: r["traces_per_s"]["sqlite"]["first"]),),
        ),
        Script(
            "drill.py",
            (
                *("--engine", "transformers", "--faults", "3", "--updates", "60", "--pause-s", "1", "--minutes", "4"),
                *("--only", "learner:SIGKILL:publication", "learner:SIGSTOP:any", "scoring:SIGKILL:any"),
                *("--workspace", str(workspace / "drill")),
            ),
            (Figure("lost, doubled, unnoticed or left after 3 faults", read_faults, at_most=0),),
        ),
        Script(
            "mutants.py",
            ("--only", "best_of_n.py"),
            (
                Figure(
                    "mutants that survive, best_of_n", lambda r: sum(row["killed_by"] is None for row in r), at_most=0
                ),
            ),
            counts_seconds=False,
        ),
        Script(
            "ranks.py",
            ("--model", sft, "--arms", "2", "--updates", "1", "--sequences", "4"),
            (Figure("held by a rank of 2 / by 1", read_held),),
            needs_inputs=True,
            counts_seconds=False,
        ),
        *(
            Script(
                f"gpu/{name}.py",
                ("--device", "cpu", "--smallest"),
                (Figure(f"gpu/{name}.py runs on CPU", None),),
                counts_seconds=False,
            )
            for name in ("learner_throughput", "remax_vs_ppo_memory", "weight_transfer", "async_overlap")
        ),
        Script(
            "throughput.py",
            ("--model", sft, "--rounds", "1", "--prompts", "4", "--arms", "0", "1"),
            (
                Figure("learner / plain step, RLOO", read_throughput("rloo, 12 layers"), at_least=1.3),
                Figure("learner / plain step, RLOO, all layers", read_throughput("rloo, all layers"), at_least=1.3),
            ),
            needs_inputs=True,
        ),
        Script(
            "trl_throughput.py",
            (
                *("--rounds", "1", "--trl-python", trl_python or "", "--algorithms", "grpo", "--layers", "12", *given),
                *("--updates", "2", "--warm-up", "1", "--completions", "16"),
            ),
            (
                Figure("samples/s / TRL's, equal generator, GRPO", read_trl("transformers"), at_least=1.3),
                Figure("samples/s / TRL's, as shipped, GRPO", read_trl("vllm"), at_least=3),
            ),
            needs_inputs=True,
            skip=no_trl,
        ),
        Script(
            "vocabulary.py",
            ("--losses", "chunked", "--trainable-layers", "12", "--rows", "4"),
            (Figure("peak at 128,000 words / at 32,000, beyond the embeddings", read_growth, at_most=1.15),),
            counts_seconds=False,
        ),
        Script(
            "preflight.py",
            ("--configurations", "bench/preflight_second.json", "--only", PREFLIGHT),
            (Figure("memory estimate's error", read_error, at_most=0.15),),
            counts_seconds=False,
        ),
        Script("study.py", (), (Figure("study", None),), skip="hours"),
        Script("default_run.py", (), (Figure("the default run, ≤ 20 minutes", None),), skip="12 minutes a seed"),
        Script("algorithms.py", (), (Figure("every algorithm raises the score", None),), skip="hours"),
    )


def read_saving(report: Any) -> float:
    """Measured bytes of state, gradients and activations, as a share of PPO's."""
    return float(report["measured"]["all"]["saved_by_remax"]["ppo"]["sum_bytes"])


def read_held(report: Any) -> float:
    """Bytes of the fuller of two ranks, of one that is alone."""
    alone, two = (arm["held_bytes"] for arm in report["arms"])
    return float(max(two) / max(alone))


def read_faults(report: Any) -> float:
    """All that a drill may not find."""
    return float(sum(report["totals"]["must be 0"].values()))


def read_nothing(name: str) -> Read:
    return lambda report: float(report["summary"]["nothing"][name]["wall_s"])


def read_start(stage: str) -> Read:
    return lambda report: float(report["summary"]["stages"][stage]["moments"]["first work"])


def read_async(name: str) -> Read:
    return lambda report: float(report["summary"]["async 1, drain"][name])


def read_throughput(name: str) -> Read:
    return lambda report: next(float(arm["ratio"]) for key, arm in report["arms"].items() if key.startswith(name))


def read_trl(side: str) -> Read:
    def read(report: Any) -> float:
        (arms,) = report["rounds"]
        return float(arms[f"12/grpo/{side}"]["samples_per_s"] / arms["12/grpo/trl"]["samples_per_s"])

    return read


def read_growth(report: Any) -> float:
    """Of the peak, without what the larger embeddings themselves need."""
    small, large = (report["arms"][f"chunked, 12, {words}"] for words in (32_000, 128_000))
    peaks = [max(arm["peak_bytes"].values()) for arm in (small, large)]
    own = sum(large["own_bytes"].values()) - sum(small["own_bytes"].values())
    return float((peaks[1] - own) / peaks[0])


def read_error(report: Any) -> float:
    """The largest of any rank's."""
    measured = report["configurations"].values()
    return max(
        abs(estimate / peak - 1)
        for item in measured
        for estimate, peak in zip(item["estimated_bytes"], item["peak_bytes"], strict=True)
    )
