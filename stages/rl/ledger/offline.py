"""The ledger of a run that sampled nothing: `ledger.json` alone, which says so and names what was trained on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.publish import write_json
from stages.rl.ledger.schema import FORMAT
from stages.rl.ledger.segments import HEADER


@dataclass(frozen=True)
class OfflineHeader:
    """What was trained on: the pairs of each update follow from the pairs, their number and the seed."""

    algorithm: str
    num_updates: int
    """Made: the ledger is written when the run is complete."""
    pairs_per_update: int
    num_pairs: int
    """Of one pass: those within the length limit."""
    seed: int
    pairs_hash: str
    """Of the file of training pairs."""
    model_hash: str
    """Of the weights of version 0."""

    def to_json(self) -> dict[str, Any]:
        """As `ledger.json` holds it."""
        return {"format": FORMAT, "offline": True, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "OfflineHeader":
        """From what `to_json` gave.

        Raises:
            InputError: another format, or keys that are missing or unknown.
        """
        if data.get("format") != FORMAT:
            raise InputError(f"format is {data.get('format')!r}, only {FORMAT} can be read")
        values = {name: value for name, value in data.items() if name not in ("format", "offline")}
        wrong = sorted(set(values) ^ {field.name for field in fields(cls)})
        if wrong:
            raise InputError(f"keys are missing or unknown: {', '.join(wrong)}")
        return cls(**values)

    def describe(self) -> str:
        """One line for people, without its end."""
        return (
            f"{self.num_updates} updates of {self.algorithm} on {self.num_pairs} labelled pairs; the run was offline, "
            "nothing was sampled"
        )


def write_offline_ledger(path: Path, header: OfflineHeader) -> None:
    """Write the whole ledger into a directory that may be there."""
    write_json(path / HEADER, header.to_json())


def read_offline_ledger(path: Path) -> OfflineHeader | None:
    """The header, or None where this is no offline run's ledger; `read_ledger` says what is wrong with others.

    Raises:
        InputError: it is of an offline run, but of another format.
    """
    try:
        data = json.loads((path / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or not data.get("offline"):
        return None
    try:
        return OfflineHeader.from_json(data)
    except InputError as error:
        raise InputError(f"{path / HEADER}: {error}") from error
