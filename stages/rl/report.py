"""What the RL stage reports in metrics/policy.json."""

from stages.rl.loop import Progress


def summarise(progress: Progress, num_updates: int) -> dict[str, float]:
    """Updates, samples, validation scores before and after, KL of the kept policy, seconds by phase."""
    first, best, last = progress.first, progress.best, progress.last
    assert first is not None
    assert best is not None
    assert last is not None
    return {
        "updates": num_updates,
        "samples_total": progress.num_samples,
        "score_first": first.score,
        "score_last": last.score,
        "score_best": best.score,
        "best_policy_version": best.policy_version,
        "kl_nats": best.kl_nats,
        "kl_nats_last": last.kl_nats,
        **progress.seconds,
    }
