"""Files of published weights in shared memory, written over and over: the kernel clears every page of a new one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_HEADER_LENGTH = 8
"""Bytes that hold the length of a safetensors file's header, at its start."""


class Slots:
    """Files with the same tensors of one version after another.

    Each has a second name for as long as a generator may read it. Who deletes that one gives the file back.

    Args:
        directory: in a file system with hard links.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._paths: list[Path] = []

    def write(self, tensors: Mapping[str, Tensor], target: Path) -> None:
        """A safetensors file, whole or absent.

        Args:
            tensors: of the same names, shapes and types each time.
            target: its second name, in the same file system.
        """
        free = next((path for path in self._paths if path.stat().st_nlink == 1), None)
        if free is None:
            free = self._directory / f"slot-{len(self._paths)}"
            save_file(dict(tensors), free)
            self._paths.append(free)
        else:
            _overwrite(free, tensors)
        os.link(free, target)


def _overwrite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
        places = json.loads(file.read(length))
        for name, tensor in tensors.items():
            begin, end = places[name]["data_offsets"]
            assert end - begin == tensor.nbytes, name
            file.seek(_HEADER_LENGTH + length + begin)
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
