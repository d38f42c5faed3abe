"""`make export`: the policy as a folder that transformers, vLLM and a model hub accept."""

import argparse
import json
import logging
import shutil
from pathlib import Path

from stages.common.config import PARAMS, load_section
from stages.common.entry import run_entry
from stages.common.errors import InputError
from stages.common.links import is_judged
from stages.common.pipeline import find_upstream, flatten, read_lock, read_out_hashes, read_settings, read_stages
from stages.common.publish import staging_directory
from stages.common.version import git_commit
from stages.generation.config import GenerationConfig
from stages.models.config import ModelConfig
from stages.release.model_card import MARK, render_model_card

POLICY = Path("artifacts/policy")
METRICS = Path("metrics")
DEFAULT_TARGET = Path("exported/policy")
CARD = "README.md"

logger = logging.getLogger(__name__)


def main() -> None:
    """artifacts/policy -> a Hugging Face directory at `--to`, whole or not at all."""
    parser = argparse.ArgumentParser(prog="python -m stages.export", description=__doc__)
    parser.add_argument("--to", type=Path, default=DEFAULT_TARGET, help=f"folder to write (default: {DEFAULT_TARGET})")
    export_policy(parser.parse_args().to)


def export_policy(target: Path) -> None:
    """Write the export; an earlier one at the same place is replaced.

    Raises:
        InputError: there is no policy, it was made with other settings, or what lies at `target` is no export.
        SettingError: params.yaml is wrong.
    """
    generation = load_section("generation", GenerationConfig)
    model = load_section("model", ModelConfig)
    if not POLICY.is_dir():
        raise InputError(f"{POLICY}: no such model; run `make run` first")
    _require_settings()
    target = target.resolve()
    _require_replaceable(target)
    from stages.models.load import load_tokenizer, require_model_directory

    require_model_directory(POLICY)
    load_tokenizer(POLICY)  # says so if it is not readable
    others = _find_outs_of_another_policy()
    metrics = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(METRICS.glob("*.json"))
        if str(path) not in others
    }
    hashes = {out: md5 for out, md5 in read_out_hashes().items() if out not in others}
    card = render_model_card(model, PARAMS.read_text(encoding="utf-8"), metrics, hashes, git_commit())
    with staging_directory(target) as staged:
        # Contents without modes: DVC's outs are read-only.
        shutil.copytree(POLICY, staged, dirs_exist_ok=True, copy_function=shutil.copyfile)
        _write_sampling_settings(staged, generation)
        (staged / CARD).write_text(card, encoding="utf-8")


def _require_settings() -> None:
    """Refuse settings that the policy was not made with: card and sampling settings would tell of another one."""
    lock = read_lock()
    if "train_policy" not in lock:
        return
    stages = read_stages()
    for name in (*find_upstream("train_policy", stages), "train_policy"):
        made, today = flatten(lock[name].settings) if name in lock else {}, flatten(read_settings(stages[name]))
        for key in sorted(made.keys() | today.keys() if made else ()):
            if made.get(key) != today.get(key):
                raise InputError(
                    f"{POLICY}: was made with {key}={made.get(key)!r}, params.yaml has {today.get(key)!r}; run "
                    "`make run`, or set params.yaml back, so that the export says what it is"
                )


def _find_outs_of_another_policy() -> set[str]:
    """Samples and verdict of an earlier policy, which the card must not show; empty where they are of this one."""
    if is_judged():
        return set()
    logger.warning("the judge has not seen this policy, the card has no verdict; run `make run` for one")
    lock, stages = read_lock(), read_stages()
    later = [name for name in lock if name in stages and "train_policy" in find_upstream(name, stages)]
    return {out for name in later for out in lock[name].outs}


def _require_replaceable(target: Path) -> None:
    """Refuse to replace a folder that is not an earlier export: a typo must not delete work."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    card = target / CARD
    if not card.is_file() or MARK not in card.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"--to {target}: exists and is no earlier export; choose another folder or remove it")


def _write_sampling_settings(directory: Path, config: GenerationConfig) -> None:
    from transformers import GenerationConfig as SamplingSettings

    settings = SamplingSettings.from_pretrained(directory)
    # top_p and top_k are said although they change nothing: other programs' defaults would cut the distribution.
    settings.update(
        do_sample=True,
        temperature=config.temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
    )
    # Marked as derived from config.json, where these settings are not, it would be derived anew.
    settings._from_model_config = False
    settings.save_pretrained(directory)


if __name__ == "__main__":
    run_entry(main)
