"""Whether the tokenizers of the models that are here agree, and the traps between prompt, padding and end."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from stages.common.errors import InputError
from stages.common.hashing import hash_text
from stages.data.store import read_prompts
from stages.data.text import TODAY, write_prompt
from stages.generation.requests import make_requests
from stages.models.config import PathSource
from stages.models.load import load_tokenizer
from stages.models.source import make_plain_template
from stages.plan.architecture import Architecture
from stages.plan.checks import Finding
from stages.plan.settings import Places, Settings

ARTIFACTS = {"policy": "artifacts/sft", "reward model": "artifacts/reward", "base": "artifacts/base"}
NUM_PROMPTS = 200
"""Training prompts whose lengths are looked at."""
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Found:
    """A tokenizer that is on this machine."""

    role: str
    path: Path
    tokenizer: PreTrainedTokenizerBase


def check_tokenizers(settings: Settings, policy: Architecture, places: Places) -> Iterator[Finding]:
    """Compare all that are here; what is not is said to be not checked.

    Args:
        settings: all sections.
        policy: its embeddings must have a row for every token.
        places: where to look.

    Raises:
        InputError: a tokenizer cannot be read.
    """
    found = _find(settings, places)
    missing = [role for role in _list_roles(settings) if role not in {item.role for item in found}]
    if missing:
        yield Finding("not checked", f"tokenizers of {', '.join(missing)}: not here yet")
    if not found:
        return
    first, *others = found
    yield from _check_one(settings, policy, first)
    yield from _check_lengths(settings, first, places.artifacts / "artifacts/data")
    for other in others:
        yield _compare(first, other)


def _list_roles(settings: Settings) -> list[str]:
    roles = ["base", "policy"] + ([] if settings.has_rule else ["reward model"])
    return roles + (["gold model"] if settings.gold_model is not None else [])


def _find(settings: Settings, places: Places) -> list[Found]:
    is_made = places.has_made(settings.model)  # else those of another model are there
    paths = {role: places.artifacts / path for role, path in ARTIFACTS.items()} if is_made else {}
    if isinstance(settings.model.source, PathSource):
        paths["base"] = places.inputs / settings.model.source.path
    if settings.gold_model is not None:
        paths["gold model"] = places.inputs / settings.gold_model
    return [
        Found(role, path, load_tokenizer(path))
        for role, path in paths.items()
        if role in _list_roles(settings) and any((path / name).is_file() for name in FILES)
    ]


def _check_one(settings: Settings, policy: Architecture, found: Found) -> Iterator[Finding]:
    tokenizer = found.tokenizer
    if tokenizer.eos_token_id is None:
        yield Finding("wrong", f"{found.path}: its tokenizer has no end-of-sequence token, so completions cannot end")
        return
    if len(tokenizer) > policy.vocabulary:
        yield Finding("wrong", f"{found.path}: {len(tokenizer)} tokens, but the model has {policy.vocabulary}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            "ok", f"pad is eos ({tokenizer.eos_token!r}): harmless here, masks come from lengths; EOS is trained"
        )
    is_plain = settings.model.chat_template == "plain"
    template = make_plain_template(tokenizer) if is_plain else tokenizer.chat_template
    if template is None:
        yield Finding("wrong", f"{found.path}: has no chat template; set model.chat_template to 'plain'")
        return
    yield from _check_prompt(settings, found, str(template))


def _check_prompt(settings: Settings, found: Found, template: str) -> Iterator[Finding]:
    """A prompt of the task's form, as the data stages would write it."""
    tokenizer = found.tokenizer
    try:
        text = write_prompt(tokenizer, settings.data.task.messages("text"), f"{found.path}: a prompt", template)
    except InputError as error:
        yield Finding("wrong", str(error))
        return
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    yield Finding(
        "ok", f"chat template: a prompt of task {settings.data.task.name} is {len(ids)} tokens around its text"
    )
    usual = tokenizer(text)["input_ids"]
    if usual[0] == tokenizer.bos_token_id != ids[0]:
        yield Finding(
            "note", f"prompts begin without {tokenizer.bos_token!r}, which this tokenizer adds by itself elsewhere"
        )
    if "strftime_now" in template:
        yield Finding(
            "note", f"the chat template writes the day; it is told {TODAY:%d %b %Y}, so that prompts stay the same"
        )


def _check_lengths(settings: Settings, found: Found, data: Path) -> Iterator[Finding]:
    """How many of the first training prompts are within the limit, once they are prepared."""
    if found.tokenizer.chat_template is None or not data.is_dir():
        yield Finding("not checked", "prompt lengths: artifacts/data or a chat template is not here yet")
        return
    prompts = read_prompts(data, "train")[:NUM_PROMPTS]
    requests, num_too_long = make_requests(prompts, found.tokenizer, settings.generation, settings.rl.seed)
    limit = f"generation.max_prompt_tokens={settings.generation.max_prompt_tokens}"
    if not requests:
        yield Finding("wrong", f"none of {len(prompts)} training prompts fits into {limit}; raise it")
    elif num_too_long:
        yield Finding("note", f"{num_too_long} of {len(prompts)} training prompts exceed {limit} and would be dropped")
    else:
        longest = max(len(request.prompt_ids) for request in requests)
        yield Finding("ok", f"prompt lengths: at most {longest} tokens in {len(prompts)} prompts, {limit}")


def _compare(first: Found, other: Found) -> Finding:
    names = f"{first.role} and {other.role}"
    if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        return Finding("wrong", f"tokenizers of {names} differ ({first.path}, {other.path}): token ids would not match")
    if first.tokenizer.eos_token_id != other.tokenizer.eos_token_id:
        return Finding("wrong", f"tokenizers of {names} have different end-of-sequence tokens")
    templates = [hash_text(str(item.tokenizer.chat_template or "")) for item in (first, other)]
    if templates[0] != templates[1] and other.role != "gold model":
        return Finding("note", f"chat templates of {names} differ; prompts are written with that of {first.role}")
    return Finding("ok", f"tokenizers of {names} agree")
