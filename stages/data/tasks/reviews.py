"""Task `reviews`: continue the opening of a review. Text and openings are made here, from a grammar.

Gold is a sentiment lexicon, so the whole pipeline runs offline in minutes and what it optimises is
known exactly; a second lexicon shows how much of the gain belongs to the first one alone.
"""

import random
from typing import Literal

from pydantic import Field

from stages.common.config import Section
from stages.data.records import Demonstration, Message, Prompt
from stages.data.scorers import ScorerConfig, TextblobScorer, VaderScorer
from stages.data.tasks.reviews_grammar import write_completion, write_opening
from stages.data.tasks.reviews_words import CATEGORIES, OPENINGS, Category
from stages.data.tasks.task import TaskData, make_prompt

SYSTEM = Message("system", "Continue the review.")


class ReviewsTask(Section):
    """Openings of reviews, equally many from each opening template; a template is a group."""

    name: Literal["reviews"]
    num_prompts: int = Field(480, ge=1, le=20_000)
    """Prompts over all splits; training gets those that validation and heldout leave."""
    num_demonstrations: int = Field(900, ge=1, le=100_000)
    """Completions over all splits, equally many for each prompt (one more for some)."""

    def load(self, seed: int) -> TaskData:
        """Write prompts and demonstrations; the same settings and seed give the same text."""
        generator = random.Random(seed)
        subjects = _make_prompts(self.num_prompts, generator)
        demonstrations = _make_demonstrations(subjects, self.num_demonstrations, generator)
        prompts = [prompt for prompt, _ in subjects]
        return TaskData(prompts, demonstrations, pairs=None, num_rows=len(prompts))

    def messages(self, text: str) -> tuple[Message, ...]:
        """An opening typed by a person, in the form of this task's prompts."""
        return (SYSTEM, Message("user", text))

    def scorers(self) -> tuple[ScorerConfig | None, ScorerConfig | None]:
        """VADER is optimised, TextBlob only reported."""
        return VaderScorer(), TextblobScorer()


def _make_prompts(num_prompts: int, generator: random.Random) -> list[tuple[Prompt, Category]]:
    """Different prompts with their category, by turns from every template."""
    templates = list(enumerate(OPENINGS))
    generator.shuffle(templates)
    prompts: dict[str, tuple[Prompt, Category]] = {}
    while len(prompts) < num_prompts:
        index, template = templates[len(prompts) % len(templates)]
        category = generator.choice(CATEGORIES)
        opening = write_opening(template, category, generator)
        prompt = make_prompt([SYSTEM, Message("user", opening)], group=f"opening-{index:02d}")
        prompts.setdefault(prompt.prompt_id, (prompt, category))
    return list(prompts.values())


def _make_demonstrations(
    subjects: list[tuple[Prompt, Category]], num_demonstrations: int, generator: random.Random
) -> list[Demonstration]:
    """Demonstrations for the prompts by turns, none twice."""
    demonstrations: dict[Demonstration, None] = {}
    while len(demonstrations) < num_demonstrations:
        prompt, category = subjects[len(demonstrations) % len(subjects)]
        demonstrations.setdefault(Demonstration(prompt, write_completion(category, generator)))
    return list(demonstrations)
