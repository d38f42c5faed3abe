"""From the learner to the generator: versioned model directories, complete or absent."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel


class WeightsPublisher:
    """Writes each version beside the last one; the generator reads it, then the older one goes.

    Args:
        template: model directory with config and tokenizer.
        directory: where versions are written, on a fast disk or in shared memory.
    """

    def __init__(self, template: Path, directory: Path) -> None:
        self._template = template
        self._directory = directory
        self.current = template
        """Directory of the newest version."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)

    def write(self, model: PreTrainedModel, policy_version: int) -> Path:
        """Write the model's weights in bf16, the type generators compute in.

        Returns:
            The directory of this version.
        """
        staged = self._directory / f".{policy_version}"
        shutil.rmtree(staged, ignore_errors=True)
        target = self._directory / f"v{policy_version}"
        shutil.copytree(self._template, staged, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(collect_weights(model), staged / "model.safetensors", metadata={"format": "pt"})
        (staged / "version.json").write_text(json.dumps({"policy_version": policy_version}))
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
        self.current = target
        for older in self._directory.glob("v*"):
            if older != target:
                shutil.rmtree(older)
        return target


def collect_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight once, in bf16: tied ones are stored under the name the library's own format uses."""
    tied = set(getattr(model, "_tied_weights_keys", None) or [])
    is_tied = bool(model.config.tie_word_embeddings)
    return {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not (is_tied and name in tied)
    }


def export_policy(version: Path, target: Path) -> None:
    """Copy a published version, its `version.json` with it."""
    shutil.copytree(version, target, dirs_exist_ok=True)
