"""Section `model` of params.yaml: where the base model comes from."""

from typing import Annotated, Literal

from pydantic import Field

from stages.common.config import Section


class PackageSource(Section):
    """A GGUF file that an installed Python package carries: no account, no download."""

    kind: Literal["package"]
    package: str
    """Import name of the package; it is located, never imported."""
    file: str
    """Name of the GGUF file inside the package's folder."""


class PathSource(Section):
    """A Hugging Face directory on this machine (config, safetensors, tokenizer)."""

    kind: Literal["path"]
    path: str


class HubSource(Section):
    """A repository on the Hugging Face hub."""

    kind: Literal["hub"]
    repo: str
    """OWNER/NAME."""
    revision: str = "main"
    """Branch, tag or commit; a commit makes the run reproducible."""


class ModelConfig(Section):
    """The base model. Everything after it (SFT, reward model, policy) starts from its weights."""

    source: Annotated[PackageSource | PathSource | HubSource, Field(discriminator="kind")]
    chat_template: Literal["own", "plain"] = "own"
    """own: the tokenizer's template, which must exist. plain: messages joined as they are (base models),
    begun with the token that the tokenizer begins every text with, if it does."""
    keep_layers: Literal["all"] | Annotated[int, Field(ge=2)] = "all"
    """all, or n evenly spaced layers of the source, first and last among them: a smaller and faster model, which
    knows little until SFT has taught it."""
