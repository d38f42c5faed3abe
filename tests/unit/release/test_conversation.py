from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.data.records import Message
from stages.generation.config import GenerationConfig
from stages.release.conversation import Chat, Speaker
from tests.tiny import save_tiny_model

CONFIG = GenerationConfig(max_new_tokens=5, max_prompt_tokens=60, dtype="fp32")


def make_messages(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def make_chat(tmp_path: Path, written: list[str], temperature: float = 1.0) -> Chat:
    return Chat(
        policy=Speaker(save_tiny_model(tmp_path / "policy", 0), CONFIG),
        start_sft=lambda: Speaker(save_tiny_model(tmp_path / "sft", 1), CONFIG),
        make_messages=make_messages,
        temperature=temperature,
        write=written.append,
    )


def test_a_line_is_answered_with_one_completion(tmp_path: Path) -> None:
    written: list[str] = []

    assert make_chat(tmp_path, written).answer("Hello\n")

    assert "".join(written).strip()
    assert written[-1] == "\n"


def test_at_temperature_0_the_same_line_has_the_same_answer(tmp_path: Path) -> None:
    written: list[str] = []
    chat = make_chat(tmp_path, written)
    chat.answer("/temp 0")
    answers = []
    for _ in range(2):
        written.clear()
        chat.answer("Hello")
        answers.append("".join(written))

    assert answers[0] == answers[1]


def test_the_sft_model_is_shown_beside_the_policy_when_asked_for(tmp_path: Path) -> None:
    written: list[str] = []
    chat = make_chat(tmp_path, written, temperature=0.0)
    chat.answer("/sft")
    chat.answer("Hello")
    shown = "".join(written)
    written.clear()
    chat.answer("/sft")
    chat.answer("Hello")

    assert shown.startswith("SFT model: on\nSFT: ")
    assert "\npolicy: " in shown
    assert "policy: " not in "".join(written)


@pytest.mark.parametrize("line", ["/temp", "/temp warm", "/temp -1", "/temp nan", "/what"])
def test_a_wrong_command_says_what_is_possible(tmp_path: Path, line: str) -> None:
    written: list[str] = []
    chat = make_chat(tmp_path, written)

    assert chat.answer(line)

    assert "/temp 0.7" in written[0] or "/temp X" in written[0]
    assert chat.temperature == 1.0


def test_quit_ends_it_and_empty_lines_do_nothing(tmp_path: Path) -> None:
    written: list[str] = []
    chat = make_chat(tmp_path, written)

    assert chat.answer("\n")
    assert not chat.answer("/quit")
    assert written == []


def test_a_line_that_is_too_long_is_refused_with_the_limit(tmp_path: Path) -> None:
    written: list[str] = []

    make_chat(tmp_path, written).answer("x" * 100)

    assert "generation.max_prompt_tokens=60" in "".join(written)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        Speaker(tmp_path / "nowhere", CONFIG)
