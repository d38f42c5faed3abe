from pathlib import Path

import pytest
import torch

from stages.common.errors import GeneratorError
from stages.data.batches import collate
from stages.data.text import TokenSequence
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Request, SamplingPlan, require_complete
from stages.generation.transformers_generator import TransformersGenerator
from stages.learner.logprobs import compute_logprobs
from stages.models.load import load_policy, load_tokenizer
from tests.fakes import make_completion
from tests.tiny import save_tiny_model

CONFIG = GenerationConfig(engine="transformers", temperature=0.7, max_new_tokens=6, max_prompt_tokens=20, dtype="fp32")
REQUESTS = [Request("a", (5, 6), seed=1), Request("b", (7, 8, 9), seed=2)]


def start(path: Path, seed: int = 0) -> TransformersGenerator:
    model = save_tiny_model(path / str(seed), seed)
    return TransformersGenerator(model, CONFIG, tokenizer=load_tokenizer(model), policy_version=0)


def test_sampling_logprobs_are_the_learners_at_the_same_version(tmp_path: Path) -> None:
    generator = start(tmp_path)

    groups = generator.generate(REQUESTS, SamplingPlan(num_samples=3))

    completions = [item for group in groups for item in group]
    batch = collate([TokenSequence(item.prompt_ids, item.token_ids) for item in completions])
    logprobs = compute_logprobs(load_policy(tmp_path / "0", torch.float32), batch, temperature=0.7)
    for item, row, mask in zip(completions, logprobs, batch.completion_mask, strict=True):
        torch.testing.assert_close(row[mask], torch.tensor(item.sampling_logprobs), atol=1e-4, rtol=1e-4)


def test_a_prompts_samples_depend_on_neither_its_neighbours_nor_global_state(tmp_path: Path) -> None:
    generator, plan = start(tmp_path), SamplingPlan(num_samples=2, with_greedy=True)
    together = generator.generate(REQUESTS, plan)
    torch.manual_seed(123)

    assert generator.generate(REQUESTS[1:], plan) == together[1:]


def test_published_weights_are_the_ones_that_sample(tmp_path: Path) -> None:
    generator, plan = start(tmp_path), SamplingPlan(num_samples=0, with_greedy=True)
    before = generator.generate(REQUESTS, plan)

    generator.publish(save_tiny_model(tmp_path / "new", seed=4), policy_version=3)
    after = generator.generate(REQUESTS, plan)

    assert [group[0].token_ids for group in before] != [group[0].token_ids for group in after]
    assert {group[0].last_policy_version for group in after} == {3}


def test_unusable_answers_are_refused() -> None:
    request, plan = REQUESTS[0], SamplingPlan(num_samples=1)
    good = make_completion("x")

    assert require_complete((good,), request, plan, 6) == (good,)
    with pytest.raises(GeneratorError, match="2 completions instead of 1"):
        require_complete((good, good), request, plan, 6)
    with pytest.raises(GeneratorError, match="2 tokens and 2 logprobs; expected 1…1"):
        require_complete((good,), request, plan, 1)
    for bad in (float("nan"), float("-inf"), 0.5):
        broken = type(good)(**{**good.__dict__, "sampling_logprobs": (-1.0, bad)})
        with pytest.raises(GeneratorError, match="not a finite number"):
            require_complete((broken,), request, plan, 6)
