"""The command and environment of a server, by how it gets its weights."""

import json
from pathlib import Path

import pytest

from stages.common.errors import SettingError
from stages.generation.config import GenerationConfig, Publish
from stages.generation.engine_args import RESERVED
from stages.generation.start import GeneratorSettings, start_generator
from stages.generation.vllm_server import ServerSettings, server_command, server_environment
from tests.tiny import save_tiny_model

CONFIG = GenerationConfig(max_new_tokens=40, max_prompt_tokens=88, cpu_cores="0-1")


@pytest.mark.parametrize("publish", ["files", "nccl", "ipc"])
def test_a_server_is_told_how_weights_will_come(publish: Publish) -> None:
    command = server_command(Path("sft"), CONFIG, ServerSettings(seed=0, port=80, publish=publish))

    if publish == "files":
        assert "--weight-transfer-config" not in command
    else:
        value = command[command.index("--weight-transfer-config") + 1]
        assert json.loads(value) == {"backend": publish}


@pytest.mark.parametrize(("publish", "expected"), [("files", False), ("nccl", False), ("ipc", True)])
def test_only_handles_of_memory_are_unpickled(publish: Publish, expected: bool) -> None:
    environment = server_environment(CONFIG, ServerSettings(seed=0, publish=publish))

    assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in environment) is expected


def test_a_user_adds_arguments_after_ours_and_names_none_of_ours() -> None:
    config = GenerationConfig(max_new_tokens=40, max_prompt_tokens=88, engine_args=("--kv-cache-dtype=fp8",))

    command = server_command(Path("sft"), config, ServerSettings(seed=0, port=80, publish="nccl"))

    assert command[-1] == "--kv-cache-dtype=fp8"
    free = {"--kv-cache-dtype=fp8", "--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens"}
    ours = {word for word in command if word.startswith("--")} - free - {"--block-size"}
    assert ours <= RESERVED.keys()


def test_several_workers_on_cpu_have_cores_of_their_own() -> None:
    config = GenerationConfig(max_new_tokens=40, max_prompt_tokens=88, engine_args=("--tensor-parallel-size=2",))

    environment = server_environment(config, ServerSettings(seed=0, devices="2-5"))

    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "2,3|4,5"
    assert server_environment(CONFIG, ServerSettings(seed=0))["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"


def test_on_gpus_a_server_needs_no_cpu_core_for_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = CONFIG.model_copy(update={"engine_args": ("--tensor-parallel-size=4",)})

    assert not any(name.startswith("VLLM_CPU") for name in server_environment(config, ServerSettings(seed=0)))


def test_the_engine_in_this_process_reads_files_only(tmp_path: Path) -> None:
    config = GenerationConfig(engine="transformers", max_new_tokens=4, max_prompt_tokens=4)
    settings = GeneratorSettings(publish="nccl")

    with (
        pytest.raises(SettingError, match=r"^rl.publish='nccl' needs generation.engine='vllm'"),
        start_generator(save_tiny_model(tmp_path / "model"), config, log_dir=tmp_path, settings=settings),
    ):
        pass
