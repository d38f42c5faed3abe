"""From the learner to the generators: the tensors that training changes, versioned, complete or absent."""

import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from stages.common.errors import RunError
from stages.common.publish import sync_path, sync_tree
from stages.data.batches import SequenceBatch, collate
from stages.data.text import TokenSequence
from stages.generation.config import Publish
from stages.generation.protocol import Probe, WeightsUpdate
from stages.learner.ranks import ALONE, Ranks
from stages.models.load import name_as_stored, select_device
from stages.rl.rollouts import Reference
from stages.rl.slots import Slots

logger = logging.getLogger(__name__)

CollectWeights = Callable[[], dict[str, Tensor]]
"""Every weight of a model by name; `Learner.collect_weights`."""
SHARED_MEMORY = Path("/dev/shm")
PROBE_TOKENS = 32
"""At most; the bounds of stages/generation/probe.py are means over them. A publication takes longer with more."""
_PREFIX = "slipstream-"
_LOCK = ".lock"
"""Held by the run whose directory it is in."""
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)
"""Another file system, one without hard links, or too many of them."""


class Published(Protocol):
    """What is published: a learner."""

    @property
    def model(self) -> PreTrainedModel:
        """The model under training."""

    def collect_trained(self) -> dict[str, Tensor]:
        """A bf16 copy of the tensors that training changes, whole, by name."""


class Publisher(Protocol):
    """Takes a version's trained tensors out of the learner, for the generators."""

    num_bytes: int
    """Size of the newest version."""

    def write(self, learner: Published, policy_version: int) -> WeightsUpdate:
        """The trained tensors of this version, as they are now: the learner may train on right away."""


class ProbeText:
    """A text whose log-probabilities tell versions apart; see stages/generation/probe.py.

    Args:
        token_ids: of the text.
        dtype: compute type of the learner.
        max_gap: largest mean difference of the log-probabilities, in nats a token.
        ranks: that have the learner.
        trunk_depth: lower blocks that are never trained; see stages/learner/trunk.py.
    """

    def __init__(
        self, token_ids: tuple[int, ...], dtype: str, max_gap: float, ranks: Ranks = ALONE, trunk_depth: int = 0
    ) -> None:
        self._token_ids = token_ids[:PROBE_TOKENS]
        self._dtype = dtype
        self._max_gap = max_gap
        self._ranks = ranks
        self._trunk_depth = trunk_depth
        self._batch: SequenceBatch | None = None

    def compute(self, model: PreTrainedModel) -> Probe:
        """What the learner says to it."""
        reference = Reference(model, self._dtype, temperature=1.0, trunk_depth=self._trunk_depth)
        if self._batch is None:  # with what the trunk gives for this text, which holds for the whole run
            text = TokenSequence(self._token_ids[:1], self._token_ids[1:])
            (self._batch,) = reference.read_trunks([collate([text], select_device())])
        (logprobs,) = self._ranks.map(reference.compute, [self._batch])
        return Probe(self._token_ids, tuple(logprobs[0].tolist()), self._max_gap)


class FilesPublisher:
    """Writes what a version changed against the SFT model, in bf16, the type generators compute in.

    Args:
        directory: shared memory, or a directory that all servers see.
        probe: goes with every version.
    """

    def __init__(self, directory: Path, probe: ProbeText) -> None:
        self._directory = directory
        self._probe = probe
        # Elsewhere, other machines may still hold what a file said before.
        self._slots = Slots(directory) if directory.is_relative_to(SHARED_MEMORY) else None
        self.num_bytes = 0
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, learner: Published, policy_version: int) -> WeightsUpdate:
        """See `Publisher.write`: a file, whole or absent.

        Raises:
            RunError: it cannot be written.
        """
        target = self._directory / f"v{policy_version}.safetensors"
        tensors = learner.collect_trained()
        try:
            if self._slots:
                self._slots.write(tensors, target)
            else:
                staged = target.with_suffix(".part")
                save_file(tensors, staged)
                staged.replace(target)
        except (OSError, SafetensorError) as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise RunError(
                f"{self._directory}: weights of {size:,} bytes cannot be published there: {error}; "
                "rl.generator.weights_dir names another directory"
            ) from error
        self.num_bytes = target.stat().st_size
        return WeightsUpdate(policy_version, target, self._probe.compute(learner.model), is_temporary=True)


class TensorsPublisher:
    """Keeps a copy of the same on the learner's device, until every server has taken it or a newer one.

    Args:
        probe: goes with every version.
    """

    def __init__(self, probe: ProbeText) -> None:
        self._probe = probe
        self.num_bytes = 0

    def write(self, learner: Published, policy_version: int) -> WeightsUpdate:
        """See `Publisher.write`."""
        device = select_device()
        tensors = {name: tensor.to(device) for name, tensor in learner.collect_trained().items()}
        self.num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        probe = self._probe.compute(learner.model)
        if torch.cuda.is_available():  # it is sent from other threads, on other streams
            torch.cuda.current_stream().synchronize()
        return WeightsUpdate(policy_version, None, probe, tensors=tensors)


def make_publisher(publish: Publish, directory: Path, probe: ProbeText) -> Publisher:
    """The one that `rl.publish` asks for."""
    return FilesPublisher(directory, probe) if publish == "files" else TensorsPublisher(probe)


def export_policy(collect: CollectWeights, template: Path, policy_version: int, target: Path) -> None:
    """Write a complete model directory with a `version.json`, beside `target` first.

    Args:
        collect: gives the learner's weights.
        template: model directory with config and tokenizer.
        policy_version: updates applied to them.
        target: is replaced; an empty directory that is there is filled.
    """
    staged = target.with_name(f".{target.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    staged.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(template, staged, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = name_as_stored(collect(), template)
    save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
    (staged / "version.json").write_text(json.dumps({"policy_version": policy_version}))
    _put_in_place(staged, target)


def link_policy(source: Path, target: Path) -> None:
    """A model directory under a second name: its files are hard links where the file system has them, else copies.

    Args:
        source: nothing may write into its files afterwards; they are replaced as a whole.
        target: is replaced; an empty directory that is there is filled.
    """
    staged = target.with_name(f".{target.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(source, staged, copy_function=_link_or_copy)
    _put_in_place(staged, target)


def _put_in_place(staged: Path, target: Path) -> None:
    """On disk before it has its name: a checkpoint that names it survives the loss of the machine, so it must too."""
    sync_tree(staged)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    sync_path(target.parent)


def copy_policy(source: Path, target: Path) -> None:
    """Copy a model directory, its `version.json` with it."""
    shutil.copytree(source, target, dirs_exist_ok=True)


@contextmanager
def open_scratch(weights_dir: str | None, fallback: Path, num_bytes: int) -> Iterator[Path]:
    """A directory for published weights: as set, in shared memory, or on disk; removed afterwards.

    What a killed run left in shared memory is removed by the guards of its servers, and here if they were killed too.

    Args:
        weights_dir: `rl.generator.weights_dir`.
        fallback: used where there is no shared memory, or too little of it.
        num_bytes: of all versions that there may be at once.
    """
    if weights_dir in (None, str(SHARED_MEMORY)) and os.access(SHARED_MEMORY, os.W_OK):
        _remove_orphans(SHARED_MEMORY)  # elsewhere, the processes of other machines cannot be seen
    parent = Path(weights_dir) if weights_dir is not None else _choose_parent(fallback, num_bytes)
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
    with (directory / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _choose_parent(fallback: Path, num_bytes: int) -> Path:
    """Shared memory, where it has room: a container's often has 64 MiB."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        return fallback
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free >= num_bytes:
        return SHARED_MEMORY
    logger.warning(
        "weights are published on disk, in %s: %s has %d bytes free, those that may be there at once need %d",
        *(fallback, SHARED_MEMORY, free, num_bytes),
    )
    return fallback


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copy2(source, target)


def _remove_orphans(parent: Path) -> None:
    for directory in parent.glob(f"{_PREFIX}*-*"):
        pid = directory.name.removeprefix(_PREFIX).split("-")[0]
        # A container's process may share this memory, and not be seen from here: it still holds its lock.
        if pid.isdigit() and not psutil.pid_exists(int(pid)) and not _is_locked(directory / _LOCK):
            shutil.rmtree(directory, ignore_errors=True)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # there is none
    return False
