"""Length-controlled win-rates of runs that are compared: several policies are what instruction terms are fitted to."""

from collections.abc import Sequence
from dataclasses import replace

from stages.judge.compared_run import ComparedRun
from stages.judge.evaluate import select_numbers
from stages.judge.length_control import MIN_POLICIES, LengthSample, fit_instruction_terms, measure_sample

SEED = 0
"""Of the bootstrap."""

Opponents = frozenset[tuple[tuple[str, int], str]]


def add_length_control(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs, with `llm_length_controlled_win_rate` where it can be had.

    AlpacaEval 2's rate needs a term for each instruction, which takes three policies that one judge compared with the
    very same completions. Where runs are fewer, or their opponents differ, they stay as they are.
    """
    groups: dict[tuple[str | None, tuple[str, ...], Opponents], list[int]] = {}
    for index, run in enumerate(runs):
        if run.verdicts:
            groups.setdefault((run.judge_model, run.judge_settings, _list_opponents(run)), []).append(index)
    found = list(runs)
    for members in groups.values():
        samples = [_collect(runs[index]) for index in members]
        shared = set.intersection(*(set(sample.prompt_ids) for sample in samples))
        if len(members) < MIN_POLICIES or not shared:
            continue
        terms = fit_instruction_terms(samples)
        for index, sample in zip(members, samples, strict=True):
            numbers = select_numbers(measure_sample(sample, SEED, terms))
            found[index] = replace(runs[index], metrics={**runs[index].metrics, **numbers})
    return found


def _list_opponents(run: ComparedRun) -> Opponents:
    return frozenset((key, row.opponent) for key, row in run.verdicts.items())


def _collect(run: ComparedRun) -> LengthSample:
    judged = [(key, row) for key, row in run.verdicts.items() if row.win is not None and key in run.samples]
    return LengthSample(
        prompt_ids=tuple(prompt_id for (prompt_id, _), _ in judged),
        wins=tuple(float(row.win) for _, row in judged if row.win is not None),
        length_differences=tuple(len(run.samples[key].policy) - len(row.opponent) for key, row in judged),
    )
