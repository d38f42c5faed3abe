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


class ClassifierScorer(Section):
    """A text classifier of the user's, such as one of sentiment; its tokenizer may be any."""

    name: Literal["classifier"] = "classifier"
    path: str = Field(min_length=1)
    """Directory of a sequence classifier with its tokenizer, relative to the project's folder."""
    label: str = Field(min_length=1)
    """What the classifier's config calls the label whose score counts, such as POSITIVE."""
    score: Literal["logit", "logprob", "probability"] = "logprob"
    """Of the label; logprob and probability are over all of the classifier's labels."""
    with_prompt: bool = True
    """Whether the prompt is read before the completion. What the classifier cannot read is cut off at the left."""


ScorerConfig = Annotated[
    NoScorer | VaderScorer | TextblobScorer | LengthScorer | ModelScorer | ClassifierScorer, Field(discriminator="name")
]
"""The setting `gold` or `second` of a task."""


class RuleScorer(Section):
    """1 for a completion that gives its problem's answer, else 0. No setting names it: a task has a rule or not."""

    name: Literal["rule"] = "rule"


GoldConfig = ScorerConfig | RuleScorer
"""What a task may have as its gold scorer."""
