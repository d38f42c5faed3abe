"""The grammar of task `reviews`: openings without sentiment, completions with a hidden one.

A completion is planned from a level, -2 (very negative) to 2 (very positive), and filled from the word
lists. No word is drawn twice in one completion.
"""

import random
import re
from collections.abc import Sequence
from typing import Literal

from stages.data.tasks.reviews_words import (
    ADVERBS,
    CONTRASTS,
    MADE,
    OPINIONS,
    PEOPLE,
    PLAIN,
    REMARKS,
    SOURCES,
    TIMES,
    WORDS,
    Category,
    Polarity,
)

Level = Literal[-2, -1, 0, 1, 2]
LEVELS: tuple[Level, ...] = (-2, -1, 0, 1, 2)
LEVEL_WEIGHTS = (3, 3, 2, 3, 4)
"""How often each level is drawn. A little more praise, as in the base model's own continuations."""

MIN_WORDS = 12
MAX_WORDS = 24
"""Limits of a completion, in words; 24 words are at most 36 tokens of the embedded model."""

VERDICTS = ("{verdict}",)

SLOT = re.compile(r"\{(\w+)\}")
ARTICLE = re.compile(r"a\(n\) (?=(\w+))")
CONSONANT_SOUND = re.compile(r"use|uni|one", re.IGNORECASE)
"""Words that begin with a written vowel and a spoken consonant: a useless app, a unique museum."""


def write_opening(template: str, category: Category, generator: random.Random) -> str:
    """Fill one of `OPENINGS` for a subject of the category."""
    do, did, done, doing = category.verb
    values = {"do": do, "did": did, "done": done, "doing": doing, "noun": category.noun}
    values |= {
        "name": generator.choice(category.names),
        "time": generator.choice(TIMES),
        "person": generator.choice(PEOPLE),
        "source": generator.choice(SOURCES),
    }
    return _finish(SLOT.sub(lambda slot: values[slot[1]], template))


def write_completion(category: Category, generator: random.Random) -> str:
    """One or two sentences about a subject of the category, `MIN_WORDS` to `MAX_WORDS` long."""
    while True:
        level = generator.choices(LEVELS, LEVEL_WEIGHTS)[0]
        writer = _Writer(category, generator, "positive" if level > 0 else "negative")
        sentences = [writer.fill(template) for template in _plan(level, generator)]
        text = " ".join(_finish(f"{sentence}.") for sentence in sentences)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return text


def _plan(level: Level, generator: random.Random) -> list[str]:
    """Templates of one or two sentences; the polarity of their slots is that of the level."""
    if level == 0:
        choices: list[list[Sequence[str]]] = [
            [REMARKS, REMARKS],
            [REMARKS],
            [CONTRASTS],
            [CONTRASTS, REMARKS],
        ]
    elif abs(level) == 1:
        choices = [[CONTRASTS], [CONTRASTS, VERDICTS], [OPINIONS, REMARKS], [REMARKS, OPINIONS], [OPINIONS]]
    else:
        choices = [[OPINIONS, OPINIONS], [OPINIONS, VERDICTS], [OPINIONS]]
    return [generator.choice(templates) for templates in generator.choice(choices)]


class _Writer:
    """Fills the slots of one completion."""

    def __init__(self, category: Category, generator: random.Random, polarity: Polarity) -> None:
        self._category = category
        self._generator = generator
        self._polarity = polarity
        self._opposite: Polarity = "negative" if polarity == "positive" else "positive"
        self._used: set[str] = set()
        self._is_plural = False

    def fill(self, template: str) -> str:
        """The template with every slot filled, also those inside a drawn verdict."""
        filled: list[str] = []
        for index, piece in enumerate(SLOT.split(template)):
            filled.append(piece if index % 2 == 0 else self._fill_slot(piece))
        return "".join(filled)

    def _fill_slot(self, slot: str) -> str:
        if slot == "aspect":
            return self._draw_aspect()
        if slot == "was":
            return "were" if self._is_plural else "was"
        if slot == "verdict":
            return self.fill(self._draw(WORDS[self._polarity]["verdict"]))
        fixed = {"do": self._category.verb[0], "did": self._category.verb[1], "noun": self._category.noun}
        return fixed[slot] if slot in fixed else self._draw(self._choices(slot))

    def _choices(self, slot: str) -> Sequence[str]:
        common: dict[str, Sequence[str]] = {
            "adverb": ADVERBS,
            "plain": PLAIN,
            "made": MADE,
            "person": PEOPLE,
            "detail": self._category.details,
        }
        if slot in common:
            return common[slot]
        if slot.startswith("other_"):
            return WORDS[self._opposite][slot.removeprefix("other_")]
        return WORDS[self._polarity][slot]

    def _draw_aspect(self) -> str:
        aspect = self._draw([*self._category.aspects, *self._category.plural_aspects])
        self._is_plural = aspect in self._category.plural_aspects
        return aspect

    def _draw(self, choices: Sequence[str]) -> str:
        word = self._generator.choice([choice for choice in choices if choice not in self._used])
        self._used.add(word)
        return word


def _finish(text: str) -> str:
    """Begin with a capital; `a(n)` becomes the article that the next word asks for."""
    text = ARTICLE.sub(lambda match: f"{_article(match[1])} ", text)
    return text[0].upper() + text[1:]


def _article(word: str) -> str:
    is_vowel = word[0].lower() in "aeiou" and not CONSONANT_SOUND.match(word)
    return "an" if is_vowel else "a"
