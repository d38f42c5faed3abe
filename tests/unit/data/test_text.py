import pytest

from stages.common.errors import InputError
from stages.data.records import Message, Prompt
from stages.data.text import (
    LengthReport,
    TokenSequence,
    decode_completion,
    encode_completion,
    encode_prompt,
    limit_lengths,
    require_kept,
)
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = 258


def test_a_prompt_ends_where_the_completion_begins() -> None:
    prompt = Prompt("p", (Message("system", "s"), Message("user", "u")), group="g")

    text = TOKENIZER.decode(encode_prompt(TOKENIZER, prompt))

    assert text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"


def test_a_completion_ends_with_one_end_of_sequence_token_although_it_is_the_padding_token() -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id == EOS

    ids = encode_completion(TOKENIZER, "ab")

    assert ids[-1] == EOS
    assert ids.count(EOS) == 1
    assert decode_completion(TOKENIZER, ids) == "ab"


def test_a_completion_that_spells_its_end_has_one_end_and_none_before_it() -> None:
    assert encode_completion(TOKENIZER, "ab<|im_end|>") == encode_completion(TOKENIZER, "ab")

    with pytest.raises(
        InputError, match=r"^completion 'a<\|im_end\|>b': holds the end-of-sequence token '<\|im_end\|>'"
    ):
        encode_completion(TOKENIZER, "a<|im_end|>b")


def test_a_template_that_writes_the_day_gives_the_same_tokens_every_day() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"

    assert tokenizer.decode(encode_prompt(tokenizer, Prompt("p", (Message("user", "u"),), group="g"))) == "26 Jul 2024"


def test_messages_that_the_template_refuses_are_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    prompt = Prompt("p1", (Message("system", "s"), Message("user", "u")), group="g")

    with pytest.raises(
        InputError, match=r"^prompt p1: the model's .* refuses messages of system, user: System role not"
    ):
        encode_prompt(tokenizer, prompt)


def test_a_split_of_which_nothing_is_left_is_refused_and_a_loss_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for lengths, message in (
        (LengthReport(0, 0, 0), "split train has no pairs"),
        (LengthReport(2, 2, 0), "none of 2 pairs"),
    ):
        with pytest.raises(InputError, match=message):
            require_kept("artifacts/pairs", "pairs", lengths, "train", "reward.max_tokens=9")

    require_kept("artifacts/pairs", "pairs", LengthReport(3, 1, 0), "validation", "reward.max_tokens=9")
    assert "1 of 3 pairs of split validation are not looked at, longer than reward.max_tokens=9" in caplog.text


def test_over_long_samples_are_counted_whatever_happens_to_them() -> None:
    samples = [TokenSequence((1,) * 3, (2,) * n) for n in (2, 9)] + [TokenSequence((1,) * 8, (2,))]

    for too_long, expected in (("drop", [5]), ("truncate", [5, 6])):
        kept, report = limit_lengths(
            samples, lambda item: [item], lambda _, parts: parts[0], max_tokens=6, too_long=too_long
        )
        assert [len(item) for item in kept] == expected
        assert report.num_dropped + report.num_truncated == 2
        assert report.num_samples == 3
