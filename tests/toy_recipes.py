"""A recipe at toy size: its own settings and architecture, two layers of random weights, a few made-up rows.

What toy means is all in `shrink`, `write_rows` and toy_models.py; everything else is the recipe's.
"""

import contextlib
import importlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from stages.models.config import HubSource, ModelConfig, PackageSource
from tests.toy_models import save_toy_classifier, save_toy_model

ROOT = Path(__file__).parents[1]
STAGES = tuple(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
NUM_ROWS = 40
Params = dict[str, Any]


def run_toy_recipe(recipe: Path, directory: Path) -> None:
    """All stages, one after the other, in this process."""
    make_toy_recipe(recipe, directory)
    with contextlib.chdir(directory):
        for stage in STAGES:
            importlib.import_module(f"stages.{stage}").main()


def make_toy_recipe(recipe: Path, directory: Path) -> None:
    """Fill a directory in which the recipe's stages can run."""
    params: Params = yaml.safe_load(recipe.read_text())
    model = ModelConfig.model_validate(params["model"])
    (directory / "inputs/ledger").mkdir(parents=True)
    (directory / "stages").symlink_to(ROOT / "stages")
    shutil.copy(ROOT / "dvc.yaml", directory)
    with_template = model.chat_template == "own"
    save_toy_model(_name(model), directory / "inputs/model/base", with_template=with_template)
    if gold := find_gold(params):
        save_toy_model(_name(model), directory / gold, seed=1, with_template=with_template, num_labels=1)
    if classifier := params["reward"].get("classifier"):
        save_toy_classifier(directory / classifier["path"], seed=2)
    write_rows(params["data"]["task"], directory)
    shrink(params)
    (directory / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def _name(model: ModelConfig) -> str:
    source = model.source
    assert isinstance(source, PackageSource | HubSource), source
    return source.file if isinstance(source, PackageSource) else source.repo


def shrink(params: Params) -> None:
    """Few updates of few short samples, in this process, at a learning rate that random weights learn with."""
    params["model"]["source"] = {"kind": "path", "path": "inputs/model/base"}
    if params["data"]["task"]["name"] == "reviews":
        params["data"]["task"] |= {"num_prompts": 28, "num_demonstrations": 16}
    params["data"] |= {"num_validation_prompts": 8, "num_heldout_prompts": 6}
    params["generation"] |= {"engine": "transformers", "max_new_tokens": 8, "max_prompt_tokens": 260, "engine_args": []}
    params["sft"] |= {"num_epochs": 8, "batch_size": 8, "max_tokens": 300, "checkpoint_every": 8}
    params["reward"] |= {"num_epochs": 1, "batch_size": 8, "max_tokens": 300, "checkpoint_every": 2}
    params["rl"] |= {
        "num_updates": 2,
        "prompts_per_update": 4,
        "eval_every": 2,
        "num_eval_prompts": 4,
        "checkpoint_every": 2,
        "score_on": "learner",
        "learner_devices": "0",
        "generator": {"replicas": 1, "devices": ["0"]},
    }
    for section, lr in (("sft", 1e-2), ("reward", 1e-3), ("rl", 1e-3)):
        learner = params[section]["learner"]
        learner |= {"lr": lr, "micro_batch_tokens": 1024}
        if learner["trainable_layers"] != "all":
            learner["trainable_layers"] = 1
    params["judge"] |= {"num_shown": 2, "model": None}
    params["tracking"]["system_metrics"] = False


def find_gold(params: Params) -> str | None:
    """Where the recipe wants a gold reward model."""
    gold = params["data"]["task"].get("gold") or {}
    return gold["path"] if gold.get("name") == "model" else None


def write_rows(task: Params, directory: Path) -> None:
    """The file that the task reads, with made-up rows; a task that makes its own data needs none."""
    if "source" not in task:
        return
    draw, make_row = random.Random(0), MAKERS[task["name"]]
    path = directory / task["source"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(make_row(number, draw)) for number in range(NUM_ROWS)))


def _make_pair(number: int, draw: random.Random) -> dict[str, str]:
    chosen, rejected = draw.sample([" yes", " good", " no", " bad"], 2)
    return {"prompt": f"\n\nHuman: {number}?\n\nAssistant:", "chosen": chosen, "rejected": rejected}


def _make_instruction(number: int, draw: random.Random) -> dict[str, str]:
    return {"prompt": f"film {number} was", "completion": draw.choice([" good", " bad", " great", " awful"])}


def _make_problem(number: int, draw: random.Random) -> dict[str, str]:
    return {"question": f"{number}?", "answer": f"#### {draw.choice('12')}"}


MAKERS: dict[str, Callable[[int, random.Random], dict[str, str]]] = {
    "pairs": _make_pair,
    "instructions": _make_instruction,
    "problems": _make_problem,
}
