"""Whom the LLM judge compares the policy with: setting `judge.against` becomes completions of the held-out prompts.

DVC watches the SFT model's samples and the task's demonstrations, but neither a run at MLflow nor a file of one's own.
So an opponent carries the hash of what was read.
"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stages.common.errors import InputError, SettingError
from stages.common.tracking_names import PIPELINE_TAG
from stages.data.completion_store import read_completions
from stages.data.records import Completion, Prompt
from stages.data.store import read_demonstrations
from stages.judge.alpaca import read_outputs
from stages.judge.matches import Match

SFT, REFERENCES = "sft", "references"
OUTPUTS = "outputs/policy.json"
"""What stage judge_policy leaves at its run: the policy's completions in AlpacaEval's format."""

Texts = Mapping[tuple[str, int], str]


@dataclass(frozen=True)
class Opponent:
    """Somebody else's completions of the held-out prompts."""

    name: str
    texts: Texts
    """By prompt_id and sample_index. One that has a single completion of a prompt meets every sample with it."""
    sha256: str
    """Of the file it was read from."""
    finished: Mapping[tuple[str, int], bool] = field(default_factory=dict)
    """Which ended by themselves, where the file says so; the others are taken for finished."""

    def find_key(self, completion: Completion) -> tuple[str, int]:
        """Of the completion that one of the policy's meets.

        Raises:
            SettingError: there are several of its prompt, but fewer than the policy has.
        """
        prompt_id, index = completion.prompt_id, completion.sample_index
        if (prompt_id, 1) not in self.texts:
            return prompt_id, 0
        if (prompt_id, index) not in self.texts:
            raise SettingError(
                f"judge.against: {self.name} has no sample {index} of prompt {prompt_id}; it needs one completion of "
                "each prompt, or judge.samples_per_prompt of them"
            )
        return prompt_id, index


@dataclass(frozen=True)
class Places:
    """Where opponents are looked for, and what is judged together."""

    samples: Path = Path("artifacts/samples")
    """What stage sample_policy wrote."""
    data: Path = Path("artifacts/data")
    """What stage prepare_data wrote."""
    experiment: str = "slipstream"
    """The MLflow experiment in which pipeline ids are looked up."""
    evaluation: Path | None = None
    """All samples that one budget is for; None: `samples` alone."""


def find_opponent(against: str, prompts: Sequence[Prompt], places: Places) -> Opponent:
    """Read the opponent that `judge.against` names.

    Args:
        against: sft, references, a path that ends in .parquet or .json, or the id of a pipeline's run.
        prompts: the held-out ones; the opponent has a completion of each.
        places: where it may be.

    Raises:
        SettingError: there is no such opponent, or it has no completions of these prompts.
        InputError: its file is missing or wrong.
        RunError: MLflow is out of reach, or the run was not judged.
    """
    suffix = Path(against).suffix
    if against == SFT:
        opponent = _read_samples(SFT, places.samples / "sft.parquet")
    elif against == REFERENCES:
        opponent = _read_references(places.data)
    elif suffix == ".parquet":
        opponent = _read_samples(against, Path(against))
    elif suffix == ".json":
        opponent = _read_alpaca(None, Path(against), prompts)
    else:
        opponent = _read_run(against, prompts, places.experiment)
    missing = [prompt.prompt_id for prompt in prompts if (prompt.prompt_id, 0) not in opponent.texts]
    if missing:
        raise SettingError(
            f"judge.against={against}: has no completion of {len(missing)} of {len(prompts)} held-out prompts, the "
            f"first {missing[0]}; it must be of the same task, data and split"
        )
    return opponent


def make_matches(prompts: Sequence[Prompt], policy: Sequence[Completion], opponent: Opponent) -> list[Match]:
    """Put each of the policy's completions beside the opponent's of the same prompt, in the policy's order.

    Raises:
        SettingError: the opponent has several completions of a prompt, but fewer than the policy.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    return [
        Match(by_id[item.prompt_id], item.sample_index, item.text, opponent.texts[opponent.find_key(item)])
        for item in policy
    ]


def _read_samples(name: str, path: Path) -> Opponent:
    completions = {(item.prompt_id, item.sample_index): item for item in read_completions(path)}
    texts = {key: item.text for key, item in completions.items()}
    return Opponent(name, texts, _hash_file(path), {key: item.is_finished for key, item in completions.items()})


def _read_references(data: Path) -> Opponent:
    """Raises SettingError where the task has none; some missing is for the caller to see."""
    demonstrations = read_demonstrations(data, "heldout")
    if not demonstrations:
        raise SettingError(
            f"judge.against={REFERENCES}: the task has no demonstrations of held-out prompts; try {SFT} or a file"
        )
    texts = {(item.prompt.prompt_id, 0): item.completion for item in demonstrations}
    return Opponent(REFERENCES, texts, _hash_file(data / "demonstrations_heldout.parquet"))


def _read_alpaca(name: str | None, path: Path, prompts: Sequence[Prompt]) -> Opponent:
    outputs = read_outputs(path, prompts)
    return Opponent(name or outputs.generator, outputs.texts, _hash_file(path))


def _read_run(against: str, prompts: Sequence[Prompt], experiment: str) -> Opponent:
    with tempfile.TemporaryDirectory(prefix="slipstream-") as folder:
        pipeline, path = _fetch_outputs(against, experiment, folder)
        try:
            return _read_alpaca(pipeline, path, prompts)
        except InputError as error:
            raise SettingError(f"judge.against={against}: {str(error).replace(str(path), OUTPUTS)}") from error


def _fetch_outputs(against: str, experiment: str, folder: str) -> tuple[str, Path]:
    """The pipeline's id, and a copy of its outputs in `folder`."""
    from stages.common.judged_run import LATEST, find_judge_run, open_client

    if against == LATEST:
        raise SettingError(f"judge.against={LATEST}: names another run every time; name one by its id")
    with open_client() as client:
        try:
            parent, judge = find_judge_run(client, against, experiment)
        except SettingError as error:
            raise SettingError(
                f"judge.against={against}: neither {SFT}, {REFERENCES} nor a .parquet or .json file. {error}"
            ) from error
        judge_id = str(judge.info.run_id)
        if OUTPUTS not in [item.path for item in client.list_artifacts(judge_id, str(Path(OUTPUTS).parent))]:
            raise SettingError(
                f"judge.against={against}: its run of judge_policy, {judge_id}, left no {OUTPUTS}; judge it again"
            )
        pipeline = str(parent.data.tags.get(PIPELINE_TAG, parent.info.run_id))
        return pipeline, Path(client.download_artifacts(judge_id, OUTPUTS, folder))


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
