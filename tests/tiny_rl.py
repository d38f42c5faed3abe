"""An RL run on two-layer models: real learner, generator, scoring and ledger. As a script, to be killed by tests:

python -m tests.tiny_rl DIRECTORY SETTINGS_AS_JSON
"""

import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from stages.common.entry import run_entry
from stages.data.prepare import PreparedData, SplitData
from stages.data.records import Message, Prompt
from stages.data.store import write_task_data
from stages.data.tasks.task import make_prompt
from stages.data.text import encode_prompt
from stages.generation.config import GenerationConfig
from stages.models.load import load_policy, load_tokenizer, save_model
from stages.models.reward_model import init_reward_model
from stages.rl.config import RlConfig
from stages.rl.train import PolicyInputs, PolicyOutputs, Result, train_policy
from tests.tiny import save_tiny_model

EOS_LOGIT = 4.0
"""The other 258 logits lie near 0, so a token is the last one with probability 0.17."""
SETTINGS: dict[str, Any] = {
    "algorithm": {"name": "online_dpo", "samples_per_prompt": 3},
    "learner": {"lr": 0.0003, "dtype": "fp32", "micro_batch_tokens": 256},
    "num_updates": 6,
    "prompts_per_update": 3,
    "max_staleness": 0,
    "eval_every": 3,
    "num_eval_prompts": 3,
    "checkpoint_every": 2,
    "max_kl_nats": 1000.0,
    "learner_devices": "0",
    "generator": {"devices": ["0"]},
}
GENERATION = GenerationConfig(
    engine="transformers", temperature=0.8, max_new_tokens=8, max_prompt_tokens=64, dtype="fp32", max_num_seqs=16
)

STEPS = "steps.txt"


def make_inputs(directory: Path, head_dim: int = 8) -> PolicyInputs:
    """Ten prompts, an SFT and a reward model; made once."""
    inputs = PolicyInputs(directory / "data", directory / "sft", directory / "reward")
    if not inputs.reward.exists():
        prompts = [make_prompt([Message("user", f"number {index}")], f"g{index}") for index in range(14)]
        splits = {"train": prompts[:10], "validation": prompts[10:], "heldout": []}
        data = {split: SplitData(list(items), [], None) for split, items in splits.items()}
        inputs.data.mkdir(parents=True)
        write_task_data(inputs.data, PreparedData(data, 14, 0, 0, 0, 0))  # type: ignore[arg-type]
        save_tiny_model(inputs.sft, head_dim=head_dim)
        _make_ends_likely(inputs.sft, prompts)
        reward = init_reward_model(inputs.sft, torch.float32, seed=1)
        save_model(reward, load_tokenizer(inputs.sft), inputs.reward)
    return inputs


def _make_ends_likely(sft: Path, prompts: list[Prompt]) -> None:
    """Fit the end-of-sequence embedding to the hidden states of completions, so that most end by themselves."""
    model, tokenizer = load_policy(sft, torch.float32), load_tokenizer(sft)
    rows = [[*encode_prompt(tokenizer, prompt), *range(40 + index, 46 + index)] for index, prompt in enumerate(prompts)]
    with torch.no_grad():
        hidden = torch.cat([model.model(torch.tensor([row])).last_hidden_state[0, -7:] for row in rows])  # [N, H]
        fitted = torch.linalg.lstsq(hidden, torch.full((len(hidden), 1), EOS_LOGIT)).solution[:, 0]
        model.get_input_embeddings().weight[model.config.eos_token_id] = fitted
    save_model(model, tokenizer, sft)


def read_steps(directory: Path) -> list[int]:
    """Steps that metrics were logged for, in order."""
    return [int(line) for line in (directory / STEPS).read_text().splitlines()]


def read_prompt_list(directory: Path) -> list[Prompt]:
    """The training prompts, in the order of the file."""
    from stages.data.store import read_prompts

    return read_prompts(directory / "data", "train")


def run(
    directory: Path, generation: GenerationConfig = GENERATION, stop_after: int | None = None, **settings: Any
) -> Result:
    """Train in `directory`/work, resuming what is there, and publish into `directory`/out.

    With `stop_after`, SIGTERM comes right after that update.
    """
    inputs = make_inputs(directory)
    config = RlConfig.model_validate(SETTINGS | settings)
    work, out = directory / "work", directory / "out"
    work.mkdir(exist_ok=True)
    outputs = PolicyOutputs(out / "policy", out / "policy_last", out / "ledger", out / "checkpoints")
    with (directory / STEPS).open("a", buffering=1) as steps:

        def log_metrics(_: dict[str, float], step: int) -> None:
            print(step, file=steps)
            if step == stop_after:
                signal.raise_signal(signal.SIGTERM)

        return train_policy(inputs, config, generation, work, outputs, log_metrics)


def hash_policy(directory: Path, name: str = "policy_last") -> str:
    """sha256 of the trained weights."""
    return hashlib.sha256((directory / "out" / name / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    settings = json.loads(sys.argv[2])
    generation = GENERATION.model_copy(update=settings.pop("generation", {}))
    run(Path(sys.argv[1]), generation, **settings)


if __name__ == "__main__":
    run_entry(main)
