"""Section `rl.algorithm` of params.yaml: one class for each algorithm, chosen by `name`."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from stages.common.config import Section
from stages.common.errors import SettingError


class CorrectionConfig(Section):
    """Importance weights of the samples of older policies; bias and variance are in algorithms/importance.py."""

    kind: Literal["none", "token_tis", "sequence_tis", "decoupled"] = "token_tis"
    """token_tis: each token's ratio, of small variance. sequence_tis: its completion's, of small bias. decoupled: for
    clipped objectives, which then clip the ratio to the learner's own older weights and multiply in a weight."""
    max_weight: float = Field(default=2.0, ge=1, le=1e6)
    """A larger ratio is cut to this; 1 only ever takes weight away."""

    @model_validator(mode="after")
    def check_max_weight(self) -> Self:
        """A bound of weights that there are not would do nothing."""
        if self.kind == "none" and self.max_weight != type(self).model_fields["max_weight"].default:
            raise ValueError(
                f"rl.algorithm.correction.max_weight={self.max_weight} does nothing with correction.kind='none'; set a "
                "kind, or leave max_weight out"
            )
        return self


class ClippedCorrectionConfig(CorrectionConfig):
    """Those of objectives with a clip range, whose clipped ratio is to the policy that sampled."""

    kind: Literal["none", "token_tis", "sequence_tis", "decoupled"] = "none"


class ClipConfig(Section):
    """How far the ratio to an older policy pays: from 1 − low to 1 + high."""

    low: float = Field(default=0.2, gt=0, lt=1)
    high: PositiveFloat = 0.2


class NormaliserConfig(Section):
    """What the sum of all tokens' terms is divided by, over the whole batch whatever its micro-batches are."""

    by: Literal["per_sequence", "per_token", "constant"] = "constant"
    """per_sequence: mean of each completion's tokens, then over completions. per_token: mean over all tokens.
    constant: sum over tokens divided by `tokens`, then mean over completions; the only one without bias by length."""
    tokens: PositiveFloat = 1.0
    """Of `constant`: 1 is the policy gradient's own, generation.max_new_tokens Dr. GRPO's."""

    @model_validator(mode="after")
    def check_tokens(self) -> Self:
        """Tokens of another normaliser would do nothing."""
        if self.by != "constant" and self.tokens != 1.0:
            raise ValueError(f"normaliser.tokens={self.tokens} is of normaliser.by='constant', not of {self.by!r}")
        return self


class PerTokenConfig(NormaliserConfig):
    """Where the algorithm's own is a mean over tokens."""

    by: Literal["per_sequence", "per_token", "constant"] = "per_token"


class PerSequenceConfig(NormaliserConfig):
    """Where the algorithm's own is a mean over completions of means over tokens."""

    by: Literal["per_sequence", "per_token", "constant"] = "per_sequence"


class OnlineDpoConfig(Section):
    """Online DPO (arXiv:2402.04792): best against worst of K samples."""

    name: Literal["online_dpo"]
    samples_per_prompt: int = Field(default=4, ge=2)
    """K."""
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the SFT model; larger stays closer."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO's. ipo: squared distance to 1/(2 beta)."""


class DpoConfig(Section):
    """Offline DPO (arXiv:2305.18290): the labelled pairs themselves, without generator and reward model.

    What section `rl` says of sampling has then no effect; prompts_per_update counts pairs. See docs/algorithms/dpo.md.
    """

    name: Literal["dpo"]
    beta: PositiveFloat = 0.1
    """Strength of the pull towards the SFT model; larger stays closer."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO's. ipo: squared distance to 1/(2 beta)."""


class CopgConfig(Section):
    """Contrastive policy gradient (arXiv:2406.19185): every sample of a prompt against every other."""

    name: Literal["copg"]
    samples_per_prompt: int = Field(default=4, ge=2)
    """K."""
    beta: PositiveFloat = 0.05
    """Reward lost per nat of KL to the SFT model."""


class BestOfNConfig(Section):
    """Fine-tuning on the best of K samples."""

    name: Literal["best_of_n"]
    samples_per_prompt: int = Field(default=4, ge=2)
    """K."""


class PolicyGradientConfig(Section):
    """What all policy-gradient algorithms have; see stages/rl/algorithms/policy_gradient.py."""

    kl_coef: float = Field(default=0.05, ge=0)
    """Reward lost per nat of KL to the SFT model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the KL in the reward; only k1 gives the KL's own gradient there."""
    kl_loss_coef: float = Field(default=0.0, ge=0)
    """Loss per nat of KL to the SFT model, beside or instead of the one in the reward."""
    kl_loss_estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    """exact: of each token's whole distribution; costs a forward pass of the SFT model with all its logits."""
    normaliser: NormaliserConfig = NormaliserConfig()

    @model_validator(mode="after")
    def check_estimators(self) -> Self:
        """An estimator without its coefficient would do nothing; the gradient of an expected k1 is 0."""
        for place, default in (("kl", "k1"), ("kl_loss", "k3")):
            estimator, coefficient = getattr(self, f"{place}_estimator"), getattr(self, f"{place}_coef")
            if coefficient == 0 and estimator not in (default, "k1"):
                raise ValueError(
                    f"rl.algorithm.{place}_estimator={estimator!r} does nothing while rl.algorithm.{place}_coef is 0; "
                    f"set that above 0, or leave the estimator out"
                )
        if self.kl_loss_estimator == "k1":
            raise ValueError(
                "rl.algorithm.kl_loss_estimator='k1' has no gradient in expectation; allowed: 'k2', 'k3', 'exact', or "
                "k1 in the reward by kl_coef"
            )
        return self


class PlainConfig(PolicyGradientConfig):
    """Those without a clip range."""

    correction: CorrectionConfig = CorrectionConfig()
    """For completions that older weights sampled; those of the learner's own have ratio 1 but for rounding."""

    @model_validator(mode="after")
    def check_correction(self) -> Self:
        """The decoupled objective clips."""
        if self.correction.kind == "decoupled":
            raise ValueError(
                "rl.algorithm.correction.kind='decoupled' is for clipped objectives (ppo, proximal_rloo, grpo, "
                "reinforce_pp); allowed here: 'none', 'token_tis', 'sequence_tis'"
            )
        return self


class ClippedConfig(PolicyGradientConfig):
    """Those with one."""

    clip: ClipConfig = ClipConfig()
    correction: ClippedCorrectionConfig = ClippedCorrectionConfig()
    """none: the clipped ratio is to the policy that sampled. decoupled: see `CorrectionConfig`."""

    @model_validator(mode="after")
    def check_correction(self) -> Self:
        """A ratio to the sampling policy and its weight would count it twice."""
        if self.correction.kind not in ("none", "decoupled"):
            raise ValueError(
                f"rl.algorithm.correction.kind={self.correction.kind!r}: the clipped ratio is one to the sampling "
                "policy already; allowed here: 'none', 'decoupled'"
            )
        return self


class RlooConfig(PlainConfig):
    """RLOO (arXiv:2402.14740): the baseline is the mean of the prompt's other samples."""

    name: Literal["rloo"]
    samples_per_prompt: int = Field(default=4, ge=2)
    """K."""


class ProximalRlooConfig(ClippedConfig):
    """RLOO under a clipped ratio of whole completions (arXiv:2410.18252)."""

    name: Literal["proximal_rloo"]
    samples_per_prompt: int = Field(default=4, ge=2)
    """K."""
    level: Literal["sequence"] = "sequence"

    @model_validator(mode="after")
    def check_normaliser(self) -> Self:
        """A completion has one term."""
        if self.normaliser != NormaliserConfig():
            raise ValueError(
                f"rl.algorithm.normaliser.by={self.normaliser.by!r}: a completion has one ratio and one term, whose "
                "mean is taken; leave normaliser out"
            )
        return self


class GrpoConfig(ClippedConfig):
    """GRPO (arXiv:2402.03300); Dr. GRPO (arXiv:2503.20783) with scale none and a constant normaliser."""

    name: Literal["grpo"]
    samples_per_prompt: int = Field(default=4, ge=2)
    """K."""
    scale: Literal["group_std", "none"] = "group_std"
    """What a prompt's advantages are divided by."""
    kl_coef: Literal[0] = 0
    """Its KL is in the loss."""
    kl_loss_coef: float = Field(default=0.04, ge=0)
    normaliser: PerSequenceConfig = PerSequenceConfig()


class ReinforcePpConfig(ClippedConfig):
    """REINFORCE++ (arXiv:2501.03262): returns whitened over the batch."""

    name: Literal["reinforce_pp"]
    samples_per_prompt: PositiveInt = 4
    """K."""
    baseline: Literal["none", "group_mean"] = "none"
    """Taken from the scores; group_mean: of the prompt's samples."""
    kl_coef: float = Field(default=0.01, ge=0)
    normaliser: PerTokenConfig = PerTokenConfig()

    @model_validator(mode="after")
    def check_baseline(self) -> Self:
        """The mean of one sample is the sample."""
        if self.baseline == "group_mean" and self.samples_per_prompt < 2:
            raise ValueError(
                "rl.algorithm.baseline='group_mean' with rl.algorithm.samples_per_prompt=1 leaves no reward; allowed: "
                "at least 2 samples, or baseline 'none'"
            )
        return self


class PpoConfig(ClippedConfig):
    """PPO (arXiv:1707.06347) with a value model that starts from the reward model, or SFT where none was trained."""

    name: Literal["ppo"]
    samples_per_prompt: PositiveInt = 1
    """K; the value model is the baseline, so 1 will do."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of a token's reward."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """1 trusts rewards alone, 0 the value of the next token."""
    value_clip: PositiveFloat = 0.2
    """How far a value may move for the better, in units of scores, in all epochs of a mini-batch: of no effect with
    `rl.epochs_per_rollout: 1`."""
    whiten_advantages: bool = True
    """Mean 0 and standard deviation 1 over the mini-batch's tokens."""
    value_lr: PositiveFloat | None = None
    """Peak learning rate of the value model's own optimizer; null: `rl.learner.lr`. The rest is as `rl.learner`."""
    normaliser: PerTokenConfig = PerTokenConfig()


class KlModeConfig(PlainConfig):
    """Those whose KL cost is that of the learner's newest weights."""

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


class RemaxConfig(KlModeConfig):
    """ReMax (arXiv:2310.10505): samples against the greedy completion."""

    name: Literal["remax"]
    samples_per_prompt: PositiveInt = 1
    """Samples that share one greedy baseline; 1 in the paper."""
    greedy_max_tokens: PositiveInt | None = None
    """Tokens at which the greedy completion is cut, to save time: it is then scored as it is. null: as samples are."""


class ReinforceConfig(KlModeConfig):
    """REINFORCE (Williams 1992)."""

    name: Literal["reinforce"]
    samples_per_prompt: PositiveInt = 1
    """K."""
    baseline: Literal["none", "other_prompts"] = "other_prompts"
    """Taken from the scores; other_prompts: the mean score of the mini-batch's other prompts."""


AlgorithmConfig = Annotated[
    OnlineDpoConfig
    | PpoConfig
    | RlooConfig
    | ProximalRlooConfig
    | CopgConfig
    | BestOfNConfig
    | RemaxConfig
    | ReinforceConfig
    | ReinforcePpConfig
    | GrpoConfig
    | DpoConfig,
    Field(discriminator="name"),
]


def check_greedy_max_tokens(config: AlgorithmConfig, max_new_tokens: int) -> None:
    """The greedy completion is cut before samples are, or not at all.

    Raises:
        SettingError: the setting cuts nothing.
    """
    greedy_max_tokens = getattr(config, "greedy_max_tokens", None)
    if greedy_max_tokens is not None and greedy_max_tokens >= max_new_tokens:
        raise SettingError(
            f"rl.algorithm.greedy_max_tokens={greedy_max_tokens} cuts nothing: allowed: below "
            f"generation.max_new_tokens={max_new_tokens}, or null"
        )
