"""A real vLLM server on a two-layer model: tokens, logprobs, weight swaps, and nothing left afterwards."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from stages.common.errors import GeneratorError
from stages.data.batches import collate
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.generation.config import GenerationConfig
from stages.generation.protocol import Request, SamplingPlan
from stages.generation.vllm_generator import VllmGenerator
from stages.learner.logprobs import compute_logprobs
from stages.models.load import load_policy
from tests.tiny import save_tiny_model

EOS = 258
CONFIG = GenerationConfig(
    engine="vllm",
    temperature=0.8,
    max_new_tokens=12,
    max_prompt_tokens=20,
    dtype="fp32",
    max_num_seqs=16,
    cpu_cores="0",
    start_timeout_s=200,
    request_timeout_s=120,
)
REQUESTS = [Request(f"p{index}", tuple(range(10, 14 + index)), seed=100 * index) for index in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    # 32 is the smallest head the CPU engine's attention has.
    return save_tiny_model(folder / "old", seed=0, head_dim=32), save_tiny_model(folder / "new", seed=1, head_dim=32)


@pytest.fixture(scope="module")
def generator(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmGenerator]:
    log_path = tmp_path_factory.mktemp("server") / "generator.log"
    with VllmGenerator(models[0], CONFIG, eos_token_id=EOS, seed=0, log_path=log_path, policy_version=0) as running:
        yield running
    children = psutil.Process(os.getpid()).children(recursive=True)
    assert [child.cmdline() for child in children if "vllm" in " ".join(child.cmdline())] == []


def recompute(model: Path, completion: Completion, temperature: float) -> torch.Tensor:
    batch = collate([TokenSequence(completion.prompt_ids, completion.token_ids)])
    with torch.no_grad():
        return compute_logprobs(load_policy(model, torch.float32), batch, temperature)[0]


@pytest.mark.timeout(400)
def test_samples_carry_the_logprobs_of_the_distribution_they_came_from(
    generator: VllmGenerator, models: tuple[Path, Path]
) -> None:
    generator.publish(models[0], 0)

    groups = generator.generate(REQUESTS, SamplingPlan(num_samples=3, with_greedy=True))

    assert [[item.prompt_id for item in group] for group in groups] == [["p0"] * 4, ["p1"] * 4, ["p2"] * 4]
    for group in groups:
        assert [item.is_greedy for item in group] == [False, False, False, True]
        for item in group[:3]:
            assert item.is_finished == (item.token_ids[-1] == EOS)
            torch.testing.assert_close(
                torch.tensor(item.sampling_logprobs), recompute(models[0], item, 0.8), atol=2e-3, rtol=0
            )


def test_the_greedy_completion_is_made_of_the_most_likely_tokens(
    generator: VllmGenerator, models: tuple[Path, Path]
) -> None:
    generator.publish(models[0], 0)
    ((greedy,),) = generator.generate(REQUESTS[:1], SamplingPlan(num_samples=0, with_greedy=True))

    ids = torch.tensor([greedy.prompt_ids + greedy.token_ids])
    with torch.no_grad():
        best = load_policy(models[0], torch.float32)(ids).logits[0].argmax(dim=-1)
    start = len(greedy.prompt_ids) - 1
    assert tuple(best[start : start + len(greedy.token_ids)].tolist()) == greedy.token_ids


def test_the_same_seeds_give_the_same_completions_and_others_do_not(generator: VllmGenerator) -> None:
    plan = SamplingPlan(num_samples=2)
    again = [Request(item.prompt_id, item.prompt_ids, item.seed) for item in REQUESTS]
    other = [Request(item.prompt_id, item.prompt_ids, item.seed + 7) for item in REQUESTS]

    first, second, third = (generator.generate(requests, plan) for requests in (REQUESTS, again, other))

    assert first == second
    assert [[c.token_ids for c in g] for g in first] != [[c.token_ids for c in g] for g in third]


def test_published_weights_sample_and_carry_their_version(generator: VllmGenerator, models: tuple[Path, Path]) -> None:
    plan = SamplingPlan(num_samples=1)
    generator.publish(models[0], 0)
    generator.generate(REQUESTS, plan)  # fills the prefix cache with the old weights' keys and values

    generator.publish(models[1], 5)
    groups = generator.generate(REQUESTS, plan)

    for (item,) in groups:
        assert (item.first_policy_version, item.last_policy_version) == (5, 5)
        torch.testing.assert_close(
            torch.tensor(item.sampling_logprobs), recompute(models[1], item, 0.8), atol=2e-3, rtol=0
        )
        assert (torch.tensor(item.sampling_logprobs) - recompute(models[0], item, 0.8)).abs().max() > 0.05


def test_a_request_the_server_refuses_is_one_clear_error(generator: VllmGenerator) -> None:
    too_long = Request("p", tuple(range(10, 60)), seed=0)

    with pytest.raises(GeneratorError, match=r"vLLM answered 400"):
        generator.generate([too_long], SamplingPlan(num_samples=1))


def test_a_model_it_cannot_serve_is_reported_with_the_end_of_the_servers_log(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(GeneratorError, match=r"vLLM ended while starting; .*generator.log ends with:"):
        VllmGenerator(
            tmp_path / "empty",
            CONFIG,
            eos_token_id=EOS,
            seed=0,
            log_path=tmp_path / "generator.log",
            policy_version=0,
        )
