from stages.data.records import Message, Prompt
from stages.data.text import TokenSequence, decode_completion, encode_completion, encode_prompt, limit_lengths
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


def test_over_long_samples_are_counted_whatever_happens_to_them() -> None:
    samples = [TokenSequence((1,) * 3, (2,) * n) for n in (2, 9)] + [TokenSequence((1,) * 8, (2,))]

    for too_long, expected in (("drop", [5]), ("truncate", [5, 6])):
        kept, report = limit_lengths(
            samples, lambda item: [item], lambda _, parts: parts[0], max_tokens=6, too_long=too_long
        )
        assert [len(item) for item in kept] == expected
        assert report.num_dropped + report.num_truncated == 2
        assert report.num_samples == 3
