"""The whole pipeline as one Prefect flow. Prefect decides when, DVC decides whether."""

from prefect import State, flow, task
from prefect.states import Completed

from flows.dvc import allow_start, reproduce, stop_all

STAGES = (
    "prepare_model",
    "prepare_data",
    "train_sft",
    "label_pairs",
    "train_reward",
    "train_policy",
    "sample_policy",
    "judge_policy",
)


@task(task_run_name="{stage}")
def run_stage(stage: str) -> State[None]:
    """Bring one stage of dvc.yaml up to date; Prefect shows one that did not run as Cached."""
    result = reproduce(stage)
    return Completed(name=None if result.ran else "Cached")


@flow(name="rlhf")
def rlhf(stages: tuple[str, ...] = STAGES) -> None:
    """Prompts and preferences in, a judged policy out."""
    allow_start()
    try:
        for stage in stages:
            run_stage(stage)
    except BaseException:
        stop_all()  # a cancelled flow would otherwise wait for the training to end
        raise
