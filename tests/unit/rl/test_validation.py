from stages.rl.validation import Evaluation, is_better


def evaluation(score: float, kl_nats: float) -> Evaluation:
    return Evaluation(1, score=score, kl_nats=kl_nats, completion_tokens=20.0, finished_fraction=1.0)


def test_the_best_checkpoint_has_the_highest_score_within_the_kl_limit() -> None:
    assert is_better(evaluation(1.0, 7.9), None, max_kl_nats=8.0)
    assert is_better(evaluation(1.1, 7.9), evaluation(1.0, 1.0), max_kl_nats=8.0)
    assert not is_better(evaluation(0.9, 1.0), evaluation(1.0, 7.9), max_kl_nats=8.0)
    assert not is_better(evaluation(9.0, 8.1), evaluation(1.0, 1.0), max_kl_nats=8.0)
    assert not is_better(evaluation(9.0, float("nan")), evaluation(1.0, 1.0), max_kl_nats=8.0)
