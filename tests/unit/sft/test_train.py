import math

import torch

from stages.common.config import load_section
from stages.data.text import LengthReport, TokenSequence
from stages.sft.config import SftConfig
from stages.sft.train import SftResult, evaluate, make_loss_function, split_sequences
from tests.tiny import tiny_llama

SEQUENCES = [TokenSequence((5, 6, 7), (20, 21, 258)), TokenSequence((5,), (30, 258))]


def test_the_loss_is_the_mean_over_completion_tokens_with_the_end_of_sequence_token() -> None:
    model = tiny_llama()
    logprobs = []
    for sequence in SEQUENCES:
        ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
        full = torch.log_softmax(model(ids).logits[0], dim=-1)
        start = len(sequence.prompt_ids) - 1
        logprobs += [full[start + t, token] for t, token in enumerate(sequence.completion_ids)]
    expected = -torch.stack(logprobs).mean()  # five tokens, prompts not among them

    compute_loss = make_loss_function(SEQUENCES)
    shares = [compute_loss(model, batch)[0] for batch in split_sequences(SEQUENCES, max_tokens=6)]

    assert len(shares) == 2  # one sequence each: shares add up, they are not averaged
    torch.testing.assert_close(sum(shares), expected, atol=1e-5, rtol=1e-5)


def test_evaluation_is_the_same_quantity() -> None:
    config = load_section("sft", SftConfig)
    config = config.model_copy(update={"learner": config.learner.model_copy(update={"dtype": "fp32"})})
    model = tiny_llama()

    loss = evaluate(model, SEQUENCES, config)

    (batch,) = split_sequences(SEQUENCES, max_tokens=1000)
    torch.testing.assert_close(torch.tensor(loss), make_loss_function(SEQUENCES)(model, batch)[0].detach())
    assert SftResult(loss, 2.0, LengthReport(2, 0, 0), LengthReport(2, 0, 0)).perplexity == math.exp(2.0)
