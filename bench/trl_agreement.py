"""Do our SFT and Bradley–Terry losses and gradients agree with TRL's trainers on the same batch?

Two halves that exchange a folder, because TRL lives in an environment of its own (requirements/trl.txt):
`record` computes our side from the code that trains, `compare` lets TRL's trainers compute theirs from the same
model and the same token ids, and judges. Answers: docs/benchmarks/2026-11-21-trl-agreement.md.
"""

import argparse
import json
import platform
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOLERANCE = 1e-4
"""Largest relative difference that counts as agreement."""
NUM_EXAMPLES = 4
TEXT = "the film was slow at first but its second half moved me and I would gladly watch it again with friends"

Gradients = dict[str, Tensor]


def main() -> int:
    """Parse the command line and run one half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    halves = parser.add_subparsers(dest="half", required=True)
    record_parser = halves.add_parser("record", help="our half, in the project's environment")
    record_parser.add_argument("directory", type=Path)
    record_parser.add_argument("--model", type=Path, help="model directory; a two-layer random Llama if left out")
    record_parser.add_argument("--seed", type=int, default=0, help="of the batch, the head and the random Llama")
    compare_parser = halves.add_parser("compare", help="TRL's half, in the environment of requirements/trl.txt")
    compare_parser.add_argument("directories", type=Path, nargs="+")
    compare_parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    if arguments.half == "record":
        record(arguments.directory, arguments.model, arguments.seed)
        return 0
    return compare(arguments.directories, arguments.out)


# Our half


def record(directory: Path, model_path: Path | None, seed: int) -> None:
    """Write the batch, our losses and our gradients into `directory`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `stages` and `tests` are not installed
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
    sft_numbers, sft_gradients = record_sft(model_path, demonstrations, newline)
    reward_numbers, reward_tensors = record_reward(model_path, pairs, seed)
    save_file(sft_gradients | reward_tensors, directory / "ours.safetensors")
    contents = {
        "model": name,
        "model_path": str(model_path.resolve()),
        "seed": seed,
        "chats": chats,
        "demonstrations": [asdict(item) for item in demonstrations],
        "pairs": [{"chosen": asdict(pair.chosen), "rejected": asdict(pair.rejected)} for pair in pairs],
        "ours": sft_numbers | reward_numbers,
        "versions": versions("torch", "transformers"),
    }
    (directory / "ours.json").write_text(json.dumps(contents, indent=1))
    print(f"{directory}: {json.dumps(contents['ours'])}")


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


def record_sft(
    model_path: Path, demonstrations: list[Any], newline: tuple[int, ...]
) -> tuple[dict[str, float], Gradients]:
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
    without_eos = [TokenSequence(item.prompt_ids, item.completion_ids[:-1]) for item in demonstrations]
    with_newline = [TokenSequence(item.prompt_ids, item.completion_ids + newline) for item in demonstrations]
    with torch.no_grad():
        numbers = {
            "sft_loss": loss.item(),
            "sft_tokens": sum(len(item.completion_ids) for item in demonstrations),
            "sft_loss_with_newline": batch_loss(with_newline).item(),
            "sft_tokens_with_newline": sum(len(item.completion_ids) for item in with_newline),
            "sft_loss_without_eos": batch_loss(without_eos).item(),
            "sft_mean_of_means": sum(batch_loss([item]).item() for item in demonstrations) / len(demonstrations),
        }
    return numbers, take_gradients(model, "sft/")


def record_reward(model_path: Path, pairs: list[Any], seed: int) -> tuple[dict[str, float], Gradients]:
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
    numbers = {
        "reward_loss": loss.item(),
        "reward_loss_without_eos": (bradley_terry_loss(margins_without_eos) / len(pairs)).item(),
    }
    tensors = {
        "head": model.score.weight.detach().cpu(),
        "margins": margins,
        "margins_without_eos": margins_without_eos,
    }
    return numbers, take_gradients(model, "reward/") | tensors


def drop_eos(pair: Any, eos: int) -> Any:
    """The pair as a pooling sees it that takes a final EOS for padding."""
    from stages.data.text import TokenSequence
    from stages.data.token_pairs import PairExample

    def drop(item: Any) -> Any:
        ends = item.completion_ids[-1] == eos
        return TokenSequence(item.prompt_ids, item.completion_ids[:-1] if ends else item.completion_ids)

    return PairExample(pair.prompt_id, drop(pair.chosen), drop(pair.rejected))


def take_gradients(model: Any, prefix: str = "") -> Gradients:
    """Every parameter's gradient, by the parameter's name."""
    return {
        prefix + name: parameter.grad.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


# TRL's half


@dataclass(frozen=True)
class Comparison:
    """One quantity, computed by both sides."""

    arm: str
    quantity: str
    ours: float
    trl: float
    relative_difference: float
    should_agree: bool
    """False for controls: a check that cannot tell a wrong loss from ours would prove nothing."""

    @property
    def is_expected(self) -> bool:
        """Within the tolerance where the two should agree, outside it where they should not."""
        return (self.relative_difference <= TOLERANCE) == self.should_agree


@dataclass(frozen=True)
class Recorded:
    """What `record` wrote."""

    directory: Path
    contents: dict[str, Any]
    tensors: Gradients

    def gradients(self, stage: str) -> Gradients:
        """Our gradients of one stage."""
        start = f"{stage}/"
        return {name.removeprefix(start): grad for name, grad in self.tensors.items() if name.startswith(start)}


def compare(directories: list[Path], out: Path | None) -> int:
    """Compare every recorded folder; 0 if every comparison came out as it should."""
    runs = []
    for directory in directories:
        recorded = Recorded(
            directory,
            json.loads((directory / "ours.json").read_text()),
            load_file(directory / "ours.safetensors"),
        )
        comparisons = [*compare_sft(recorded), *compare_reward(recorded)]
        print_table(f"{recorded.contents['model']}, seed {recorded.contents['seed']}", comparisons)
        runs.append((recorded, comparisons))
    if out:
        out.write_text(json.dumps(report(runs), indent=1) + "\n")
    return 0 if all(item.is_expected for _, comparisons in runs for item in comparisons) else 1


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
        yield from compare_gradients(arm, recorded.gradients("sft"), gradients)
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
    ours, tensors = recorded.contents["ours"], recorded.tensors
    arm = "reward, pad ≠ EOS"
    loss, margins, gradients = run_reward_trainer(recorded, pad_is_eos=False)
    yield compare_numbers(arm, "loss", ours["reward_loss"], loss)
    yield compare_tensors(arm, "margins", tensors["margins"], margins)
    yield from compare_gradients(arm, recorded.gradients("reward"), gradients)

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
        args=SFTConfig(completion_only_loss=True, **trainer_settings(recorded)),
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
        args=RewardConfig(**trainer_settings(recorded)),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_trl_tokenizer(recorded, pad_is_eos),
    )
    with torch.no_grad():
        trainer.model.score.weight.copy_(recorded.tensors["head"])
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()
    chosen, rejected = outputs.logits.detach().squeeze(-1).chunk(2)
    return loss.item(), chosen - rejected, take_gradients(trainer.model)


def trainer_settings(recorded: Recorded) -> dict[str, Any]:
    """What departs from TRL's defaults: float32 instead of bf16, and nothing that saves memory or reports."""
    return {
        "output_dir": str(recorded.directory / "trl"),
        "per_device_train_batch_size": NUM_EXAMPLES,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


def load_trl_tokenizer(recorded: Recorded, pad_is_eos: bool) -> Any:
    """The model's tokenizer; for `pad ≠ EOS` it pads with a token that the batch does not contain."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recorded.contents["model_path"])
    spare = next(token for token in ("<|endoftext|>", "<unk>") if token in tokenizer.get_vocab())
    tokenizer.pad_token = tokenizer.eos_token if pad_is_eos else spare
    return tokenizer


# Judging


def compare_numbers(arm: str, quantity: str, ours: float, trl: float, should_agree: bool = True) -> Comparison:
    """|ours − TRL's| / |TRL's|."""
    return Comparison(arm, quantity, ours, trl, abs(ours - trl) / abs(trl), should_agree)


def compare_tensors(arm: str, quantity: str, ours: Tensor, trl: Tensor, should_agree: bool = True) -> Comparison:
    """‖ours − TRL's‖ / ‖TRL's‖, beside both norms."""
    return Comparison(arm, quantity, ours.norm().item(), trl.norm().item(), distance(ours, trl), should_agree)


def compare_gradients(arm: str, ours: Gradients, trl: Gradients) -> Iterator[Comparison]:
    """All parameters as one vector, and the single tensor that differs most."""
    if ours.keys() != trl.keys():
        raise ValueError(f"{arm}: different parameters have gradients: {sorted(ours.keys() ^ trl.keys())}")
    names = sorted(ours)
    ours_flat, trl_flat = (torch.cat([grads[name].flatten() for name in names]) for grads in (ours, trl))
    yield compare_tensors(arm, f"gradient ({len(names)} tensors)", ours_flat, trl_flat)
    worst = max(names, key=lambda name: distance(ours[name], trl[name]))
    yield compare_tensors(arm, f"gradient, worst tensor: {worst}", ours[worst], trl[worst])


def distance(ours: Tensor, trl: Tensor) -> float:
    """Relative distance, computed in float64."""
    return ((ours.double() - trl.double()).norm() / trl.double().norm()).item()


def print_table(title: str, comparisons: list[Comparison]) -> None:
    """One Markdown table per run."""
    print(f"\n### {title}\n\n| arm | quantity | ours | TRL | relative difference | as it should be |")
    print("|---|---|---|---|---|---|")
    for item in comparisons:
        values = f"{item.ours:.7g} | {item.trl:.7g} | {item.relative_difference:.1e}"
        print(f"| {item.arm} | {item.quantity} | {values} | {'yes' if item.is_expected else 'NO'} |")


def report(runs: list[tuple[Recorded, list[Comparison]]]) -> dict[str, Any]:
    """Every number, with what produced it."""
    return {
        "question": "Do our SFT and Bradley–Terry losses agree with TRL's trainers on the same batch?",
        "tolerance": TOLERANCE,
        "machine": f"{platform.system()} {platform.machine()}, CPU, {torch.get_num_threads()} thread(s), float32",
        "versions_trl_half": versions("trl", "torch", "transformers", "accelerate", "datasets"),
        "runs": [
            {
                "model": recorded.contents["model"],
                "seed": recorded.contents["seed"],
                "versions_our_half": recorded.contents["versions"],
                "comparisons": [asdict(item) | {"is_expected": item.is_expected} for item in comparisons],
            }
            for recorded, comparisons in runs
        ],
    }


def versions(*names: str) -> dict[str, str]:
    """Installed versions, and Python's."""
    return {"python": platform.python_version()} | {name: version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
