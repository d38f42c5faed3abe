"""A plan as plain text."""

from collections.abc import Iterator, Sequence

from stages.plan.architecture import Architecture
from stages.plan.batches import PlannedRollout, RunPlan, count_passes
from stages.plan.checks import Finding
from stages.plan.devices import GIB, Devices
from stages.plan.disk import DiskItem
from stages.plan.processes import Process, sum_loads
from stages.plan.settings import Settings

NUM_ROLLOUTS = 3
"""First rollouts that are shown; then the last one."""
_MEMORY = ("stage", "process", "on", "weights", "optimizer", "gradients", "activations", "cache", "offloaded", "needs")


def show_model(policy: Architecture) -> Iterator[str]:
    """Shape and size of the policy."""
    yield (
        f"model: {policy.num_parameters / 1e6:,.1f}M parameters, {policy.num_layers} layers, hidden size "
        f"{policy.hidden_size}, vocabulary {policy.vocabulary:,} ({policy.source})"
    )


def show_batches(settings: Settings, run: RunPlan, num_train_prompts: int | None) -> Iterator[str]:
    """What an update and the whole run are made of.

    Args:
        settings: all sections.
        run: the counts.
        num_train_prompts: None if the data is not prepared yet.
    """
    config, update = settings.rl, run.update
    yield f"RL by {config.algorithm.name}"
    rows = [("an update", _describe_update(update.num_prompts, update.num_sampled, update.num_trained, run))]
    longest = settings.reward.max_tokens if config.is_offline else settings.longest
    unit = update.rows_per_unit * longest
    num_micro = -(-update.num_units // max(1, config.learner.micro_batch_tokens // unit))
    sampled = f"{update.num_sampled * settings.generation.max_new_tokens:,} sampled, " if update.num_sampled else ""
    trained = f"{update.num_trained * longest:,} trained, prompts included, in {num_micro:,} micro-batches"
    rows.append(("its tokens", f"at most {sampled}{trained}"))
    shape = f"{run.num_updates:,} updates, {run.num_evaluations} evaluations"
    if run.rollouts:
        cycle = f"U={config.rule.cycle} updates each: N={config.updates_per_rollout}, T={config.epochs_per_rollout}"
        shape += f", {len(run.rollouts):,} rollouts ({cycle})"
    passes = count_passes(run.num_prompts, num_train_prompts)
    known = "how many there are is known after prepare_data" if passes is None else f"{passes:.2f} passes"
    if config.is_offline:
        known = "passes are known after label_pairs"
    completions = f", {run.num_completions:,} completions" if run.num_completions else ""
    noun = "pairs" if config.is_offline else "prompts"
    rows += [("the run", shape), (f"its {noun}", f"{run.num_prompts:,}{completions}: {known}")]
    yield from _indent(rows)
    if run.rollouts:
        yield from _show_staleness(settings, run)


def show_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """Checks, the worst first."""
    order = ("wrong", "note", "not checked", "ok")
    yield "checks"
    yield from _indent([(item.verdict, item.text) for item in sorted(findings, key=lambda f: order.index(f.verdict))])


def show_memory(settings: Settings, processes: Sequence[Process], devices: Devices) -> Iterator[str]:
    """A row for each process, and whether all that run at once fit."""
    yield f"memory in GiB, at most, on {devices.describe()}"
    rows = [_MEMORY]
    before = None
    for item in processes:
        parts = item.parts
        sizes = (
            parts.weights,
            parts.optimizer,
            parts.gradients,
            parts.activations,
            parts.cache,
            parts.host,
            item.needs,
        )
        stage = item.stage if item.stage != before else ""
        rows.append((stage, item.name, item.device, *(_gib(size) for size in sizes)))  # type: ignore[arg-type]
        before = item.stage
    yield from _table(rows, num_left=3)
    yield from _show_loads(processes, devices)
    yield from _show_sequences(processes, settings.generation.max_num_seqs)


def show_disk(items: Sequence[DiskItem], free_bytes: float | None) -> Iterator[str]:
    """What is written, and whether there is room.

    Args:
        items: files and directories.
        free_bytes: on this machine's disk; None if the plan is for another one.
    """
    total = sum(item.num_bytes for item in items)
    free = "" if free_bytes is None else f", {_gib(free_bytes)} free here"
    yield f"disk in GiB: {_gib(total)} at most{free}"
    yield from _table(
        [
            (item.path, _gib(item.num_bytes), item.what + (" (while it runs)" if item.is_temporary else ""))
            for item in items
        ]
    )
    if free_bytes is not None and total > free_bytes:
        yield f"  does not fit: {_gib(total - free_bytes)} GiB are missing"


def show_stages(rows: Sequence[tuple[str, str, str]], place: str) -> Iterator[str]:
    """What DVC would do.

    Args:
        rows: stage, verdict, reason.
        place: the checkout, or a recipe's workspace.
    """
    yield f"stages in {place}"
    yield from _table(rows)


def fits(processes: Sequence[Process], items: Sequence[DiskItem], devices: Devices, free_bytes: float | None) -> bool:
    """Whether every device holds what runs on it at once, and the disk what is written."""
    is_small = free_bytes is None or sum(item.num_bytes for item in items) <= free_bytes
    return is_small and all(load.needs <= devices.memory_bytes for load in sum_loads(processes))


def _describe_update(num_prompts: int, num_sampled: int, num_trained: int, run: RunPlan) -> str:
    if not num_sampled:
        return f"{num_prompts:,} pairs"
    kind = {1: "completions", 2: "pairs"}.get(run.update.rows_per_unit, "prompts' samples")
    trained = f"{num_trained:,} trained as {run.update.num_units:,} {kind}"
    return f"{num_prompts:,} prompts, {num_sampled:,} completions sampled, {trained}"


def _show_staleness(settings: Settings, run: RunPlan) -> Iterator[str]:
    least, most = run.staleness[0], run.staleness[-1]
    bound = settings.rl.max_staleness
    yield f"  staleness {least} to {most} updates, bound {bound}; if sampled as early as the bound allows:"
    shown = list(run.rollouts[:NUM_ROLLOUTS])
    if len(run.rollouts) > NUM_ROLLOUTS:
        shown.append(run.rollouts[-1])
    yield from _table(
        [("rollout", "sampled by version", "trained by updates", "staleness"), *(_rollout_row(item) for item in shown)],
        indent=4,
    )


def _rollout_row(rollout: PlannedRollout) -> tuple[str, str, str, str]:
    return (
        str(rollout.number),
        str(rollout.version),
        _span(rollout.updates),
        _span(rollout.staleness),
    )


def _show_loads(processes: Sequence[Process], devices: Devices) -> Iterator[str]:
    """The fullest moment of each stage that does not fit, or of the fullest one."""
    loads = sum_loads(processes)
    wrong = [load for load in loads if load.needs > devices.memory_bytes]
    for load in wrong:
        yield (
            f"  does not fit: {load.stage} needs {_gib(load.needs)} GiB of {load.device}, "
            f"which has {_gib(devices.memory_bytes)}"
        )
    if loads and not wrong:
        fullest = max(loads, key=lambda load: load.needs)
        yield (
            f"  fits: the fullest is {fullest.device} in {fullest.stage}, {_gib(fullest.needs)} of "
            f"{_gib(devices.memory_bytes)} GiB"
        )


def _show_sequences(processes: Sequence[Process], max_num_seqs: int) -> Iterator[str]:
    """What the smallest cache of a generator holds."""
    known = [item.full_sequences for item in processes if item.full_sequences is not None]
    if known:
        some = f"a generator's cache holds {min(known):,} completions of full length"
        yield f"  {some}; generation.max_num_seqs={max_num_seqs}"


def _span(values: range) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}"


def _indent(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows)
    yield from (f"  {name:<{width}}  {text}" for name, text in rows)


def _table(rows: Sequence[Sequence[str]], num_left: int | None = None, indent: int = 2) -> Iterator[str]:
    """Columns of one width each; those after the first `num_left` are aligned at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if num_left is None or column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"{' ' * indent}{'  '.join(cells)}".rstrip()
