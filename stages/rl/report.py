"""What the RL stage reports in metrics/policy.json."""

from typing import Any

from stages.rl.offline import OfflineResult
from stages.rl.timeline import Timeline, summarise_timeline
from stages.rl.train import Result

REASONS = ("replica_lost", "timeout", "unusable_answer", "stale", "no_signal")
"""Why an attempt or a group was not trained on; see docs/ledger.md."""


def summarise(result: Result, num_updates: int) -> dict[str, Any]:
    """Updates, samples, validation scores, KL of the kept policy, staleness, what was dropped, seconds by role."""
    progress, timeline = result.progress, result.timeline
    first, best, last = progress.first, progress.best, progress.last
    assert first is not None
    assert best is not None
    assert last is not None
    trained = progress.staleness.total()
    return {
        "updates": num_updates,
        "num_prompts_too_long": result.num_prompts_too_long,
        "samples_total": progress.num_samples,
        "score_first": first.score,
        "score_last": last.score,
        "score_best": best.score,
        "best_policy_version": best.policy_version,
        "kl_nats": best.kl_nats,
        "kl_nats_last": last.kl_nats,
        "staleness_mean": sum(value * count for value, count in progress.staleness.items()) / trained,
        "staleness_max": max(progress.staleness),
        "staleness_histogram": {str(value): count for value, count in sorted(progress.staleness.items())},
        "samples_dropped": {reason: result.dropped.get(reason, 0) for reason in REASONS},
        "publish_bytes": result.publish_bytes,
        **summarise_timeline(timeline.totals(), timeline.elapsed_s),
    }


def summarise_offline(result: OfflineResult, timeline: Timeline, num_updates: int) -> dict[str, Any]:
    """Updates, pairs, validation loss, accuracy and margin of the kept policy, seconds; no sample, so no score."""
    first, best, last = result.first, result.best, result.last
    return {
        "updates": num_updates,
        "samples_total": 0,
        "num_pairs": result.num_pairs,
        "num_pairs_dropped": result.lengths.num_dropped,
        "num_pairs_truncated": result.lengths.num_truncated,
        "num_validation_pairs": result.num_validation_pairs,
        "validation_loss_first": first.loss,
        "validation_loss_last": last.loss,
        "validation_loss_best": best.loss,
        "best_policy_version": best.policy_version,
        "validation_accuracy": best.accuracy,
        "validation_margin": best.margin,
        **summarise_timeline(timeline.totals(), timeline.elapsed_s),
    }
