import json
from pathlib import Path

import pytest
import torch

from stages.common.errors import GeneratorError, InputError
from stages.data.completion_store import write_completions
from stages.data.records import Completion, Message
from stages.data.tasks.task import make_prompt
from stages.generation.config import GenerationConfig
from stages.judge.comparison import Scorers, read_comparison
from stages.judge.config import JudgeConfig
from stages.judge.evaluate import evaluate_comparison
from stages.judge.sample import (
    Columns,
    Models,
    Samples,
    measure_samples,
    read_policy_version,
    require_sampled_by,
    sample_both,
)
from stages.models.load import load_policy
from stages.scoring.lexicon import LengthScorer
from tests.fakes import make_completion
from tests.tiny import save_tiny_model

PROMPTS = [make_prompt([Message("user", text)], group=text) for text in ("good", "bad", "x" * 60)]
TEMPERATURE = 0.8
GENERATION = GenerationConfig(
    engine="transformers", temperature=TEMPERATURE, max_new_tokens=4, max_prompt_tokens=60, dtype="fp32"
)
CONFIG = JudgeConfig(samples_per_prompt=2, seed=3, micro_batch_tokens=128)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    path = tmp_path_factory.mktemp("models")
    return Models(save_tiny_model(path / "sft", 0), save_tiny_model(path / "policy", 1), policy_version=7)


@pytest.fixture(scope="module")
def samples(models: Models) -> Samples:
    return sample_both(PROMPTS, models, CONFIG, GENERATION, Path("unused"))


@pytest.fixture(scope="module")
def columns(samples: Samples, models: Models) -> tuple[Columns, Columns]:
    return measure_samples(samples, models, CONFIG, TEMPERATURE)


def place(item: Completion) -> tuple[str, int]:
    return item.prompt_id, item.sample_index


def test_both_models_answer_the_same_prompts_and_long_ones_are_counted(samples: Samples) -> None:
    assert [place(item) for item in samples.sft] == [place(item) for item in samples.policy]
    assert len(samples.policy) == 4  # 2 prompts x 2 samples
    assert samples.metrics()["num_prompts_too_long"] == 1
    assert {item.first_policy_version for item in samples.sft} == {0}
    assert {item.first_policy_version for item in samples.policy} == {7}
    assert [item.token_ids for item in samples.sft] != [item.token_ids for item in samples.policy]


def test_seeds_are_shared_so_equal_models_give_equal_completions_and_no_kl(models: Models, samples: Samples) -> None:
    twins = Models(models.sft, models.sft, policy_version=1)

    same = sample_both(PROMPTS, twins, CONFIG, GENERATION, Path("unused"))
    _, on_policy = measure_samples(same, twins, CONFIG, TEMPERATURE)

    assert [item.token_ids for item in same.sft] == [item.token_ids for item in same.policy]
    assert [item.token_ids for item in same.sft] == [item.token_ids for item in samples.sft]
    assert on_policy["kl_exact"] == [0.0] * 4
    assert on_policy["policy_logprob"] == on_policy["sft_logprob"]


def test_logprobs_of_the_sampling_model_are_those_the_generator_reports(
    samples: Samples, columns: tuple[Columns, Columns]
) -> None:
    on_sft, on_policy = columns

    reported = [sum(item.sampling_logprobs) for item in samples.sft]
    assert on_sft["sft_logprob"] == pytest.approx(reported, rel=1e-4)
    reported = [sum(item.sampling_logprobs) for item in samples.policy]
    assert on_policy["policy_logprob"] == pytest.approx(reported, rel=1e-4)
    assert on_policy["sft_logprob"] != pytest.approx(on_policy["sft_logprob_at_1"], rel=1e-4)


def test_kl_is_that_of_the_policy_from_the_sft_model_and_at_the_sampling_temperature(
    models: Models, samples: Samples, columns: tuple[Columns, Columns]
) -> None:
    item = samples.policy[0]
    ids = torch.tensor([item.prompt_ids + item.token_ids])
    policy, sft = (
        torch.log_softmax(
            load_policy(path, torch.float32)(ids).logits[0, len(item.prompt_ids) - 1 : -1] / TEMPERATURE, dim=-1
        )
        for path in (models.policy, models.sft)
    )

    expected = (policy.exp() * (policy - sft)).sum().item()

    assert columns[1]["kl_exact"][0] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx((sft.exp() * (sft - policy)).sum().item(), rel=1e-2)


def test_what_is_written_can_be_compared(samples: Samples, columns: tuple[Columns, Columns], tmp_path: Path) -> None:
    write_completions(tmp_path / "sft.parquet", samples.sft, columns[0])
    write_completions(tmp_path / "policy.parquet", samples.policy, columns[1])

    comparison = read_comparison(tmp_path, Scorers(None, LengthScorer(), LengthScorer()))

    metrics = evaluate_comparison(comparison, seed=0)
    assert metrics["num_prompts"] == 2
    assert metrics["gold_win_rate"] is None
    assert metrics["kl_nats"] == pytest.approx(sum(columns[1]["kl_exact"]) / 4)


def test_samples_of_different_prompts_are_refused(
    samples: Samples, columns: tuple[Columns, Columns], tmp_path: Path
) -> None:
    write_completions(tmp_path / "sft.parquet", samples.sft, columns[0])
    write_completions(tmp_path / "policy.parquet", samples.policy[::-1], columns[1])

    with pytest.raises(InputError, match="not of the same prompts"):
        read_comparison(tmp_path, Scorers(None, None, LengthScorer()))


def test_a_missing_policy_is_named_before_anything_starts(models: Models, tmp_path: Path) -> None:
    missing = Models(models.sft, tmp_path / "nowhere", policy_version=1)

    with pytest.raises(InputError, match=r"nowhere: no such model directory"):
        sample_both(PROMPTS, missing, CONFIG, GENERATION, tmp_path)


def test_prompts_that_are_all_too_long_are_an_error(models: Models, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no held-out prompt fits into generation.max_prompt_tokens=60"):
        sample_both(PROMPTS[2:], models, CONFIG, GENERATION, tmp_path)


def test_policy_version_is_the_one_the_policy_was_published_with(tmp_path: Path) -> None:
    assert read_policy_version(tmp_path) == 1

    (tmp_path / "version.json").write_text(json.dumps({"policy_version": 30}))

    assert read_policy_version(tmp_path) == 30


def test_completions_of_other_weights_are_refused() -> None:
    completions = [make_completion("x"), make_completion("y")]  # two tokens each, -1 nat per token
    require_sampled_by(Path("policy"), completions, [-2.05, -1.95])  # 0.025 nats a token

    with pytest.raises(GeneratorError, match=r"policy: .* differ from the model's by 0.075 nats a token"):
        require_sampled_by(Path("policy"), completions, [-2.15, -1.85])
