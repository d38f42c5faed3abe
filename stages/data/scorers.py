"""Which scorer stands for people's taste in a task: its settings; the code is in `stages.scoring`."""

from typing import Annotated, Literal

from pydantic import Field

from stages.common.config import Section


class NoScorer(Section):
    """No gold scorer: the task's own human pairs are the only preference there is."""

    name: Literal["none"] = "none"


class VaderScorer(Section):
    """Sentiment of the completion by VADER's lexicon, -1 (negative) to 1 (positive)."""

    name: Literal["vader"] = "vader"


class TextblobScorer(Section):
    """Sentiment of the completion by TextBlob's lexicon, -1 (negative) to 1 (positive)."""

    name: Literal["textblob"] = "textblob"


class LengthScorer(Section):
    """Length of the completion: a scorer whose gaming is obvious, for tests and demonstrations."""

    name: Literal["length"] = "length"


class ModelScorer(Section):
    """A trained reward model."""

    name: Literal["model"] = "model"
    path: str = Field(min_length=1)
    """Directory of the reward model, relative to the project's folder."""


ScorerConfig = Annotated[
    NoScorer | VaderScorer | TextblobScorer | LengthScorer | ModelScorer, Field(discriminator="name")
]
"""The setting `gold` or `second` of a task."""


class RuleScorer(Section):
    """1 for a completion that gives its problem's answer, else 0. No setting names it: a task has a rule or not."""

    name: Literal["rule"] = "rule"


GoldConfig = ScorerConfig | RuleScorer
"""What a task may have as its gold scorer."""
