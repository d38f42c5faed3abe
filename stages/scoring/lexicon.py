"""Scorers that need no model: sentiment lexicons and length. They read the completion's text alone."""

from collections.abc import Sequence

from stages.data.records import Completion


class VaderScorer:
    """VADER's compound sentiment, −1 … 1 (Hutto & Gilbert 2014)."""

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Compound sentiment of each text."""
        return [float(self._analyzer.polarity_scores(item.text)["compound"]) for item in completions]


class TextblobScorer:
    """TextBlob's polarity, −1 … 1: another lexicon, to see whether the first one is being gamed."""

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Polarity of each text."""
        from textblob import TextBlob

        return [float(TextBlob(item.text).sentiment.polarity) for item in completions]


class LengthScorer:
    """Number of words: a scorer whose gaming is obvious, for tests and demonstrations."""

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Words of each text."""
        return [float(len(item.text.split())) for item in completions]
