"""The Makefile keeps what `.venv` was made with."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path


def test_later_calls_keep_the_device_of_the_installation(tmp_path: Path) -> None:
    shutil.copy("Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    for device in ("cpu", "gpu"):
        (tmp_path / f"requirements/{device}.lock").write_text(f"torch==0 # {device}\n")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)

    assert "1 pinned packages of requirements/cpu.lock" in setup(tmp_path)
    assert setup(tmp_path) == ""
    assert "1 pinned packages of requirements/gpu.lock" in setup(tmp_path, "DEVICE=gpu")
    assert setup(tmp_path) == ""

    lock = hashlib.sha256((tmp_path / "requirements/gpu.lock").read_bytes()).hexdigest()
    assert (tmp_path / ".venv/installed.sha256").read_text().split()[0] == lock
    assert "1 pinned packages of requirements/cpu.lock" in setup(tmp_path, "DEVICE=cpu")


def setup(project: Path, *settings: str) -> str:
    """What `make setup` says."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"DEVICE", "MAKEFLAGS", "MAKELEVEL"}
    }
    command = ["make", "--silent", "setup", *settings]
    done = subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout
