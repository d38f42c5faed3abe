"""TRL's half of the RL comparison in bench/trl_agreement.py: its trainers on the mini-batch that our half recorded.

The trainers run their own code from the scoring of completions to the backward pass. Replaced are the generator, which
gives the recorded completions, the reward, which gives the recorded scores, and the weights: those of the recorded
older policy while completions are generated, the learner's after that.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from agreement import (
    RL_TENSOR_TOLERANCE,
    Comparison,
    Gradients,
    Recorded,
    compare_gradients,
    compare_numbers,
    compare_tensors,
    take_gradients,
)
from torch import Tensor
from trl_settings import load_trl_tokenizer, trainer_settings

NO_CLIP = 1e9
"""A clip range that nothing leaves."""

Row = dict[str, Any]
"""A recorded completion with its score."""


@dataclass(frozen=True)
class Arm:
    """One way to set up a TRL trainer, and which of our losses it is held against."""

    name: str
    ours: str
    settings: dict[str, Any]
    num_micro_batches: int = 1
    older: str = "sampler"
    """Whose weights the trainer has while it generates."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Set on the trainer after it was built."""
    same_loss: bool = True
    same_gradients: bool = True
    controls: tuple[tuple[str, str], ...] = ()
    """Names and keys of our losses that the trainer's must differ from."""


@dataclass(frozen=True)
class Family:
    """A TRL trainer whose generator can be replaced."""

    trainer: Any
    config: Any
    generate: Callable[[list[Row]], tuple[Any, ...]]
    """What the trainer's `_generate` returns for the recorded completions."""


@dataclass(frozen=True)
class Update:
    """What one update of a trainer is made of."""

    loss: float
    gradients: Gradients
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Completion after completion. [N], or [N, T] before they are whitened"""


# GRPO and RLOO

GRPO = {"beta": 0.04, "epsilon": 0.2, "num_iterations": 2, "loss_type": "grpo", "use_bias_correction_kl": False}
"""With 2 iterations TRL keeps the log-probabilities of the policy that generated."""
RLOO = {"beta": 0.05, "epsilon": 0.2}
VLLM = {
    "use_vllm": True,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_clip_max": 2.0,
}

GRPO_ARMS = (
    Arm(
        "GRPO",
        "grpo",
        GRPO,
        controls=(
            ("our GRPO by token", "grpo_per_token"),
            ("our GRPO without KL", "grpo_without_kl"),
            ("our GRPO at temperature 1", "grpo_at_1"),
            ("our GRPO, decoupled", "grpo_decoupled"),
        ),
    ),
    Arm("GRPO, 4 micro-batches", "grpo", GRPO, num_micro_batches=4),
    Arm("GRPO by token (TRL: dapo), 4 micro-batches", "grpo_per_token", {**GRPO, "loss_type": "dapo"}, 4),
    Arm(
        "Dr. GRPO, 4 micro-batches",
        "dr_grpo",
        {**GRPO, "loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
        num_micro_batches=4,
    ),
    Arm("GRPO, decoupled (TRL: vLLM's correction)", "grpo_decoupled", GRPO, 1, "proximal", VLLM),
    Arm(
        "GRPO, TRL weights the KL by the ratio",
        "grpo",
        {**GRPO, "use_bias_correction_kl": True},
        same_loss=False,
        same_gradients=False,
    ),
)
RLOO_ARMS = (
    Arm(
        "proximal RLOO",
        "proximal_rloo",
        RLOO,
        controls=(
            ("our proximal RLOO without KL", "proximal_rloo_without_kl"),
            ("our proximal RLOO at temperature 1", "proximal_rloo_at_1"),
        ),
    ),
    Arm("proximal RLOO, 4 micro-batches", "proximal_rloo", RLOO, num_micro_batches=4),
    Arm(
        "RLOO with sequence_tis (TRL: no clip)",
        "rloo",
        {**RLOO, "epsilon": NO_CLIP},
        same_loss=False,
        controls=(("our RLOO with token_tis", "rloo_token_tis"),),
    ),
)


def compare_grpo(recorded: Recorded) -> Iterator[Comparison]:
    """GRPOTrainer as GRPO, by token, as Dr. GRPO, decoupled, and with its own KL."""
    from trl import GRPOConfig, GRPOTrainer

    family = Family(GRPOTrainer, GRPOConfig, generate_for_grpo)
    for arm in GRPO_ARMS:
        yield from compare_arm(recorded, arm, family)


def compare_rloo(recorded: Recorded) -> Iterator[Comparison]:
    """RLOOTrainer as proximal RLOO, and without its clip as RLOO."""
    from trl import RLOOConfig, RLOOTrainer

    family = Family(RLOOTrainer, RLOOConfig, generate_for_rloo)
    for arm in RLOO_ARMS:
        yield from compare_arm(recorded, arm, family)


def compare_arm(recorded: Recorded, arm: Arm, family: Family) -> Iterator[Comparison]:
    """Advantages, loss and gradients; then the controls."""
    update = run_arm(recorded, arm, family)
    ours = recorded.tensors(f"{arm.ours}-advantages")["advantages"][:, 0]
    yield compare_tensors(arm.name, "advantages", ours, update.advantages)
    yield compare_numbers(
        label(arm.name, arm.same_loss), "loss", find_loss(recorded, arm.ours), update.loss, arm.same_loss
    )
    name = label(arm.name, arm.same_gradients)
    yield from compare_gradients(
        name, recorded.tensors(arm.ours), update.gradients, arm.same_gradients, tensor_tolerance=RL_TENSOR_TOLERANCE
    )
    for name, key in arm.controls:
        yield from compare_gradients(f"control: {name}", recorded.tensors(key), update.gradients, should_agree=False)


def label(name: str, should_agree: bool) -> str:
    """Differences in definition are findings."""
    return name if should_agree else f"finding: {name}"


def generate_for_rloo(rows: list[Row]) -> tuple[Any, ...]:
    """Token ids, and texts that nothing reads."""
    return *([list(row[key]) for row in rows] for key in ("prompt_ids", "token_ids")), [""] * len(rows)


def generate_for_grpo(rows: list[Row]) -> tuple[Any, ...]:
    """The same with the generator's log-probabilities; no tools, no images."""
    prompt_ids, token_ids, texts = generate_for_rloo(rows)
    return prompt_ids, token_ids, None, texts, [row["sampling_logprobs"] for row in rows], {}, None, None


def run_arm(recorded: Recorded, arm: Arm, family: Family) -> Update:
    """One update by TRL's own `training_step`, micro-batch after micro-batch."""
    trainer = build_replayed_trainer(recorded, arm, family)
    trainer.current_gradient_accumulation_steps = arm.num_micro_batches
    inputs = [{"prompt": row["prompt_id"], "score": row["score"]} for row in recorded.contents["rl"]["rows"]]
    parts = [trainer.training_step(trainer.model, inputs, None).item() for _ in range(arm.num_micro_batches)]
    return Update(sum(parts), take_gradients(trainer.model), torch.tensor(list(trainer._logs["advantages"])))


def build_replayed_trainer(recorded: Recorded, arm: Arm, family: Family) -> Any:
    """A trainer whose generator replays the recorded completions."""
    from datasets import Dataset

    rl, rows = recorded.contents["rl"], recorded.contents["rl"]["rows"]
    learner, older = (load_weights(recorded, name) for name in ("learner", arm.older))

    class Replayed(family.trainer):
        def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:  # noqa: ARG002  TRL's
            return family.generate(rows)

        def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
            self.model.load_state_dict(older)
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            self.model.load_state_dict(learner)
            return output

    trainer = Replayed(
        model=recorded.contents["model_path"],
        reward_funcs=lambda score, **_: score,
        args=family.config(
            num_generations=rl["num_samples"],
            max_completion_length=rl["max_new_tokens"],
            temperature=rl["temperature"],
            gradient_accumulation_steps=arm.num_micro_batches,
            **arm.settings,
            **trainer_settings(recorded, len(rows) // arm.num_micro_batches),
        ),
        train_dataset=Dataset.from_list([{"prompt": "unused"} for _ in rows]),
        processing_class=load_trl_tokenizer(recorded, pad_is_eos=True),
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(load_weights(recorded, "reference"))
    for name, value in arm.attributes.items():
        setattr(trainer, name, value)
    return trainer


def compare_loss(
    recorded: Recorded, name: str, ours: str, update: Update, should_agree: bool = True
) -> Iterator[Comparison]:
    """One of our losses and its gradients."""
    yield compare_numbers(name, "loss", find_loss(recorded, ours), update.loss, should_agree)
    yield from compare_gradients(
        name, recorded.tensors(ours), update.gradients, should_agree, tensor_tolerance=RL_TENSOR_TOLERANCE
    )


def find_loss(recorded: Recorded, ours: str) -> float:
    """The number."""
    loss: float = recorded.contents["rl"]["results"][ours]["loss"]
    return loss


def load_weights(recorded: Recorded, name: str) -> Gradients:
    """State of one of the recorded models."""
    return dict(load_model(recorded, name).state_dict())


def load_model(recorded: Recorded, name: str) -> Any:
    """One of the recorded models: the learner, another policy, or a value model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    path = recorded.contents["model_path"] if name == "learner" else recorded.directory / name
    is_value = name in ("value", "old_value")
    auto_class = AutoModelForSequenceClassification if is_value else AutoModelForCausalLM
    return auto_class.from_pretrained(path, dtype=torch.float32)


# Online DPO


def compare_online_dpo(recorded: Recorded) -> Iterator[Comparison]:
    """OnlineDPOTrainer with both losses; it takes no temperature, and adds up the gradients of micro-batches."""
    for loss, key in (("sigmoid", "online_dpo"), ("ipo", "online_dpo_ipo")):
        update = run_online_dpo(recorded, loss, num_micro_batches=1)
        yield from compare_loss(recorded, f"online DPO, {loss}; ours at temperature 1", f"{key}_at_1", update)
        yield from compare_loss(recorded, f"finding: online DPO, {loss}", key, update, should_agree=False)

    update, ours = run_online_dpo(recorded, "sigmoid", num_micro_batches=2), recorded.tensors("online_dpo_at_1")
    arm = "online DPO, sigmoid, 2 micro-batches; ours at temperature 1"
    yield compare_numbers(arm, "loss", find_loss(recorded, "online_dpo_at_1"), update.loss)
    yield from compare_gradients(f"finding: {arm}", ours, update.gradients, should_agree=False)
    halved = {name: gradient / 2 for name, gradient in update.gradients.items()}
    yield from compare_gradients(f"{arm}, TRL's gradient halved", ours, halved, tensor_tolerance=RL_TENSOR_TOLERANCE)


def run_online_dpo(recorded: Recorded, loss_type: str, num_micro_batches: int) -> Update:
    """One update of a trainer whose generator gives the first two recorded samples of each prompt."""
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    rl, parts = recorded.contents["rl"], split_pairs(recorded, num_micro_batches)
    current: list[Row] = []
    prompts = ["unused"] * (len(parts[0]) // 2)

    class Replayed(OnlineDPOTrainer):
        def _generate(self, model: Any, prompts: Any, images: Any = None) -> tuple[Any, ...]:  # noqa: ARG002  TRL's
            return *pad_rows(current, self.processing_class.pad_token_id), None

    trainer = Replayed(
        model=load_model(recorded, "learner"),
        ref_model=load_model(recorded, "reference"),
        reward_funcs=lambda **_: [row["score"] for row in current],
        args=OnlineDPOConfig(
            beta=0.1,
            loss_type=loss_type,
            temperature=rl["temperature"],
            max_new_tokens=rl["max_new_tokens"],
            gradient_accumulation_steps=num_micro_batches,
            **trainer_settings(recorded, len(prompts)),
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=load_trl_tokenizer(recorded, pad_is_eos=True),
    )
    loss = 0.0
    for part in parts:
        current[:] = part
        loss += trainer.training_step(trainer.model, {"prompt": prompts}).item()
    return Update(loss, take_gradients(trainer.model))


def split_pairs(recorded: Recorded, num_parts: int) -> list[list[Row]]:
    """The first two samples of each prompt, in parts with as many prompts; in each all first samples come first."""
    samples = [[row for row in recorded.contents["rl"]["rows"] if row["sample_index"] == sample] for sample in (0, 1)]
    size = len(samples[0]) // num_parts
    return [
        [row for rows in samples for row in rows[start : start + size]] for start in range(0, len(samples[0]), size)
    ]


def pad_rows(rows: list[Row], pad_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts padded on the left, completions on the right, each with its mask. [N, ...] each"""

    def pad(key: str, side: str) -> Iterator[Tensor]:
        ids = [torch.tensor(row[key]) for row in rows]
        yield torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side)
        ones = [torch.ones_like(item) for item in ids]
        yield torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)

    prompt_ids, prompt_mask = pad("prompt_ids", "left")
    completion_ids, completion_mask = pad("token_ids", "right")
    return prompt_ids, prompt_mask, completion_ids, completion_mask


# PPO


PPO_ARMS = (
    ("PPO; ours with a token after EOS and n − 1", "ppo_as_trl", True, True),
    ("finding: PPO; ours with a token after EOS", "ppo_longer", False, True),
    ("finding: PPO", "ppo", False, False),
)
"""Name, our loss, whether the policy's half agrees, whether the value model's does."""


def compare_ppo(recorded: Recorded) -> Iterator[Comparison]:
    """PPOTrainer against ours with both lines that differ, with one of them, and as it is."""
    policy, value_model = run_ppo(recorded)
    for name, key, policy_agrees, value_model_agrees in PPO_ARMS:
        advantages = recorded.tensors(f"{key}-advantages")["advantages"]
        quantity = "advantages before whitening"
        yield compare_tensors(name, quantity, advantages, policy.advantages, value_model_agrees)
        yield from compare_loss(recorded, name, key, policy, policy_agrees)
        yield from compare_loss(recorded, f"{name}; value model", f"{key}_value", value_model, value_model_agrees)


def run_ppo(recorded: Recorded) -> tuple[Update, Update]:
    """The policy's and the value model's half of an update by `train`, whose loss is no function of its own."""
    from trl.experimental.ppo import ppo_trainer

    trainer, kept = build_ppo_trainer(recorded), Kept()
    rl, pad_id = recorded.contents["rl"], trainer.processing_class.pad_token_id
    prompt_ids, _, completion_ids, _ = pad_rows(rl["rows"], pad_id)
    query_responses = torch.cat([prompt_ids, completion_ids], dim=1)
    sampler, old_value = load_model(recorded, "sampler"), load_model(recorded, "old_value")
    whiten, get_reward = ppo_trainer.masked_whiten, ppo_trainer.get_reward

    def generate(*_: Any) -> tuple[Tensor, Tensor]:
        logits = ppo_trainer.forward(sampler, query_responses, pad_id).logits
        return query_responses, logits[:, prompt_ids.shape[1] - 1 : -1] / rl["temperature"]

    def value_or_score(model: Any, *arguments: Any) -> tuple[Any, Any, Any]:
        if model is trainer.reward_model:
            return None, torch.tensor([row["score"] for row in rl["rows"]]), None
        values: tuple[Any, Any, Any] = get_reward(old_value, *arguments)
        return values

    def spy(values: Tensor, mask: Tensor) -> Tensor:
        kept.advantages = values
        whitened: Tensor = whiten(values, mask)
        return whitened

    def keep_gradients(*_: Any) -> None:
        kept.gradients = take_gradients(trainer.model)

    trainer.optimizer.optimizer.register_step_pre_hook(keep_gradients)
    with patch.multiple(ppo_trainer, batch_generation=generate, get_reward=value_or_score, masked_whiten=spy):
        trainer.train()
    logged = next(item for item in trainer.state.log_history if "loss/policy_avg" in item)
    return (
        Update(logged["loss/policy_avg"], kept.of_model("policy."), kept.advantages),
        Update(logged["loss/value_avg"], kept.of_model("value_model.")),
    )


class Kept:
    """What is seen of TRL's PPO while it trains."""

    gradients: Gradients
    advantages: Tensor

    def of_model(self, prefix: str) -> Gradients:
        """Gradients of one of its two models, by the names they have in ours."""
        return {name.removeprefix(prefix): grad for name, grad in self.gradients.items() if name.startswith(prefix)}


def build_ppo_trainer(recorded: Recorded) -> Any:
    """A PPOTrainer that makes one update of one micro-batch at a learning rate of 0."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rl = recorded.contents["rl"]
    rows = Dataset.from_list([{"input_ids": row["prompt_ids"]} for row in rl["rows"]])
    return PPOTrainer(
        args=PPOConfig(
            learning_rate=0.0,
            total_episodes=len(rows),
            num_ppo_epochs=1,
            num_sample_generations=0,
            response_length=rl["max_new_tokens"],
            temperature=rl["temperature"],
            gamma=rl["ppo"]["gamma"],
            vf_coef=1.0,
            save_strategy="no",
            **trainer_settings(recorded, len(rows)),
        ),
        processing_class=load_trl_tokenizer(recorded, pad_is_eos=False),
        model=load_model(recorded, "learner"),
        ref_model=load_model(recorded, "reference"),
        reward_model=load_model(recorded, "value"),
        value_model=load_model(recorded, "value"),
        train_dataset=rows,
        eval_dataset=rows,
    )
