"""What travels between stages: prompts, demonstrations, pairs, completions."""

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")
"""train: everything is fitted on it. validation: reward-model accuracy and the choice of checkpoint.
heldout: the final evaluation and nothing else."""

TooLong = Literal["drop", "truncate"]
"""What happens to samples over a length limit."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Prompt:
    """What the policy is given."""

    prompt_id: str
    """Stable over runs: a hash of the messages."""
    messages: tuple[Message, ...]
    group: str
    """Prompts of one group never lie in different splits (a shared opening, a shared problem)."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a completion to imitate (SFT)."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Pair:
    """A prompt with two completions, one preferred by a person."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Completion:
    """What a policy produced for a prompt, and under which conditions."""

    prompt_id: str
    sample_index: int
    """0 … K-1 among the prompt's samples; the greedy completion has 0 as well."""
    is_greedy: bool
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Never re-tokenised from text. The end-of-sequence token is the last one if `is_finished`."""
    sampling_logprobs: tuple[float, ...]
    """Of the distribution that was sampled (after temperature), in nats; one per token."""
    text: str
    """`token_ids` without special tokens, for scorers that read text and for people."""
    is_finished: bool
    """True if it ended with the end-of-sequence token, False if it was cut at the length limit."""
    first_policy_version: int
    """Updates applied to the weights that sampled the first token; 0 is the SFT model."""
    last_policy_version: int
    """The same for the last token."""
    token_policy_versions: tuple[int, ...] = ()
    """The same for each token, where weights were swapped in the middle of the completion; empty where all tokens
    are `first_policy_version`'s."""
