from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.data.token_pairs import TokenPair, encode_pairs, read_token_pairs, write_token_pairs


def test_pairs_survive_their_file(tmp_path: Path) -> None:
    pairs = [
        TokenPair("p", (1, 2), (3, 258), (4,), "a", "b", 0.5, -0.5),
        TokenPair("q", (1,), (3,), (4,), "ä", ""),
    ]

    write_token_pairs(tmp_path / "pairs.parquet", pairs)

    assert read_token_pairs(tmp_path / "pairs.parquet") == pairs


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.parquet: not a readable pairs file"):
        read_token_pairs(tmp_path / "train.parquet")


def test_over_long_pairs_are_dropped_or_truncated_and_counted() -> None:
    pairs = [TokenPair("p", (1,) * 4, (2,) * 3, (3,) * 30, "", ""), TokenPair("q", (1,) * 50, (2,), (3,), "", "")]

    dropped, report = encode_pairs(pairs, max_tokens=20, too_long="drop")
    assert (dropped, report.num_dropped, report.num_truncated) == ([], 2, 0)

    (kept,), report = encode_pairs(pairs, max_tokens=20, too_long="truncate")
    assert (len(kept.chosen), len(kept.rejected)) == (7, 20)
    assert (report.num_dropped, report.num_truncated) == (1, 1)  # a prompt that fills the limit cannot be kept
