"""How long do new weights take from the learner to a generator: by files, by broadcast (NCCL), by shared memory (IPC)?

    python bench/gpu/weight_transfer.py --size 1b --out FILE.json
    python bench/gpu/weight_transfer.py --servers --model artifacts/sft --out FILE.json

Without `--servers` two processes of plain PyTorch send a whole model in bf16, chunk by chunk, and the receiver copies
it into a model of its own: what the way itself costs. A broadcast needs a second GPU; with `--device cpu` it is gloo's.
With `--servers` real vLLM servers take the weights of `--model` as in a run (`rl.publish`), pause and probe included;
`ipc` then puts server and learner on one GPU.
"""

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing

CHUNK_BYTES = 2**28
LIMIT = datetime.timedelta(minutes=5)
WAYS = ("files", "broadcast", "shared memory")
PUBLISH = ("files", "nccl", "ipc")


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--servers", action="store_true", help="measure real vLLM servers, in --model")
    parser.add_argument("--model", type=Path, help="directory of a model, for --servers")
    parser.add_argument("--engine-args", nargs="*", default=["--gpu-memory-utilization=0.4"], help="for --servers")
    arguments = common.parse(parser)
    report: dict[str, Any] = common.describe(arguments) | {"arms": {}, "skipped": {}}
    if arguments.servers:
        measure_servers(arguments, report)
    else:
        measure_ways(arguments, report)
    common.finish(report, arguments.out)


def measure_ways(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Every way between two processes."""
    is_cuda, num_gpus = arguments.device == "cuda", torch.cuda.device_count()
    report["skipped"]["vLLM servers"] = "not asked for; see --servers"
    for way in WAYS:
        if way == "broadcast" and is_cuda and num_gpus < 2:
            report["skipped"][way] = "NCCL joins two GPUs, there is one"
            continue
        receiver = "cuda:1" if is_cuda and way == "broadcast" else "cuda:0" if is_cuda else "cpu"
        report["arms"][way] = measure_way(way, arguments, receiver)


def measure_way(way: str, arguments: argparse.Namespace, receiver: str) -> dict[str, Any]:
    """The sender is this process; a send is over when the receiver says that it has copied everything."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="transfer-", dir=find_shared_memory()) as folder:
        process = context.Process(target=receive, args=(way, arguments.size, receiver, folder, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the receiver's end is noticed
        model = common.make_model(arguments.size, arguments.device, torch.bfloat16)
        weights = {name: item.detach() for name, item in model.named_parameters()}
        send = Sender(way, arguments.device, folder, ours)
        seconds = common.time_steps(lambda: send(weights), arguments.steps, arguments.device)
        largest_gap = send.finish(weights)
        process.join(60)
    num_bytes = sum(item.nbytes for item in weights.values())
    timing = common.summarise(seconds)
    gbytes_per_s = num_bytes / statistics.median(seconds) / 1e9
    return timing | {"bytes": num_bytes, "gigabytes_per_s": gbytes_per_s, "largest_gap": largest_gap}


class Sender:
    """The learner's end of a way."""

    def __init__(self, way: str, device: str, folder: str, pipe: Any) -> None:
        self._way, self._folder, self._pipe = way, Path(folder), pipe
        if way == "broadcast":
            join_group(0, "nccl" if device == "cuda" else "gloo", folder, "cuda:0" if device == "cuda" else "cpu")
        pipe.recv()  # it is ready

    def __call__(self, weights: dict[str, Tensor]) -> None:
        if self._way == "files":
            path = self._folder / "weights.safetensors"
            save_file({name: item.cpu() for name, item in weights.items()}, path)
            self._tell(str(path))
            return
        for names in split(weights):
            packed = pack(weights, names)
            if self._way == "broadcast":
                self._pipe.send(names)
                distributed.broadcast(packed, src=0)
                self._wait()
            else:
                self._tell((names, packed))  # a handle of its memory

    def finish(self, weights: dict[str, Tensor]) -> float:
        """End the receiver; the largest difference between a weight that was sent and what it has."""
        self._pipe.send(None)
        sums: dict[str, float] = self._wait()
        if self._way == "broadcast":
            distributed.destroy_process_group()
        return max(abs(checksum(item) - sums[name]) for name, item in weights.items())

    def _tell(self, message: Any) -> None:
        self._pipe.send(message)
        self._wait()

    def _wait(self) -> Any:
        if not self._pipe.poll(LIMIT.total_seconds()):
            raise SystemExit(f"{self._way}: the receiver gave no answer within {LIMIT}")
        return self._pipe.recv()


def receive(way: str, size: str, device: str, folder: str, pipe: Any) -> None:
    """The generator's end, in a process of its own."""
    weights = {name: torch.zeros_like(item) for name, item in make_empty(size, device).items()}
    if way == "broadcast":
        pipe.send("joining")
        join_group(1, "nccl" if device != "cpu" else "gloo", folder, device)
    else:
        pipe.send("ready")
    while (message := pipe.recv()) is not None:
        if way == "files":
            taken = load_file(message, device=device)
            for name, item in taken.items():
                weights[name].copy_(item)
        elif way == "broadcast":
            packed = torch.empty(sum(weights[name].nbytes for name in message), dtype=torch.uint8, device=device)
            distributed.broadcast(packed, src=0)
            unpack(weights, message, packed)
        else:
            unpack(weights, message[0], message[1].to(device))
            message = None  # the sender's memory is let go of
        if device != "cpu":
            torch.cuda.synchronize(device)
        pipe.send("taken")
    pipe.send({name: checksum(item) for name, item in weights.items()})
    if way == "broadcast":
        distributed.destroy_process_group()


def make_empty(size: str, device: str) -> dict[str, Tensor]:
    if device != "cpu":
        torch.cuda.set_device(device)
    model = common.make_model(size, device, torch.bfloat16)
    return {name: item.detach() for name, item in model.named_parameters()}


def join_group(rank: int, backend: str, folder: str, device: str) -> None:
    if device != "cpu":
        torch.cuda.set_device(device)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=LIMIT)


def split(weights: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names in order, in chunks of at most `CHUNK_BYTES` or one tensor."""
    names: list[str] = []
    num_bytes = 0
    for name, item in weights.items():
        if names and num_bytes + item.nbytes > CHUNK_BYTES:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += item.nbytes
    if names:
        yield names


def pack(weights: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([weights[name].contiguous().view(-1).view(torch.uint8) for name in names])


def unpack(weights: dict[str, Tensor], names: list[str], packed: Tensor) -> None:
    parts = packed.split([weights[name].nbytes for name in names])
    for name, part in zip(names, parts, strict=True):
        weights[name].copy_(part.view(weights[name].dtype).view(weights[name].shape))


def checksum(item: Tensor) -> float:
    return float(item.double().abs().sum())


def find_shared_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def measure_servers(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Every way of `rl.publish` that this machine has."""
    if not common.is_installed("vllm"):
        report["skipped"]["vLLM servers"] = "vllm is not installed"
        return
    if arguments.model is None:
        raise SystemExit("--servers: --model is missing; expected a model directory, such as artifacts/sft")
    num_gpus = torch.cuda.device_count() if arguments.device == "cuda" else 0
    for publish in PUBLISH:
        if publish != "files" and num_gpus == 0:
            report["skipped"][publish] = "needs a GPU"
        elif publish == "nccl" and num_gpus < 2:
            report["skipped"][publish] = "NCCL joins two GPUs, there is one"
        else:
            report["arms"][publish] = measure_server(publish, arguments, num_gpus)


def learner_of(model: Any) -> Any:
    """A learner that has only its model."""
    from stages.learner.weights import collect_trained

    return SimpleNamespace(model=model, collect_trained=lambda: collect_trained(model))


def measure_server(publish: Any, arguments: argparse.Namespace, num_gpus: int) -> dict[str, Any]:
    """Seconds that a server was without work at each publication, as the timeline of a run has them."""
    from stages.generation.config import GenerationConfig
    from stages.generation.protocol import Published
    from stages.generation.start import GeneratorSettings, start_generator
    from stages.models.load import load_policy, move
    from stages.rl.placement import pin_this_process
    from stages.rl.weights import ProbeText, make_publisher

    learner = "1" if num_gpus > 1 and publish != "ipc" else "0"
    engine_args = tuple(arguments.engine_args) if num_gpus else ()
    config = GenerationConfig(max_new_tokens=64, max_prompt_tokens=64, engine_args=engine_args)
    seconds, written = [], []
    with tempfile.TemporaryDirectory(prefix="servers-", dir=find_shared_memory()) as name:
        settings = GeneratorSettings(devices=("0",), publish=publish)
        with start_generator(arguments.model, config, log_dir=Path(name), settings=settings) as generator:
            if num_gpus:
                pin_this_process(learner)
            model = load_policy(arguments.model, torch.float32)
            model = move(model, f"cuda:{learner}") if num_gpus else model
            publisher = make_publisher(publish, Path(name), ProbeText(tuple(range(2, 66)), "bf16", max_gap=1.0))
            for policy_version in range(1, arguments.steps + 3):  # the first two are not counted
                started = time.perf_counter()
                generator.publish(publisher.write(learner_of(model), policy_version))
                written.append(time.perf_counter() - started)
                events = wait_for(generator, Published)
                seconds.append(events[-1].seconds)
        num_bytes = publisher.num_bytes
    return common.summarise(seconds[2:]) | {"bytes": num_bytes, "learner": common.summarise(written[2:])}


def wait_for(generator: Any, kind: type) -> list[Any]:
    deadline = time.monotonic() + LIMIT.total_seconds()
    while time.monotonic() < deadline:
        events = [event for event in generator.wait(timeout_s=1.0) if isinstance(event, kind)]
        if events:
            return events
    raise SystemExit(f"no {kind.__name__} within {LIMIT}")


if __name__ == "__main__":
    main()
