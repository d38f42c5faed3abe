"""Do our losses and gradients, of SFT, reward and RL, agree with TRL's trainers on the same batch?

Two halves that exchange a folder, because TRL lives in an environment of its own (requirements/trl.txt; for PPO
requirements/trl-1.12.txt): `record` computes our side from the code that trains, `compare` lets TRL's trainers compute
theirs from the same models and the same token ids, and judges. The RL parts of both are in rl_agreement_ours.py and
rl_agreement_trl.py. Answers: docs/benchmarks/2026-11-21-trl-agreement.md and 2026-11-21-trl-agreement-rl.md.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from agreement import (
    Comparison,
    Gradients,
    Recorded,
    compare_gradients,
    compare_numbers,
    compare_tensors,
    print_table,
    report,
    take_gradients,
    versions,
)
from rl_agreement_trl import compare_grpo, compare_online_dpo, compare_ppo, compare_rloo
from safetensors.torch import save_file
from torch import Tensor
from trl_settings import load_trl_tokenizer, trainer_settings

NUM_EXAMPLES = 4
TEXT = "the film was slow at first but its second half moved me and I would gladly watch it again with friends"


def main() -> int:
    """Parse the command line and run one half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    halves = parser.add_subparsers(dest="half", required=True)
    record_parser = halves.add_parser("record", help="our half, in the project's environment")
    record_parser.add_argument("directory", type=Path)
    record_parser.add_argument("--model", type=Path, help="model directory; a two-layer random Llama if left out")
    record_parser.add_argument("--seed", type=int, default=0, help="of the batch, the head and the random Llama")
    record_parser.add_argument("--noise", type=float, default=0.1, help="how far the RL batch's other models are")
    compare_parser = halves.add_parser("compare", help="TRL's half, in its environment")
    compare_parser.add_argument("directories", type=Path, nargs="+")
    compare_parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all that the installed TRL has")
    compare_parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    if arguments.half == "record":
        record(arguments.directory, arguments.model, arguments.seed, arguments.noise)
        return 0
    return compare(arguments.directories, arguments.parts, arguments.out)


# Our half


def record(directory: Path, model_path: Path | None, seed: int, noise: float) -> None:
    """Write the batch, our losses and our gradients into `directory`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `stages` and `tests` are not installed
    from rl_agreement_ours import record_rl

    from stages.models.load import load_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    name = model_path.name if model_path else "tiny"
    if model_path is None:
        from tests.tiny import save_tiny_model

        model_path = save_tiny_model(directory / "model", seed)
    tokenizer = load_tokenizer(model_path)
    rng = random.Random(seed)
    chats = [(draw_words(rng, 2, 9), draw_words(rng, 1, 14)) for _ in range(NUM_EXAMPLES)]
    demonstrations = [encode_chat(tokenizer, *chat) for chat in chats]
    pairs = draw_pairs(tokenizer, rng)
    newline = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"])
    samples = draw_samples(tokenizer, rng)
    numbers = record_sft(directory, model_path, demonstrations, newline)
    numbers |= record_reward(directory, model_path, pairs, seed)
    contents = {
        "model": name,
        "model_path": str(model_path.resolve()),
        "seed": seed,
        "chats": chats,
        "demonstrations": [asdict(item) for item in demonstrations],
        "pairs": [{"chosen": asdict(pair.chosen), "rejected": asdict(pair.rejected)} for pair in pairs],
        "ours": numbers,
        "rl": record_rl(directory, model_path, samples, seed=seed, noise=noise),
        "versions": versions("torch", "transformers"),
    }
    (directory / "ours.json").write_text(json.dumps(contents, indent=1))
    print(f"{directory}: {json.dumps(contents['ours'] | contents['rl']['results'])}")


def draw_words(rng: random.Random, fewest: int, most: int) -> str:
    """A text of so many words."""
    return " ".join(rng.choices(TEXT.split(), k=rng.randint(fewest, most)))


def encode_chat(tokenizer: Any, prompt: str, completion: str) -> Any:
    """A prompt and a completion as the pipeline encodes them, EOS included."""
    from stages.data.records import Message, Prompt
    from stages.data.text import TokenSequence, encode_completion, encode_prompt

    prompt_ids = encode_prompt(tokenizer, Prompt("bench", (Message("user", prompt),), group="bench"))
    return TokenSequence(prompt_ids, encode_completion(tokenizer, completion))


def draw_pairs(tokenizer: Any, rng: random.Random) -> list[Any]:
    """Pairs of different lengths; the last rejected completion is unfinished: it lacks its EOS."""
    from stages.data.text import TokenSequence
    from stages.data.token_pairs import PairExample

    pairs = []
    for number in range(NUM_EXAMPLES):
        prompt = draw_words(rng, 2, 9)
        chosen, rejected = (encode_chat(tokenizer, prompt, draw_words(rng, 1, 14)) for _ in range(2))
        if number == NUM_EXAMPLES - 1:
            rejected = TokenSequence(rejected.prompt_ids, rejected.completion_ids[:-1])
        pairs.append(PairExample(str(number), chosen, rejected))
    return pairs


def draw_samples(tokenizer: Any, rng: random.Random) -> list[list[Any]]:
    """Of each prompt, long completions for the RL half to cut."""
    from rl_agreement_ours import MAX_NEW_TOKENS, NUM_PROMPTS, NUM_SAMPLES

    prompts = [draw_words(rng, 2, 9) for _ in range(NUM_PROMPTS)]
    return [
        [encode_chat(tokenizer, prompt, draw_words(rng, MAX_NEW_TOKENS, MAX_NEW_TOKENS)) for _ in range(NUM_SAMPLES)]
        for prompt in prompts
    ]


def record_sft(
    directory: Path, model_path: Path, demonstrations: list[Any], newline: tuple[int, ...]
) -> dict[str, float]:
    """The SFT loss through the trainer's own micro-batches, and losses that differ from it on purpose."""
    from stages.data.text import TokenSequence
    from stages.learner.engine import select_device
    from stages.models.load import load_policy, move
    from stages.sft.train import make_loss_function, split_sequences

    model = move(load_policy(model_path, torch.float32), select_device())

    def batch_loss(examples: list[Any]) -> Tensor:
        micro_batches = split_sequences(examples, max_tokens=2 * max(map(len, examples)))
        loss_function = make_loss_function(examples)
        return torch.stack([loss_function(model, micro_batch)[0] for micro_batch in micro_batches]).sum()

    loss = batch_loss(demonstrations)
    loss.backward()
    save_file(take_gradients(model), directory / "sft.safetensors")
    without_eos = [TokenSequence(item.prompt_ids, item.completion_ids[:-1]) for item in demonstrations]
    with_newline = [TokenSequence(item.prompt_ids, item.completion_ids + newline) for item in demonstrations]
    with torch.no_grad():
        return {
            "sft_loss": loss.item(),
            "sft_tokens": sum(len(item.completion_ids) for item in demonstrations),
            "sft_loss_with_newline": batch_loss(with_newline).item(),
            "sft_tokens_with_newline": sum(len(item.completion_ids) for item in with_newline),
            "sft_loss_without_eos": batch_loss(without_eos).item(),
            "sft_mean_of_means": sum(batch_loss([item]).item() for item in demonstrations) / len(demonstrations),
        }


def record_reward(directory: Path, model_path: Path, pairs: list[Any], seed: int) -> dict[str, float]:
    """The Bradley–Terry loss through the trainer's own micro-batches, and the same for pairs without EOS."""
    from stages.learner.engine import select_device
    from stages.models.load import move
    from stages.models.reward_model import init_reward_model
    from stages.reward.train import bradley_terry_loss, make_loss_function, score_margins, split_pairs

    model = move(init_reward_model(model_path, torch.float32, seed), select_device())
    loss_function = make_loss_function(pairs)
    loss = torch.zeros(())
    for micro_batch in split_pairs(pairs, max_tokens=4 * max(map(len, pairs))):
        part, _ = loss_function(model, micro_batch)
        part.backward()
        loss += part.detach().cpu()
    with torch.no_grad():
        margins, margins_without_eos = (
            torch.cat([score_margins(model, split_pairs([pair], 2**62)[0]) for pair in examples]).cpu()
            for examples in (pairs, [drop_eos(pair, model.config.eos_token_id) for pair in pairs])
        )
    scores = {
        "head": model.score.weight.detach().cpu(),
        "margins": margins,
        "margins_without_eos": margins_without_eos,
    }
    save_file(take_gradients(model), directory / "reward.safetensors")
    save_file(scores, directory / "scores.safetensors")
    return {
        "reward_loss": loss.item(),
        "reward_loss_without_eos": (bradley_terry_loss(margins_without_eos) / len(pairs)).item(),
    }


def drop_eos(pair: Any, eos: int) -> Any:
    """The pair as a pooling sees it that takes a final EOS for padding."""
    from stages.data.text import TokenSequence
    from stages.data.token_pairs import PairExample

    def drop(item: Any) -> Any:
        ends = item.completion_ids[-1] == eos
        return TokenSequence(item.prompt_ids, item.completion_ids[:-1] if ends else item.completion_ids)

    return PairExample(pair.prompt_id, drop(pair.chosen), drop(pair.rejected))


# TRL's half


def compare(directories: list[Path], parts: list[str] | None, out: Path | None) -> int:
    """Compare every recorded folder; 0 if every comparison came out as it should."""
    runs = []
    for directory in directories:
        recorded = Recorded(directory, json.loads((directory / "ours.json").read_text()))
        comparisons = [item for part in parts or find_parts() for item in PARTS[part](recorded)]
        print_table(f"{recorded.contents['model']}, seed {recorded.contents['seed']}", comparisons)
        runs.append((recorded, comparisons))
    if out:
        out.write_text(json.dumps(report(runs), indent=1) + "\n")
    return 0 if all(item.is_expected for _, comparisons in runs for item in comparisons) else 1


def find_parts() -> list[str]:
    """What the installed TRL has; the last with PPO is 1.12."""
    return [part for part in PARTS if part != "ppo" or find_spec("trl.experimental.ppo")]


def compare_sft(recorded: Recorded) -> Iterator[Comparison]:
    """SFTTrainer on our token ids with both paddings and with two micro-batches; on text; then the controls."""
    ours = recorded.contents["ours"]
    loss = 0.0
    for arm, pad_is_eos, num_micro_batches in (
        ("SFT, pad = EOS", True, 1),
        ("SFT, pad ≠ EOS", False, 1),
        ("SFT, pad = EOS, 2 micro-batches", True, 2),
    ):
        trainer = build_sft_trainer(recorded, token_rows(recorded), pad_is_eos)
        loss, num_tokens, gradients = run_sft_trainer(trainer, num_micro_batches)
        yield compare_numbers(arm, "loss", ours["sft_loss"], loss)
        yield compare_numbers(arm, "tokens in the loss", ours["sft_tokens"], num_tokens)
        yield from compare_gradients(arm, recorded.tensors("sft"), gradients)
    for arm, key in (
        ("control: our loss without EOS", "sft_loss_without_eos"),
        ("control: our mean of sequence means", "sft_mean_of_means"),
    ):
        yield compare_numbers(arm, "loss", ours[key], loss, should_agree=False)

    loss, num_tokens, _ = run_sft_trainer(build_sft_trainer(recorded, chat_rows(recorded), pad_is_eos=True), 1)
    arm = "SFT, TRL encodes the chat; ours with a newline after EOS"
    yield compare_numbers(arm, "loss", ours["sft_loss_with_newline"], loss)
    yield compare_numbers(arm, "tokens in the loss", ours["sft_tokens_with_newline"], num_tokens)
    arm = "finding: SFT, TRL encodes the chat"
    yield compare_numbers(arm, "loss", ours["sft_loss"], loss, should_agree=False)
    yield compare_numbers(arm, "tokens in the loss", ours["sft_tokens"], num_tokens, should_agree=False)


def compare_reward(recorded: Recorded) -> Iterator[Comparison]:
    """RewardTrainer with a padding of its own, then with pad = EOS, where its pooling misses the EOS."""
    ours, tensors = recorded.contents["ours"], recorded.tensors("scores")
    arm = "reward, pad ≠ EOS"
    loss, margins, gradients = run_reward_trainer(recorded, pad_is_eos=False)
    yield compare_numbers(arm, "loss", ours["reward_loss"], loss)
    yield compare_tensors(arm, "margins", tensors["margins"], margins)
    yield from compare_gradients(arm, recorded.tensors("reward"), gradients)

    loss, margins, _ = run_reward_trainer(recorded, pad_is_eos=True)
    arm = "reward, pad = EOS; ours without EOS"
    yield compare_numbers(arm, "loss", ours["reward_loss_without_eos"], loss)
    yield compare_tensors(arm, "margins", tensors["margins_without_eos"], margins)
    arm = "finding: reward, pad = EOS"
    yield compare_numbers(arm, "loss", ours["reward_loss"], loss, should_agree=False)
    yield compare_tensors(arm, "margins", tensors["margins"], margins, should_agree=False)


def token_rows(recorded: Recorded) -> list[dict[str, Any]]:
    """Our token ids in the columns of a dataset that TRL takes as tokenised."""
    return [
        {
            "input_ids": item["prompt_ids"] + item["completion_ids"],
            "completion_mask": [0] * len(item["prompt_ids"]) + [1] * len(item["completion_ids"]),
        }
        for item in recorded.contents["demonstrations"]
    ]


def chat_rows(recorded: Recorded) -> list[dict[str, Any]]:
    """The same demonstrations as text, for TRL to encode."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }
        for prompt, completion in recorded.contents["chats"]
    ]


def build_sft_trainer(recorded: Recorded, rows: list[dict[str, Any]], pad_is_eos: bool) -> Any:
    """TRL's SFTTrainer with completion-only loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=recorded.contents["model_path"],
        args=SFTConfig(completion_only_loss=True, **trainer_settings(recorded, NUM_EXAMPLES)),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_trl_tokenizer(recorded, pad_is_eos),
    )


def run_sft_trainer(trainer: Any, num_micro_batches: int) -> tuple[float, int, Gradients]:
    """Loss, tokens that it counts and gradients of one update of TRL's trainer."""
    examples = list(trainer.train_dataset)
    size = len(examples) // num_micro_batches
    parts = (trainer.data_collator(examples[start : start + size]) for start in range(0, len(examples), size))
    micro_batches, num_items = trainer.get_batch_samples(parts, num_micro_batches, torch.device("cpu"))
    trainer.model.train()
    loss = 0.0
    for micro_batch in micro_batches:
        part = trainer.compute_loss(trainer.model, micro_batch, num_items_in_batch=num_items)
        part.backward()
        loss += part.item()
    return loss, int(num_items), take_gradients(trainer.model)


def run_reward_trainer(recorded: Recorded, pad_is_eos: bool) -> tuple[float, Tensor, Gradients]:
    """Loss, margins and gradients of TRL's RewardTrainer, with our initial head."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {f"{side}_ids": pair[side]["prompt_ids"] + pair[side]["completion_ids"] for side in ("chosen", "rejected")}
        for pair in recorded.contents["pairs"]
    ]
    trainer = RewardTrainer(
        model=recorded.contents["model_path"],
        args=RewardConfig(**trainer_settings(recorded, NUM_EXAMPLES)),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_trl_tokenizer(recorded, pad_is_eos),
    )
    with torch.no_grad():
        trainer.model.score.weight.copy_(recorded.tensors("scores")["head"])
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()
    chosen, rejected = outputs.logits.detach().squeeze(-1).chunk(2)
    return loss.item(), chosen - rejected, take_gradients(trainer.model)


PARTS = {
    "sft": compare_sft,
    "reward": compare_reward,
    "rloo": compare_rloo,
    "grpo": compare_grpo,
    "online_dpo": compare_online_dpo,
    "ppo": compare_ppo,
}

if __name__ == "__main__":
    sys.exit(main())
