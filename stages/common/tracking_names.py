"""Names that MLflow's store has for what is ours, within the characters and lengths it allows."""

import re

from stages.common.hashing import hash_text

REGISTERED_MODEL = "slipstream-policy"
"""The registered model whose versions are policies."""
PIPELINE_TAG = "slipstream.pipeline"
RUN_KEY_TAG = "slipstream.run_key"
STAGE_TAG = "slipstream.stage"
PARENT_TAG = "mlflow.parentRunId"
COMMIT_TAG = "mlflow.source.git.commit"
OUT_PREFIX = "dvc.out."
"""Then the path of an out; the value is its DVC hash."""
STAGE_PREFIX = "stage."
"""Then a stage; at a pipeline's run, the value is the run that made the stage's outs."""
MODELS = {"artifacts/sft": "sft", "artifacts/reward": "reward", "artifacts/policy": "policy"}
"""The outs that are shown as models, and under which name."""
MAX_NAME = 250
_FORBIDDEN = re.compile(r"[^\w./: -]", re.ASCII)
_NOT_PLAIN = re.compile(r"//|(^|/)\.{1,2}(/|$)|/$|^/")


def out_tag(path: str) -> str:
    """The tag that holds the DVC hash of an out."""
    return safe_name(OUT_PREFIX + path)


def stage_tag(stage: str) -> str:
    """The tag of a pipeline's run that names the run of one stage."""
    return safe_name(STAGE_PREFIX + stage)


def safe_name(name: str) -> str:
    """The name itself if MLflow takes it; else a readable part of it and a hash of the whole."""
    if len(name) <= MAX_NAME and not _FORBIDDEN.search(name) and not _NOT_PLAIN.search(name):
        return name
    readable = _FORBIDDEN.sub("_", name).replace("/", "_")
    return f"{readable[: MAX_NAME - 9]}-{hash_text(name)[:8]}"
