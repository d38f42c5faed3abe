import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.rl.ledger.__main__ import main
from stages.rl.ledger.offline import OfflineHeader, read_offline_ledger, write_offline_ledger
from stages.rl.ledger.reader import read_ledger
from stages.rl.ledger.schema import Event
from stages.rl.ledger.writer import Ledger
from tests.unit.rl.ledger.recorded_run import make_run


def test_check_prints_one_line_per_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(make_run().write(tmp_path))])

    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["bound", "tickets", "versions", "completeness"]


def test_check_ends_with_1_and_one_line_per_violation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    run.change_row(0, 1, place=2)

    with pytest.raises(SystemExit) as caught:
        main(["check", str(run.write(tmp_path))])

    assert caught.value.code == 1
    assert capsys.readouterr().out == (
        "completeness: update 0: places of micro-batch 0 are numbered 0, 2 instead of 0 to 1\n"
    )


@pytest.mark.parametrize("command", ["check", "summary"])
def test_a_ledger_that_cannot_be_read_is_an_input_error(tmp_path: Path, command: str) -> None:
    with pytest.raises(InputError, match="not a ledger"):
        main([command, str(tmp_path)])


OFFLINE = OfflineHeader(
    algorithm="dpo", num_updates=22, pairs_per_update=16, num_pairs=850, seed=0, pairs_hash="a", model_hash="b"
)
OFFLINE_LINE = "22 updates of dpo on 850 labelled pairs; the run was offline, nothing was sampled"


@pytest.mark.parametrize(("command", "line"), [("check", f"offline: {OFFLINE_LINE}: ok"), ("summary", OFFLINE_LINE)])
def test_an_offline_run_s_ledger_is_answered_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, line: str
) -> None:
    write_offline_ledger(tmp_path / "ledger", OFFLINE)

    main([command, str(tmp_path / "ledger")])

    assert capsys.readouterr().out == f"{line}\n"
    assert read_offline_ledger(tmp_path / "ledger") == OFFLINE


def test_nothing_can_be_read_or_replayed_from_an_offline_run_s_ledger(tmp_path: Path) -> None:
    write_offline_ledger(tmp_path, OFFLINE)

    with pytest.raises(InputError, match=r"ledger\.json: is of an offline run: nothing was sampled"):
        read_ledger(tmp_path)


def test_an_offline_ledger_with_other_keys_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text('{"format": 3, "offline": true, "algorithm": "dpo"}')

    with pytest.raises(InputError, match=r"ledger\.json: keys are missing or unknown: model_hash, num_pairs"):
        main(["check", str(tmp_path)])


def test_summary_counts_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run().write(tmp_path)
    ledger = Ledger.open(path, make_run().header)
    offset = ledger.flush()
    ledger.add_event(Event("resumed", 8))
    ledger.flush()
    ledger.roll_back_to(offset)

    main(["summary", str(path)])

    # 11 groups of 4 samples of 3 tokens; 8 groups are trained, 2 samples of each in a loss.
    # Each update has 8 rows; mean score of update u is u + (0 + 0.1 + 0.2) / 3.
    assert capsys.readouterr().out.splitlines() == [
        "updates                         8 of 8",
        "rollouts                        2",
        "published versions              9",
        "samples generated               44",
        "  in a mini-batch               32 (72.7%)",
        "  chosen for a loss             16 (36.4%)",
        "  in no mini-batch              12 (27.3%)",
        "  of more than one version      1 (2.3%)",
        "completion tokens               132",
        "bound on staleness              7",
        "  staleness 0                   8 (12.5%)",
        "  staleness 1                   8 (12.5%)",
        "  staleness 2                   16 (25.0%)",
        "  staleness 3                   16 (25.0%)",
        "  staleness 4                   8 (12.5%)",
        "  staleness 5                   8 (12.5%)",
        "tickets discarded, no_signal    2",
        "attempts dropped, stale         1",
        "attempts lost, replica_lost     1",
        "resumes                         1",
        "attempts by replica-0           6",
        "attempts by replica-1           5",
        "rows rolled back                0 samples, 0 updates, 1 events",
        "mean score, updates 0 to 1      0.6000",
        "mean score, updates 2 to 3      2.6000",
        "mean score, updates 4 to 5      4.6000",
        "mean score, updates 6 to 7      6.6000",
    ]


def test_summary_of_a_run_that_only_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    run.groups, run.updates, run.events = {}, [], []

    main(["summary", str(run.write(tmp_path))])

    assert "samples generated               0\n" in capsys.readouterr().out


def test_a_sample_of_two_units_counts_once_in_the_mean_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    run.cut(1)
    run.updates[0].append(replace(run.updates[0][1], unit=2, micro_batch=0, place=2))

    main(["summary", str(run.write(tmp_path))])

    assert "mean score, updates 0 to 0      0.1000\n" in capsys.readouterr().out


def test_the_command_ends_with_2_on_a_missing_ledger_and_does_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from stages.common.entry import run_entry; from stages.rl.ledger.__main__ import main\n"
        "assert 'torch' not in sys.modules\n"
        "run_entry(main)"
    )

    process = subprocess.run(
        [sys.executable, "-c", code, "check", str(tmp_path / "nowhere")], capture_output=True, text=True, check=False
    )

    assert process.returncode == 2, process.stderr
    assert process.stderr.splitlines() == [f"{tmp_path}/nowhere: not a ledger: No such file or directory: ledger.json"]
