"""Which generator runs, by `generation.engine`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.generation.config import GenerationConfig
from stages.generation.protocol import Generator
from stages.models.load import load_tokenizer


@contextmanager
def start_generator(
    model: Path, config: GenerationConfig, *, seed: int, log_path: Path, policy_version: int = 0
) -> Iterator[Generator]:
    """A generator with the weights of a model directory; it is ended however the block is left.

    Args:
        model: directory with weights and tokenizer.
        config: section `generation`.
        seed: of the engine's own randomness.
        log_path: where a server writes.
        policy_version: updates applied to the weights in `model`.
    """
    tokenizer = load_tokenizer(model)
    generator: Generator
    if config.engine == "vllm":
        from stages.generation.vllm_generator import VllmGenerator

        generator = VllmGenerator(
            model,
            config,
            eos_token_id=tokenizer.eos_token_id,
            seed=seed,
            log_path=log_path,
            policy_version=policy_version,
        )
    else:
        from stages.generation.transformers_generator import TransformersGenerator

        generator = TransformersGenerator(model, config, tokenizer=tokenizer, policy_version=policy_version)
    try:
        yield generator
    finally:
        generator.close()
