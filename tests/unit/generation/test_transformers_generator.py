from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.common.errors import GeneratorError, SettingError
from stages.data.batches import collate
from stages.data.text import TokenSequence
from stages.generation.config import FleetConfig, GenerationConfig
from stages.generation.protocol import (
    Event,
    Finished,
    Generator,
    Group,
    Published,
    Request,
    SamplingPlan,
    Ticket,
    WeightsUpdate,
    generate,
)
from stages.generation.start import GeneratorSettings, start_generator
from stages.generation.transformers_generator import draw_tokens
from stages.learner.logprobs import compute_logprobs
from stages.models.load import load_policy
from tests.tiny import save_tiny_model

CONFIG = GenerationConfig(engine="transformers", temperature=0.7, max_new_tokens=6, max_prompt_tokens=20, dtype="fp32")
REQUESTS = [Request("a", (5, 6), seed=1), Request("b", (7, 8, 9), seed=2)]
GREEDY = SamplingPlan(num_samples=0, with_greedy=True)
Span = tuple[str, str, float, float, int]


@contextmanager
def start(path: Path, spans: list[Span] | None = None, config: GenerationConfig = CONFIG) -> Iterator[Generator]:
    model = save_tiny_model(path / "first", seed=0)

    def record(*span: str | float | int) -> None:
        if spans is not None:
            spans.append(span)  # type: ignore[arg-type]

    with start_generator(model, config, log_dir=path, record=record) as generator:
        yield generator


def texts(groups: list[Group]) -> list[tuple[int, ...]]:
    return [completion.token_ids for group in groups for completion in group]


def wait_for(generator: Generator, number: int) -> list[Event]:
    events: list[Event] = []
    while len(events) < number:
        events += generator.wait(timeout_s=30)
    return events


@pytest.mark.parametrize("prompts_at_once", [1, 2])
def test_sampling_logprobs_are_the_learners_at_the_same_version(tmp_path: Path, prompts_at_once: int) -> None:
    config = CONFIG.model_copy(update={"prompts_at_once": prompts_at_once, "max_new_tokens": 30})
    with start(tmp_path, config=config) as generator:
        groups = generate(generator, REQUESTS, SamplingPlan(num_samples=64))

    completions = [item for group in groups for item in group]
    assert len({len(item.token_ids) for item in completions}) > 3, "rows have to leave the batch at different tokens"
    batch = collate([TokenSequence(item.prompt_ids, item.token_ids) for item in completions])
    logprobs = compute_logprobs(load_policy(tmp_path / "first", torch.float32), batch, temperature=0.7)
    for item, row, mask in zip(completions, logprobs, batch.completion_mask, strict=True):
        torch.testing.assert_close(row[mask], torch.tensor(item.sampling_logprobs), atol=1e-4, rtol=1e-4)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    draws = [
        torch.Generator().manual_seed(seed) for seed in range(10_000)
    ]  # seeds of a prompt's samples follow each other

    counts = draw_tokens(probabilities.expand(len(draws), -1), draws).bincount(minlength=6)

    deviation = (len(draws) * probabilities * (1 - probabilities)).sqrt()
    assert bool(((counts - len(draws) * probabilities).abs() <= 3 * deviation).all())


def test_a_prompts_samples_depend_on_neither_its_neighbours_nor_global_state(tmp_path: Path) -> None:
    plan = SamplingPlan(num_samples=2, with_greedy=True)
    with start(tmp_path) as generator:
        together = generate(generator, REQUESTS, plan)
        torch.manual_seed(123)

        assert generate(generator, REQUESTS[1:], plan) == together[1:]


def test_prompts_sampled_at_once_get_the_samples_that_each_gets_alone(tmp_path: Path) -> None:
    plan = SamplingPlan(num_samples=2, with_greedy=True)
    spans: list[Span] = []
    with start(tmp_path) as generator:
        alone = generate(generator, REQUESTS, plan)
    with start(tmp_path, spans, CONFIG.model_copy(update={"prompts_at_once": 2})) as generator:
        generator.submit(Ticket(0, REQUESTS[0], plan))
        generator.submit(Ticket(1, REQUESTS[1], plan))
        generator.publish(WeightsUpdate(1, tmp_path / "first"))
        generator.submit(Ticket(2, REQUESTS[1], plan))
        first, second, _, third = wait_for(generator, 4)

    groups = [event.group for event in (first, second, third) if isinstance(event, Finished)]
    assert texts(groups) == texts([alone[0], alone[1], alone[1]])
    for together, single in zip(groups, alone, strict=False):
        pairs = zip(together, single, strict=True)
        assert all(item.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-4) for item, other in pairs)
    assert [(kind, version) for _, kind, _, _, version in spans] == [("generate", 0), ("swap", 1), ("generate", 1)]


def test_prompts_at_once_are_refused_where_vllm_batches() -> None:
    with pytest.raises(ValueError, match=r"generation\.prompts_at_once=4 does nothing with generation.engine='vllm'"):
        GenerationConfig(engine="vllm", max_new_tokens=6, max_prompt_tokens=20, prompts_at_once=4)


def test_what_is_submitted_before_a_publication_is_sampled_by_the_older_weights(tmp_path: Path) -> None:
    new = save_tiny_model(tmp_path / "new", seed=4)
    spans: list[Span] = []
    with start(tmp_path, spans) as generator:
        generator.submit(Ticket(0, REQUESTS[0], GREEDY))
        generator.publish(WeightsUpdate(3, new))
        generator.submit(Ticket(1, REQUESTS[0], GREEDY, attempt=1))
        before, published, after = wait_for(generator, 3)

    assert isinstance(before, Finished)
    assert isinstance(published, Published)
    assert isinstance(after, Finished)
    assert (before.ticket.number, before.group[0].first_policy_version) == (0, 0)
    assert (published.policy_version, published.replica) == (3, "generator-0")
    assert (after.ticket.number, after.ticket.attempt, after.group[0].last_policy_version) == (1, 1, 3)
    assert before.group[0].token_ids != after.group[0].token_ids
    assert [(kind, version) for _, kind, _, _, version in spans] == [("generate", 0), ("swap", 3), ("generate", 3)]


def test_a_file_with_a_part_of_the_tensors_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    new = save_tiny_model(tmp_path / "new", seed=4)
    tensors = load_file(new / "model.safetensors")
    part = {name: tensor for name, tensor in tensors.items() if "layers.1." in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in part}
    save_file(part, tmp_path / "part.safetensors")
    save_file(rest, tmp_path / "rest.safetensors")
    with start(tmp_path) as generator:
        groups = []
        for version, name in enumerate(["new", "first", "part.safetensors", "rest.safetensors"], start=1):
            generator.publish(WeightsUpdate(version, tmp_path / name))
            groups.append(texts(generate(generator, REQUESTS, GREEDY)))

    whole, old, mixed, completed = groups
    assert mixed not in (whole, old)
    assert completed == whole
    assert (tmp_path / "part.safetensors").exists()


def test_a_temporary_file_is_deleted_once_it_is_loaded(tmp_path: Path) -> None:
    new = save_tiny_model(tmp_path / "new", seed=4)
    with start(tmp_path) as generator:
        generator.publish(WeightsUpdate(1, new / "model.safetensors", is_temporary=True))
        wait_for(generator, 1)

    assert not (new / "model.safetensors").exists()


def test_what_goes_wrong_in_the_background_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    save_file({"model.layers.9.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with start(tmp_path) as generator:
        generator.publish(WeightsUpdate(1, tmp_path / "other.safetensors"))

        with pytest.raises(GeneratorError, match=r"other.safetensors: the model has no tensor 'model.layers.9.weight'"):
            generate(generator, REQUESTS, GREEDY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GeneratorSettings(weight_update="in_flight"), r"rl.weight_update='in_flight' .*allowed: 'drain'"),
        (GeneratorSettings(publish="nccl"), r"rl.publish='nccl' .*allowed: 'files'"),
        (GeneratorSettings(fleet=FleetConfig(replicas=2)), r"rl.generator.replicas=2 .*allowed: 1"),
        (
            GeneratorSettings(fleet=FleetConfig(urls=("http://a:1",), weights_dir="/shared")),
            r"rl.generator.urls=\['http://a:1'\] .*allowed: \[\]",
        ),
        (GeneratorSettings(fleet=FleetConfig(kv_cache="recompute")), r"rl.generator.kv_cache='recompute' .*: 'keep'"),
    ],
)
def test_what_only_servers_can_do_is_refused(tmp_path: Path, settings: GeneratorSettings, message: str) -> None:
    with (
        pytest.raises(SettingError, match=message),
        start_generator(tmp_path, CONFIG, log_dir=tmp_path, settings=settings),
    ):
        pass
