import json
from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.data.records import Message
from stages.data.tasks.pairs import PairColumns, PairsTask

H, A = "\n\nHuman: ", "\n\nAssistant: "


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_become_a_user_message_and_two_completions(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"q": "Why?", "good": "Because.", "bad": "No."}])
    columns = PairColumns(prompt="q", chosen="good", rejected="bad")

    data = PairsTask(name="pairs", source=source, columns=columns).load(seed=0)

    assert data.pairs is not None
    assert data.pairs[0].prompt.messages == (Message("user", "Why?"),)
    assert (data.pairs[0].chosen, data.pairs[0].rejected) == ("Because.", "No.")
    assert data.demonstrations[0].completion == "Because."


def test_transcripts_share_their_turns_up_to_the_last_one(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\nTell me.\n\nAssistant:"
    source = write(tmp_path / "a.jsonl", [{"chosen": start + " Because.", "rejected": start + " No.\n\nReally."}])

    (pair,) = PairsTask(name="pairs", source=source, format="transcripts").load(seed=0).pairs or []

    assert pair.prompt.messages == (
        Message("user", "Hi"),
        Message("assistant", "Hello."),
        Message("user", "Why?\nTell me."),
    )
    assert (pair.chosen, pair.rejected) == ("Because.", "No.\n\nReally.")


def test_conversations_with_one_beginning_are_one_group(tmp_path: Path) -> None:
    short = "\n\nHuman: Hi  there\n\nAssistant: "
    long = "\n\nHuman: hi there\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: "
    rows = [{"chosen": start + "a", "rejected": start + "b"} for start in (short, long)]
    source = write(tmp_path / "a.jsonl", rows)

    data = PairsTask(name="pairs", source=source, format="transcripts").load(seed=0)

    assert len({prompt.prompt_id for prompt in data.prompts}) == 2
    assert len({prompt.group for prompt in data.prompts}) == 1


def test_dialogues_in_a_column_that_begin_alike_are_one_group(tmp_path: Path) -> None:
    prompts = [f"{H}Hi{A}", f"{H}hi{A}Yes?{H}Why?{A}", f"{H}Ho{A}", "Hi", "Hi there"]
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in prompts]

    data = PairsTask(name="pairs", source=write(tmp_path / "a.jsonl", rows)).load(seed=0)

    groups = {prompt.messages[0].content: prompt.group for prompt in data.prompts}
    assert groups[prompts[0]] == groups[prompts[1]]
    assert len(set(groups.values())) == 3  # the first, Ho, and "Hi there"; "Hi" alone begins as the first does


def test_a_prompt_has_one_demonstration_whatever_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "chosen": chosen, "rejected": "No."} for chosen in ("b", "a", "c")]

    for order in (rows, rows[::-1]):
        data = PairsTask(name="pairs", source=write(tmp_path / "a.jsonl", order)).load(seed=0)
        assert [demonstration.completion for demonstration in data.demonstrations] == ["a"]
        assert len(data.pairs or []) == 3


BAD_TRANSCRIPTS = [
    (H + "Hi" + A + "x", H + "Ho" + A + "y", r"columns 'chosen' and 'rejected' differ before their last turn"),
    (H + "Hi" + A + "x", H + "Hi" + A + "x", r"columns 'chosen' and 'rejected' hold the same completion"),
    (H + "Hi" + A + " ", H + "Hi" + A + "y", r"column 'chosen': turn 2 of 2 is empty; expected text"),
    (H + "Hi" + A + "x", H + "Hi", r"column 'rejected': has no last turn 'Assistant:' after a prompt"),
    (A + "Hi", H + "Hi" + A + "x", r"column 'chosen': has no last turn 'Assistant:' after a prompt"),
    (
        A + "Hi" + H + "Ho" + A + "x",
        H + "Ho" + A + "x",
        r"column 'chosen': begins with 'Assistant:'; expected 'Human:'",
    ),
    ("Hi", H + "Hi" + A + "x", r"column 'chosen': does not begin with 'Human:'"),
    ("So: " + H + "Hi" + A + "x", H + "Hi" + A + "x", r"column 'chosen': does not begin with 'Human:'"),
    (H + "a" + H + "b" + A + "x", H + "a" + A + "y", r"column 'chosen': turns 1 and 2 are both the user's"),
    (" ", H + "a" + A + "y", r"column 'chosen' is only white space; expected text"),
]


@pytest.mark.parametrize(("chosen", "rejected", "message"), BAD_TRANSCRIPTS)
def test_a_bad_transcript_is_named_or_dropped(tmp_path: Path, chosen: str, rejected: str, message: str) -> None:
    good = {"chosen": H + "Hi" + A + "x", "rejected": H + "Hi" + A + "y"}
    source = write(tmp_path / "a.jsonl", [good, {"chosen": chosen, "rejected": rejected}])

    with pytest.raises(InputError, match=rf"a\.jsonl, line 2: {message}"):
        PairsTask(name="pairs", source=source, format="transcripts").load(seed=0)
    tolerant = PairsTask(name="pairs", source=source, format="transcripts", max_bad_rows=1).load(seed=0)
    assert (tolerant.num_rows, tolerant.num_bad_rows, len(tolerant.pairs or [])) == (2, 1, 1)


def test_equal_completions_and_empty_cells_are_bad_rows(tmp_path: Path) -> None:
    same = write(tmp_path / "a.jsonl", [{"prompt": "Why?", "chosen": "x", "rejected": "x"}])
    empty = write(tmp_path / "b.jsonl", [{"prompt": "Why?", "chosen": "x", "rejected": ""}])

    with pytest.raises(InputError, match=r"a\.jsonl, line 1: columns 'chosen' and 'rejected' hold the same completion"):
        PairsTask(name="pairs", source=same).load(seed=0)
    with pytest.raises(InputError, match=r"b\.jsonl, line 1: column 'rejected' is empty; expected text"):
        PairsTask(name="pairs", source=empty).load(seed=0)
