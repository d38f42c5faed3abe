"""Section `generation` of params.yaml: what samples completions, for every stage that needs them."""

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from stages.common.config import Section
from stages.common.errors import SettingError
from stages.generation.engine_args import refuse_reserved

FILE = "file:"
"""`file:PATH#INDEX` in place of a URL: look it up there, whenever the server is not known to work."""

Publish = Literal["files", "nccl", "ipc"]
"""How new weights get to the servers: see `rl.publish`."""


class GenerationConfig(Section):
    """The generator and the distribution it samples from.

    There is no top_p or top_k: log-probabilities must be of the distribution that was sampled, and the
    estimators of both papers are biased when it is a truncated one.
    """

    engine: Literal["vllm", "transformers"] = "vllm"
    """vllm: a server this project starts and ends itself. transformers: in process, slow, exact."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it, when sampling and in every logprob."""
    max_new_tokens: PositiveInt
    """Tokens after which a completion is cut; it then counts as unfinished."""
    max_prompt_tokens: PositiveInt
    """Longer prompts are dropped and counted."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type of the generator."""
    max_num_seqs: PositiveInt = 128
    """Sequences a server works on at once; of one prompt there cannot be more."""
    prompts_at_once: PositiveInt = 1
    """transformers: prompts whose samples form one batch. With 1 a prompt's samples are the same to the last bit
    whatever else is sampled; with more they are sampled faster, and rounding depends on who shares the batch."""
    cpu_cores: str = "0-1"
    """vLLM on CPU: the cores its threads are bound to, such as 0 or 0-1; `rl.generator.devices` in RL."""
    kv_cache_gib: PositiveInt = 1
    """vLLM on CPU: memory for keys and values, in GiB."""
    start_timeout_s: PositiveInt = 300
    """Seconds a server may take until it answers."""
    request_timeout_s: PositiveInt = 600
    """Seconds one prompt's completions may take."""
    engine_args: tuple[str, ...] = Field(default=())
    """Further command-line arguments of the vLLM server, such as --tensor-parallel-size=2. vLLM's own parser checks
    them before anything starts, and those that are set here already are refused: see engine_args.py."""

    @model_validator(mode="after")
    def check_prompts_at_once(self) -> Self:
        """vLLM batches by itself."""
        if self.engine == "vllm" and self.prompts_at_once != 1:
            raise ValueError(
                f"generation.prompts_at_once={self.prompts_at_once} does nothing with generation.engine='vllm', which "
                "batches up to generation.max_num_seqs sequences by itself; leave it out, or set engine 'transformers'"
            )
        return self

    @model_validator(mode="after")
    def check_engine_args(self) -> Self:
        """None that is set here already: the server would take the last one, and we would not know."""
        if self.engine != "vllm" and self.engine_args:
            raise ValueError(
                f"generation.engine_args={list(self.engine_args)} are of vLLM's server, and generation.engine="
                f"{self.engine!r} has none; leave them out, or set engine 'vllm'"
            )
        refuse_reserved(self.engine_args)
        return self


def require_engine(generation: GenerationConfig, fleet: "FleetConfig", weight_update: str, publish: str) -> None:
    """Refuse what the engine does not do.

    Raises:
        SettingError: a setting of section `rl` that only vLLM's servers have.
    """
    if generation.engine == "vllm":
        return
    allowed = {
        "rl.weight_update": (weight_update, "drain"),
        "rl.publish": (publish, "files"),
        "rl.generator.urls": (list(fleet.urls), []),
        "rl.generator.replicas": (fleet.replicas, 1),
        "rl.generator.kv_cache": (fleet.kv_cache, "keep"),
    }
    for name, (value, only) in allowed.items():
        if value != only:
            raise SettingError(
                f"{name}={value!r} needs generation.engine='vllm'; with 'transformers', which samples in the learner's "
                f"process, allowed: {only!r}"
            )


def require_room(generation: GenerationConfig, num_samples: int, setting: str) -> None:
    """Refuse more completions of a prompt than a server of vLLM takes in one request.

    Args:
        generation: section `generation`.
        num_samples: completions of one prompt.
        setting: that asks for them, such as `pairs.samples_per_prompt`.

    Raises:
        SettingError: the server would refuse every prompt.
    """
    if generation.engine == "vllm" and num_samples > generation.max_num_seqs:
        raise SettingError(
            f"{setting}={num_samples} exceeds generation.max_num_seqs={generation.max_num_seqs}, and vLLM samples all "
            "completions of a prompt at once; raise the one or lower the other"
        )


def _require_url(url: str) -> None:
    """What a server is looked for at without end must at least be able to be one."""
    if url.startswith(FILE):
        return
    parts = urlsplit(url)
    try:
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_whole = False
    if not is_whole:
        raise ValueError(f"rl.generator.urls: {url!r} is no URL; allowed: such as http://10.0.0.7:8000")


class FleetConfig(Section):
    """The servers that sample, and how they are watched."""

    replicas: int = Field(default=1, ge=0)
    """Servers started and ended here, each on devices of its own."""
    devices: tuple[str, ...] | Literal["auto"] = "auto"
    """CPU cores or GPUs of each replica, such as ["0", "1"] or ["0,1", "2,3"]; auto: see stages/rl/placement.py."""
    urls: tuple[str, ...] = ()
    """Servers started elsewhere with `python -m stages.serve`, such as http://10.0.0.7:8000. They read published
    weights from `weights_dir`, may come late, go away and come back. `file:PATH#INDEX` looks the URL up in a JSON file,
again whenever the server is lost, so that another may take its place: see remote.py."""
    weights_dir: str | None = None
    """Where weights are published; must be seen by every server under this path. None: shared memory, or the work
    directory where there is none or too little."""
    kv_cache: Literal["keep", "recompute"] = "keep"
    """Of completions that are running when weights are swapped in flight. keep: their earlier tokens' keys and values
    stay those of the older weights. recompute: computed anew, at the price of a prefill."""
    heartbeat_s: PositiveFloat = 2.0
    """Seconds between two looks at a server."""
    heartbeat_timeout_s: PositiveFloat = 60.0
    """Seconds after which a server that does not answer is taken for hung."""
    max_restarts: PositiveInt = 3
    """Times in a row a server may be lost without having sampled anything in between."""
    max_attempts: PositiveInt = 4
    """Times a prompt may get an unusable answer, or none in time, before the run gives up; a lost server does not
    count."""

    @model_validator(mode="after")
    def check_servers(self) -> Self:
        """There must be someone to sample, one set of devices for each, and a directory that all can read."""
        if self.replicas + len(self.urls) == 0:
            raise ValueError("rl.generator.replicas=0 and rl.generator.urls=[]: nothing would sample")
        if self.devices != "auto" and len(self.devices) != self.replicas:
            raise ValueError(
                f"rl.generator.devices has {len(self.devices)} entries, one is needed for each of "
                f"rl.generator.replicas={self.replicas}"
            )
        for url in self.urls:
            _require_url(url)
        if self.urls and self.weights_dir is None:
            raise ValueError(
                "rl.generator.urls: set rl.generator.weights_dir to a directory that those servers see too"
            )
        return self
