"""One of TRL's arms for trl_throughput.py, in TRL's environment: a trainer as it is, with a clock around its parts."""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

PHASES = ("generate", "score", "reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", help="as JSON; see trl_throughput.py")
    job = json.loads(parser.parse_args().job)
    reward = Reward(Path(job["reward"]), job["trl_attention"])
    scores = reward.score(json.loads(Path(job["to_score"]).read_text()))
    with tempfile.TemporaryDirectory(prefix="trl-throughput-") as output:
        clock = Clock()
        trainer = make_trainer(job, reward, output)
        freeze_lower_layers(trainer.model, job["layers"])
        watch(trainer, clock)
        trainer.add_callback(clock)
        trainer.train()
    print(json.dumps(clock.measure(job) | reward.measure() | {"scores": scores, "threads": torch.get_num_threads()}))


def make_trainer(job: dict[str, Any], reward: "Reward", output: str) -> Any:
    """The algorithm's trainer; all that costs time and changes no result is off."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    prompts = json.loads(Path(job["prompts"]).read_text())
    reward.learn_prompts(tokenizer, prompts)
    num_prompts = job["completions"] // job["samples"]
    dataset = Dataset.from_list([{"prompt": item["text"]} for item in prompts[: num_prompts * job["updates"]]])
    common = {"reward_funcs": reward, "train_dataset": dataset, "processing_class": tokenizer}
    settings = make_settings(job, output)
    if job["algorithm"] == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        args = OnlineDPOConfig(
            per_device_train_batch_size=num_prompts,
            max_new_tokens=job["tokens"],
            beta=0.1,
            loss_type="sigmoid",
            train_sampling_strategy="sequential",
            **settings,
        )
        models = {"model": load_policy(job), "ref_model": load_policy(job).requires_grad_(False)}
        return OnlineDPOTrainer(**models, args=args, **common)
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    settings |= {
        "per_device_train_batch_size": job["completions"] // job["trl_micro_batches"],
        "gradient_accumulation_steps": job["trl_micro_batches"],
        "num_generations": job["samples"],
        "max_completion_length": job["tokens"],
        "shuffle_dataset": False,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": job["trl_attention"]},
    }
    if job["algorithm"] == "rloo":
        return RLOOTrainer(model=job["model"], args=RLOOConfig(beta=0.05, epsilon=0.2, **settings), **common)
    grpo = {"beta": 0.04, "epsilon": 0.2, "loss_type": "grpo", "use_bias_correction_kl": False}
    return GRPOTrainer(model=job["model"], args=GRPOConfig(**grpo, **settings), **common)


def make_settings(job: dict[str, Any], output: str) -> dict[str, Any]:
    """What all three trainers share."""
    return {
        "output_dir": output,
        "max_steps": job["updates"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "bf16": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def load_policy(job: dict[str, Any]) -> Any:
    """The SFT model in float32."""
    return AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation=job["trl_attention"]
    )


def freeze_lower_layers(model: Any, layers: str) -> None:
    """Leave the top blocks and the norm after them trainable, as `rl.learner.trainable_layers` does."""
    if layers == "all":
        return
    model.requires_grad_(False)
    for block in model.model.layers[-int(layers) :]:
        block.requires_grad_(True)
    model.model.norm.requires_grad_(True)


class Reward:
    """Our reward model as a reward function: token ids in, the score at each completion's last token out.

    TRL's own wrapper encodes the decoded text again, without its special tokens. Work is the same: one padded batch.
    """

    __name__ = "reward"

    def __init__(self, path: Path, attention: str) -> None:
        settings = {"dtype": torch.bfloat16, "attn_implementation": attention}
        self._model = AutoModelForSequenceClassification.from_pretrained(path, **settings).eval()
        self._prompt_ids: dict[str, list[int]] = {}
        self._lengths: list[int] = []

    def learn_prompts(self, tokenizer: Any, prompts: Sequence[dict[str, Any]]) -> None:
        """Token ids of the prompts; the tokenizer must give those that our side has."""
        self._prompt_ids = {item["text"]: item["ids"] for item in prompts}
        for text, ids in self._prompt_ids.items():
            if tokenizer(text)["input_ids"] != ids:
                raise ValueError(f"TRL's tokenizer reads another prompt than ours: {text!r}")

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        self._lengths += [len(ids) for ids in completion_ids]
        return self.score([(self._prompt_ids[text], ids) for text, ids in zip(prompts, completion_ids, strict=True)])

    @torch.inference_mode()
    def score(self, rows: Sequence[Sequence[Sequence[int]]]) -> list[float]:
        """Shifted scores of (prompt ids, completion ids)."""
        sequences = [torch.tensor([*prompt_ids, *token_ids]) for prompt_ids, token_ids in rows]
        ids = pad_sequence(sequences, batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        hidden = self._model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows)), lengths - 1].float()
        scores: list[float] = (last @ self._model.score.weight[0].float() - self._model.config.score_shift).tolist()
        return scores

    def measure(self) -> dict[str, float]:
        """Mean length of the completions that were scored."""
        return {"mean_tokens": sum(self._lengths) / len(self._lengths)}


class Clock(TrainerCallback):
    """When updates ended, and when the parts of the trainer ran."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._cpu_ends: list[float] = []
        self._spans: dict[str, list[tuple[float, float]]] = {phase: [] for phase in PHASES}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """See `TrainerCallback`; the optimizer has made its step."""
        self._ends.append(time.monotonic())
        self._cpu_ends.append(time.process_time())

    def around(self, phase: str, function: Callable[..., Any], without_gradient: bool = False) -> Callable[..., Any]:
        """The function, timed; with `without_gradient` only where gradients are off."""

        @functools.wraps(function)
        def timed(*arguments: Any, **settings: Any) -> Any:
            started, counts = time.monotonic(), not (without_gradient and torch.is_grad_enabled())
            try:
                return function(*arguments, **settings)
            finally:
                if counts:
                    self._spans[phase].append((started, time.monotonic()))

        return timed

    def measure(self, job: dict[str, Any]) -> dict[str, float]:
        """Seconds per update between the ends of the last warm-up update and of the last one."""
        begin, end, num = self._ends[job["warm_up"] - 1], self._ends[-1], job["updates"] - job["warm_up"]
        seconds = {
            f"{phase}_s": sum(max(0.0, min(ended, end) - max(started, begin)) for started, ended in spans) / num
            for phase, spans in self._spans.items()
        }
        wall_s = (end - begin) / num
        rest = {"learn_s": wall_s - sum(seconds.values()), "publish_s": 0.0, "wait_s": 0.0}
        cpu_s = (self._cpu_ends[-1] - self._cpu_ends[job["warm_up"] - 1]) / num
        speed = {"wall_s": wall_s, "cpu_s": cpu_s, "samples_per_s": job["completions"] / wall_s}
        return speed | seconds | rest


def watch(trainer: Any, clock: Clock) -> None:
    """Put the clock around what a trainer calls for generation, scoring, and log-probabilities without gradient."""
    trainer._generate = clock.around("generate", trainer._generate)
    if hasattr(trainer, "_get_per_token_logps_and_entropies"):
        trainer._calculate_rewards = clock.around("score", trainer._calculate_rewards)
        compute = trainer._get_per_token_logps_and_entropies
        trainer._get_per_token_logps_and_entropies = clock.around("reference", compute, without_gradient=True)
    else:
        trainer._calculate_rewards_from_functions = clock.around("score", trainer._calculate_rewards_from_functions)
        trainer._forward = clock.around("reference", trainer._forward, without_gradient=True)


if __name__ == "__main__":
    main()
