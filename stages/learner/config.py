"""Settings of the learner, nested in the section of each step that trains."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from stages.common.config import Section
from stages.data.records import TooLong


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685): the weights stay as they are, an update beside them is trained.

    Departures: none. There is no dropout.
    """

    rank: PositiveInt = 16
    """Rows of the smaller matrices; bounds what can be learnt, and memory."""
    alpha: PositiveFloat = 32.0
    """The update is multiplied by alpha / rank."""
    targets: tuple[str, ...] | Literal["all"] = "all"
    """Names of linear layers, such as [q_proj, v_proj]; all: every linear layer of the trained blocks."""


class LearnerConfig(Section):
    """How one step's parameters are updated."""

    lr: PositiveFloat
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay after the warm-up; the last update still has lr > 0."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of all updates over which lr rises from near 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On matrices only, never on norms and biases."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    stop_grad_norm: PositiveFloat = 1e4
    """An unclipped gradient norm above this stops the run with its batch saved."""
    trainable_layers: PositiveInt | Literal["all"] = "all"
    """all, or only the top n transformer blocks and the norm after them."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type. Weights and their optimizer state are always float32."""
    micro_batch_tokens: PositiveInt = 2048
    """Padded tokens of one forward-backward; bounds memory, changes no result beyond rounding."""
    num_ranks: PositiveInt = 1
    """Processes that train together, each on a GPU or on its share of the CPU cores; see docs/learner.md. Results
    differ by rounding only."""
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage: what ranks share out instead of each holding it whole. 1: optimizer state, 2: gradients
    too, 3: weights too. All are the same maths. auto: 2, but for one rank, which has nobody to share with, 0 (without
    offload_optimizer, which needs 2); a run that goes on with another number of ranks keeps the one it began with."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: the optimizer state is kept, and weights are updated, in main memory."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """cpu: weights wait in main memory until a layer needs them."""
    gradient_checkpointing: bool = False
    """Keep only what enters a transformer block and compute the rest again in the backward pass: less memory, a third
    more work."""
    share_prompts: Literal["auto", "off"] = "auto"
    """auto: completions of one prompt read it once where the model's layers all look back without limit, and neither
    gradient_checkpointing nor compile stands in the way. Results differ by rounding only."""
    compile: bool = False
    """Compile each transformer block with torch.compile: minutes at the start, and it needs a C++ compiler. It
    gained nothing on CPU (docs/benchmarks/2026-11-21-throughput.md) and has not been run on a GPU."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the weights; exported models have them merged in."""

    @property
    def stage(self) -> int:
        """`zero_stage` as a number, of a run that begins."""
        if self.zero_stage != "auto":
            return self.zero_stage
        return 0 if self.num_ranks == 1 and self.offload_optimizer == "none" else 2

    @model_validator(mode="after")
    def check_offloading(self) -> Self:
        """What is not shared out cannot be moved out either."""
        for name, least in (("offload_optimizer", 2), ("offload_parameters", 3)):
            if getattr(self, name) != "none" and self.stage < least:
                allowed = "3" if least == 3 else "2 and 3"
                raise ValueError(
                    f"learner.{name}='cpu' with learner.zero_stage={self.zero_stage}: it works with stage {allowed}; "
                    f"set learner.zero_stage to {least} or learner.{name} to 'none'"
                )
        return self

    @model_validator(mode="after")
    def check_compiling(self) -> Self:
        """DeepSpeed brings a shared-out weight from hooks that a compiled block does not run."""
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "learner.compile=True with learner.zero_stage=3: it works with stages 0 to 2; set one of the two"
            )
        return self


class EpochsConfig(Section):
    """A step that trains on a fixed data set."""

    learner: LearnerConfig
    num_epochs: PositiveInt
    """Passes over the data."""
    batch_size: PositiveInt
    """Demonstrations or pairs per update."""
    max_tokens: PositiveInt
    """Prompt and completion together, in tokens."""
    too_long: TooLong = "drop"
    """What happens to longer samples; either way they are counted in the step's metrics file."""
    checkpoint_every: PositiveInt = 50
    """Updates between resume points."""
    seed: int = Field(default=0, ge=0)
    """Of everything random in the step."""
