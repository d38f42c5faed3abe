"""Real vLLM servers on a two-layer model: tokens, logprobs, weight swaps, lost servers, and nothing left afterwards."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.common.errors import GeneratorError
from stages.common.process import free_port, guard_command, stop_guard
from stages.data.batches import collate
from stages.data.records import Completion
from stages.data.text import TokenSequence
from stages.generation.config import FleetConfig, GenerationConfig
from stages.generation.fleet import Fleet
from stages.generation.probe import ProbeError
from stages.generation.protocol import (
    Event,
    Finished,
    Lost,
    Probe,
    Published,
    Request,
    SamplingPlan,
    Ticket,
    WeightsUpdate,
    generate,
)
from stages.generation.start import GeneratorSettings, start_generator
from stages.learner.logprobs import compute_logprobs
from stages.models.load import load_policy, save_model
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
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
LONG = CONFIG.model_copy(update={"max_new_tokens": 400})
REQUESTS = [Request(f"p{index}", tuple(range(10, 14 + index)), seed=100 * index) for index in range(3)]
PROBE_IDS = tuple(range(40, 70))
TOLERANCE = 2e-3
"""Nats between vLLM's kernels and transformers' in float32."""


@dataclass(frozen=True)
class Models:
    """Two whose log-probabilities differ by 1.6 nats a token, and by 1.1 if one reads the other's keys and values."""

    old: Path
    new: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return Models(save_decided_model(folder / "old", seed=0), save_decided_model(folder / "new", seed=1))


@pytest.fixture(scope="module")
def fleet(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A server of its own."""
    with start_generator(models.old, CONFIG, log_dir=tmp_path_factory.mktemp("server")) as running:
        assert isinstance(running, Fleet)
        yield running
    children = psutil.Process(os.getpid()).children(recursive=True)
    commands = [" ".join(child.cmdline()) for child in children]
    assert [command for command in commands if "vllm" in command and "stages.serve" not in command] == []


@pytest.fixture(scope="module")
def served(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server started by hand."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    settings = LONG.model_dump_json(exclude={"cpu_cores"})
    (folder / "params.yaml").write_text(f"generation: {settings}\n")
    command = [sys.executable, "-m", "stages.serve", "--model", str(models.old), "--port", str(port), "--devices", "0"]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            guard_command(command, signal_group=False),
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        stop_guard(process, 20)
    assert f"rl.generator.urls: [http://127.0.0.1:{port}]" in (folder / "serve.log").read_text()


@contextmanager
def open_fleet(
    models: Models, url: str, *, config: GenerationConfig = LONG, in_flight: bool = False, **fleet: object
) -> Iterator[Fleet]:
    """A fleet of the server at `url`, which it brings to the old weights, and leaves running."""
    settings = GeneratorSettings(
        fleet=FleetConfig.model_validate({"replicas": 0, "urls": [url], "weights_dir": "unused"} | fleet),
        devices=(),
        weight_update="in_flight" if in_flight else "drain",
    )
    with start_generator(models.old, config, log_dir=Path("unused"), settings=settings) as running:
        assert isinstance(running, Fleet)
        yield running


def save_decided_model(path: Path, seed: int) -> Path:
    model = tiny_llama(seed, head_dim=32)  # the smallest head the CPU engine's attention has
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.0)
        model.get_input_embeddings().weight[EOS] = 0.0  # so that it is sampled once in 700 tokens
    save_model(model, tiny_tokenizer(), path)
    return path


def save_mixture(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_decided_model(path, seed=0)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def recompute(model: Path, completion: Completion, temperature: float = 0.8) -> torch.Tensor:
    batch = collate([TokenSequence(completion.prompt_ids, completion.token_ids)])
    with torch.no_grad():
        return compute_logprobs(load_policy(model, torch.float32), batch, temperature)[0]


def largest_gap(model: Path, completion: Completion) -> float:
    return (torch.tensor(completion.sampling_logprobs) - recompute(model, completion)).abs().max().item()


def make_probe(model: Path) -> Probe:
    batch = collate([TokenSequence(PROBE_IDS[:1], PROBE_IDS[1:])])
    with torch.no_grad():
        logprobs = compute_logprobs(load_policy(model, torch.float32), batch, temperature=1.0)
    return Probe(PROBE_IDS, tuple(logprobs[0].tolist()))


def wait_for(fleet: Fleet, is_enough: Callable[[list[Event]], bool], timeout_s: float = 120) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + timeout_s
    while not is_enough(events):
        assert time.monotonic() < deadline, f"timed out with {events}"
        events += fleet.wait(timeout_s=1.0)
    return events


def count_tokens(url: str, kind: str = "generation_tokens") -> float:
    """Tokens the server has sampled since it was started, or of another kind that it counts."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    return sum(float(value) for value in re.findall(rf"^vllm:{kind}_total\{{.*\}} (\S+)$", text, re.MULTILINE))


@pytest.mark.timeout(400)
def test_samples_carry_the_logprobs_of_the_distribution_they_came_from(fleet: Fleet, models: Models) -> None:
    groups = generate(fleet, REQUESTS, SamplingPlan(num_samples=3, with_greedy=True))

    assert [[item.prompt_id for item in group] for group in groups] == [["p0"] * 4, ["p1"] * 4, ["p2"] * 4]
    for group in groups:
        assert [item.is_greedy for item in group] == [False, False, False, True]
        assert [item.sample_index for item in group] == [0, 1, 2, 0]
        assert {(item.first_policy_version, item.last_policy_version) for item in group} == {(0, 0)}
        for item in group[:3]:
            assert item.is_finished == (item.token_ids[-1] == EOS)
            assert largest_gap(models.old, item) < TOLERANCE


def test_the_greedy_completion_is_made_of_the_most_likely_tokens(fleet: Fleet, models: Models) -> None:
    ((greedy,),) = generate(fleet, REQUESTS[:1], SamplingPlan(num_samples=0, with_greedy=True))

    ids = torch.tensor([greedy.prompt_ids + greedy.token_ids])
    with torch.no_grad():
        best = load_policy(models.old, torch.float32)(ids).logits[0].argmax(dim=-1)
    start = len(greedy.prompt_ids) - 1
    assert tuple(best[start : start + len(greedy.token_ids)].tolist()) == greedy.token_ids


def test_the_same_seeds_give_the_same_completions_and_others_do_not(fleet: Fleet) -> None:
    plan = SamplingPlan(num_samples=2)
    again = [Request(item.prompt_id, item.prompt_ids, item.seed) for item in REQUESTS]
    other = [Request(item.prompt_id, item.prompt_ids, item.seed + 7) for item in REQUESTS]

    first, second, third = (generate(fleet, requests, plan) for requests in (REQUESTS, again, other))

    assert first == second
    assert [[c.token_ids for c in g] for g in first] != [[c.token_ids for c in g] for g in third]


def test_a_publication_waits_for_what_was_submitted_before_it(fleet: Fleet, models: Models) -> None:
    plan = SamplingPlan(num_samples=4)  # 4 prompts at once
    for number in range(24):
        if number == 12:
            fleet.publish(WeightsUpdate(5, models.new))
        fleet.submit(Ticket(number, REQUESTS[number % 3], plan))

    events = wait_for(fleet, lambda events: sum(isinstance(event, Finished) for event in events) == 24)

    kinds = [type(event) for event in events]
    assert kinds == [Finished] * 12 + [Published] + [Finished] * 12
    for event in events:
        if isinstance(event, Finished):
            old, version = event.ticket.number < 12, event.group[0].first_policy_version
            assert version == (0 if old else 5)
            # The second half has the prompts of the first, whose keys and values are the old weights'.
            for item in event.group:
                assert item.token_policy_versions == ()
                assert largest_gap(models.old if old else models.new, item) < TOLERANCE
                assert largest_gap(models.new if old else models.old, item) > 0.05


def test_a_file_with_a_part_of_the_tensors_leaves_the_others_as_they_are(
    fleet: Fleet, models: Models, tmp_path: Path
) -> None:
    old, new = load_file(models.old / "model.safetensors"), load_file(models.new / "model.safetensors")
    part = {name: tensor for name, tensor in new.items() if "layers.1." in name}
    head = {name: tensor for name, tensor in new.items() if "embed" in name}
    save_file(part, tmp_path / "part.safetensors")
    save_file(head, tmp_path / "head.safetensors")
    fleet.publish(WeightsUpdate(6, models.old))
    for version, name, mixed in ((7, "part", old | part), (8, "head", old | part | head)):
        reference = save_mixture(tmp_path / f"reference-{name}", mixed)

        fleet.publish(WeightsUpdate(version, tmp_path / f"{name}.safetensors"))
        groups = generate(fleet, REQUESTS, SamplingPlan(num_samples=1))

        for (item,) in groups:
            assert item.last_policy_version == version
            assert largest_gap(reference, item) < TOLERANCE


def test_temporary_weights_are_deleted_when_newer_ones_are_loaded(fleet: Fleet, models: Models, tmp_path: Path) -> None:
    for version in (9, 10):
        path = tmp_path / f"v{version}.safetensors"
        save_file(load_file(models.new / "model.safetensors"), path)
        fleet.publish(WeightsUpdate(version, path, is_temporary=True))
        wait_for(fleet, lambda events: any(isinstance(event, Published) for event in events))

    # Kept while they are the newest: a server that is started again needs them.
    assert [path.name for path in tmp_path.iterdir()] == ["v10.safetensors"]


@pytest.mark.timeout(400)
def test_a_killed_server_is_started_again_with_the_newest_weights(fleet: Fleet, models: Models) -> None:
    fleet.publish(WeightsUpdate(11, models.new, make_probe(models.new)))
    generate(fleet, REQUESTS[:1], SamplingPlan(1))
    ((name, guard),) = fleet.pids().items()
    server = psutil.Process(guard).children()[0]
    for number in range(40):
        fleet.submit(Ticket(number, REQUESTS[number % 3], SamplingPlan(num_samples=8)))
    server.send_signal(signal.SIGKILL)

    events = wait_for(fleet, lambda events: sum(isinstance(event, Finished) for event in events) == 40, 200)

    lost = [event for event in events if isinstance(event, Lost)]
    finished = [event for event in events if isinstance(event, Finished)]
    assert lost
    assert {event.reason for event in lost} == {"replica_lost"}
    assert sorted(event.ticket.number for event in finished) == list(range(40))
    attempts = {event.ticket.number: event.ticket.attempt for event in finished}
    assert attempts == {number: sum(event.ticket.number == number for event in lost) for number in range(40)}
    assert fleet.pids().keys() == {name}
    assert fleet.pids()[name] != guard
    for event in finished:
        assert {item.last_policy_version for item in event.group} == {11}
    assert largest_gap(models.new, finished[-1].group[0]) < TOLERANCE


@pytest.mark.timeout(400)
def test_completions_end_with_the_end_token_or_at_the_limit(served: str, models: Models) -> None:
    with open_fleet(models, served) as fleet:
        groups = generate(fleet, REQUESTS, SamplingPlan(num_samples=5))

    finished = [item for group in groups for item in group if item.is_finished]
    cut = [item for group in groups for item in group if not item.is_finished]
    assert finished
    assert cut
    assert all(EOS not in item.token_ids[:-1] and item.token_ids[-1] == EOS for item in finished)
    assert all(EOS not in item.token_ids and len(item.token_ids) == LONG.max_new_tokens for item in cut)
    assert max(largest_gap(models.old, item) for item in (*finished, *cut)) < TOLERANCE


def test_the_samples_of_a_short_prompt_read_it_once(served: str, models: Models) -> None:
    prompt = Request("long", tuple(range(10, 10 + 40)), seed=0)  # a block of 32 tokens and a part of one
    config = LONG.model_copy(update={"max_prompt_tokens": 40, "max_new_tokens": 4})

    with open_fleet(models, served, config=config) as fleet:
        generate(fleet, REQUESTS[:1], SamplingPlan(num_samples=1))  # the server is up
        before = count_tokens(served, "prefix_cache_hits")
        generate(fleet, [prompt], SamplingPlan(num_samples=5))

    assert count_tokens(served, "prefix_cache_hits") - before == 4 * 32


@pytest.mark.parametrize("kv_cache", ["keep", "recompute"])
def test_in_flight_a_completion_goes_on_with_the_new_weights(served: str, models: Models, kv_cache: str) -> None:
    with open_fleet(models, served, in_flight=True, kv_cache=kv_cache) as fleet:
        generate(fleet, REQUESTS[:1], SamplingPlan(num_samples=1))  # it has joined
        update = WeightsUpdate(1, models.new, make_probe(models.new))
        enough = count_tokens(served) + 12 * 40  # of at most 12 * 400
        for number, request in enumerate(REQUESTS):
            fleet.submit(Ticket(number, request, SamplingPlan(num_samples=4)))
        while count_tokens(served) < enough:
            time.sleep(0.01)
        fleet.publish(update)
        events = wait_for(fleet, lambda events: sum(isinstance(event, Finished) for event in events) == 3)

    assert [event.policy_version for event in events if isinstance(event, Published)] == [1]
    groups = [event.group for event in events if isinstance(event, Finished)]
    swapped = [item for group in groups for item in group if item.token_policy_versions]
    assert len(swapped) > 4
    after_old, after_new = [], []
    for item in swapped:
        assert (item.first_policy_version, item.last_policy_version) == (0, 1)
        cut = item.token_policy_versions.index(1)
        assert item.token_policy_versions == (0,) * cut + (1,) * (len(item.token_ids) - cut)
        sampled = torch.tensor(item.sampling_logprobs)
        assert (sampled - recompute(models.old, item))[:cut].abs().max() < TOLERANCE
        after_old.append((sampled - recompute(models.old, item))[cut:].abs())
        after_new.append((sampled - recompute(models.new, item))[cut:].abs())
    assert torch.cat(after_old).mean() > 0.5
    if kv_cache == "recompute":
        assert torch.cat(after_new).max() < TOLERANCE
    else:  # the new weights read the old ones' keys and values
        assert torch.cat(after_new).mean() > 0.5


@pytest.mark.parametrize("fault", ["lost", "half", "small"])
def test_weights_that_did_not_arrive_end_the_run(served: str, models: Models, tmp_path: Path, fault: str) -> None:
    old, new = load_file(models.old / "model.safetensors"), load_file(models.new / "model.safetensors")
    save_file({name: tensor for name, tensor in new.items() if "layers.1." in name}, tmp_path / "half.safetensors")
    nearby = save_mixture(tmp_path / "nearby", {name: old[name] + 0.1 * (new[name] - old[name]) for name in old})
    update, message = {
        "lost": (WeightsUpdate(2, models.old, make_probe(models.new)), "differ from the learner's by [1-9]"),
        "half": (WeightsUpdate(2, tmp_path / "half.safetensors", make_probe(models.new)), "differ from the learner's"),
        "small": (WeightsUpdate(2, models.old, make_probe(nearby)), "shows -?0% of the change since policy_version=1"),
    }[fault]
    with open_fleet(models, served) as fleet:
        generate(fleet, REQUESTS[:1], SamplingPlan(num_samples=1))  # it has joined
        fleet.publish(WeightsUpdate(1, models.old, make_probe(models.old)))
        wait_for(fleet, lambda events: any(isinstance(event, Published) for event in events))

        fleet.publish(update)
        with pytest.raises(ProbeError, match=f"generator-0 does not serve policy_version=2: .*{message}"):
            generate(fleet, REQUESTS, SamplingPlan(num_samples=1))


def test_a_part_of_a_fused_layer_is_not_loaded(served: str, models: Models, tmp_path: Path) -> None:
    new = load_file(models.new / "model.safetensors")
    save_file({name: tensor for name, tensor in new.items() if "q_proj" in name}, tmp_path / "part.safetensors")
    with open_fleet(models, served) as fleet:
        generate(fleet, REQUESTS[:1], SamplingPlan(num_samples=1))  # the server is up

    answer = httpx.post(
        f"{served}/collective_rpc",
        json={"method": "load_published", "kwargs": {"path": str(tmp_path / "part.safetensors")}},
        timeout=60,
    )

    assert answer.status_code == 500
    with open_fleet(models, served) as fleet:
        groups = generate(fleet, REQUESTS, SamplingPlan(num_samples=1))
    assert max(largest_gap(models.old, item) for group in groups for item in group) < TOLERANCE


def test_a_request_the_server_refuses_is_one_clear_error(served: str, models: Models) -> None:
    too_long = Request("p", tuple(range(10, 60)) * 10, seed=0)

    with (
        open_fleet(models, served, max_attempts=2) as fleet,
        pytest.raises(GeneratorError, match=r"answered 400: .*prompt p had rl.generator.max_attempts=2"),
    ):
        generate(fleet, [too_long], SamplingPlan(num_samples=1))


def test_a_server_that_does_not_start_is_reported_with_the_end_of_its_log(models: Models, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"engine_args": ("--no-such-argument",)})

    with (
        pytest.raises(GeneratorError) as caught,
        start_generator(models.old, config, log_dir=tmp_path) as generator,
    ):
        generate(generator, REQUESTS, SamplingPlan(num_samples=1))

    first, *rest = str(caught.value).splitlines()
    assert first == f"generator-0: vLLM ended while starting; {tmp_path}/generator-0.log ends with:"
    assert "unrecognized arguments: --no-such-argument" in rest[-1]
