"""Which generator runs, by `generation.engine`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stages.generation.config import FleetConfig, GenerationConfig, Publish, require_engine
from stages.generation.protocol import Generator, RecordSpan
from stages.models.load import load_tokenizer, require_context


@dataclass(frozen=True)
class GeneratorSettings:
    """How the generator runs, beyond section `generation`."""

    fleet: FleetConfig = field(default_factory=FleetConfig)
    devices: tuple[str | None, ...] = (None,)
    """CPU cores or GPUs of each local server; None: `generation.cpu_cores`, or every GPU."""
    weight_update: Literal["drain", "in_flight"] = "drain"
    seed: int = 0
    """Of the engine's own randomness; requests carry seeds of their own."""
    scratch: Path | None = None
    """Directory that the guards of local servers delete should this process be killed."""
    policy_version: int = 0
    """Updates applied to the first weights."""
    shared_model: Path | None = None
    """The first weights where servers started elsewhere find them; None: under the same path."""
    publish: Publish = "files"
    """How new weights get to vLLM servers."""


def ignore_span(role: str, kind: str, started: float, ended: float, policy_version: int) -> None:
    """A `RecordSpan` for those who keep no timeline."""


@contextmanager
def start_generator(
    model: Path,
    config: GenerationConfig,
    *,
    log_dir: Path,
    settings: GeneratorSettings | None = None,
    record: RecordSpan = ignore_span,
) -> Iterator[Generator]:
    """A generator with the weights of a model directory; it is ended however the block is left.

    Args:
        model: directory with weights and tokenizer.
        config: section `generation`.
        log_dir: where servers write their logs.
        settings: servers, devices, how weights are swapped.
        record: told what each server does when.

    Raises:
        SettingError: the engine cannot do what the other settings ask for, or prompt and completion are longer than
            the model can read.
    """
    settings = settings or GeneratorSettings()
    require_engine(config, settings.fleet, settings.weight_update, settings.publish)
    lengths = f"generation.max_prompt_tokens={config.max_prompt_tokens} + max_new_tokens={config.max_new_tokens}"
    require_context(model, config.max_prompt_tokens + config.max_new_tokens, lengths)
    tokenizer = load_tokenizer(model)
    generator: Generator
    if config.engine == "vllm":
        from stages.generation.fleet import Fleet, FleetPlan

        plan = FleetPlan(
            model=model,
            policy_version=settings.policy_version,
            generation=config,
            fleet=settings.fleet,
            devices=settings.devices,
            in_flight=settings.weight_update == "in_flight",
            seed=settings.seed,
            log_dir=log_dir,
            scratch=settings.scratch,
            shared_model=settings.shared_model,
            publish=settings.publish,
        )
        generator = Fleet(plan, tokenizer, record)
    else:
        from stages.generation.transformers_generator import TransformersGenerator

        generator = TransformersGenerator(
            model, config, tokenizer=tokenizer, policy_version=settings.policy_version, record=record
        )
    try:
        yield generator
    finally:
        generator.close()
