"""Section `rl` of params.yaml."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from stages.common.config import Section
from stages.learner.config import LearnerConfig


class OnlineDpoConfig(Section):
    """Online DPO (arXiv:2402.04792): best against worst of K samples."""

    name: Literal["online_dpo"]
    samples_per_prompt: int = Field(default=4, ge=2)
    """K."""
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the SFT model; larger stays closer."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO's. ipo: squared distance to 1/(2 beta)."""


class RemaxConfig(Section):
    """ReMax (arXiv:2310.10505): samples against the greedy completion."""

    name: Literal["remax"]
    samples_per_prompt: PositiveInt = 1
    """Samples that share one greedy baseline; 1 in the paper."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Reward lost per nat of KL to the SFT model."""
    kl_mode: Literal["none", "one_step", "full_step"] = "full_step"
    """full_step: a token pays for its completion's KL from there on. one_step: for its own only."""

    @model_validator(mode="after")
    def check_kl(self) -> Self:
        """A coefficient without a mode, or a mode without a coefficient, would do nothing."""
        if (self.kl_coef == 0) != (self.kl_mode == "none"):
            raise ValueError(
                f"rl.algorithm.kl_coef={self.kl_coef} with rl.algorithm.kl_mode={self.kl_mode!r}: "
                "set kl_mode to 'none' exactly when kl_coef is 0"
            )
        return self


class RlConfig(Section):
    """Reinforcement learning against the reward model. Counts are per optimizer update, over all ranks."""

    algorithm: Annotated[OnlineDpoConfig | RemaxConfig, Field(discriminator="name")]
    learner: LearnerConfig
    num_updates: PositiveInt
    """Optimizer updates of the whole run."""
    prompts_per_update: PositiveInt
    """Prompts sampled for each update."""
    missing_eos_score: float | Literal["lowest"] = "lowest"
    """Score of a completion without its end; lowest: the lowest one seen on SFT samples, and a number must not
    be above that. In pairs a finished completion beats an unfinished one in any case."""
    eval_every: PositiveInt = 10
    """Updates between evaluations on the validation prompts."""
    num_eval_prompts: PositiveInt = 48
    """Validation prompts of each evaluation."""
    max_kl_nats: PositiveFloat = 10.0
    """The best checkpoint is the one of highest proxy score whose KL per completion is at most this."""
    checkpoint_every: PositiveInt = 10
    """Updates between resume points."""
    max_logprob_gap: PositiveFloat = 0.3
    """Mean |generator's − learner's logprob| on the same version, in nats a token, that stops the run: above it the
    generator does not sample from the weights that were published."""
    seed: int = Field(default=0, ge=0)
    """Order of the prompts and all sampling."""
