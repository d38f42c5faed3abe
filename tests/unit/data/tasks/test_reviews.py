import statistics
from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from stages.data.records import Message
from stages.data.tasks.reviews import ReviewsTask
from stages.data.tasks.reviews_words import CATEGORIES, OPENINGS, WORDS
from stages.data.tasks.task import TaskData


def load(seed: int = 0, num_prompts: int = 480, num_demonstrations: int = 900) -> TaskData:
    task = ReviewsTask(name="reviews", num_prompts=num_prompts, num_demonstrations=num_demonstrations)
    return task.load(seed)


DATA = load()
COMPLETIONS = [demonstration.completion for demonstration in DATA.demonstrations]


def test_the_same_seed_writes_the_same_text_and_another_one_other_text() -> None:
    assert load() == DATA
    assert load(seed=1).prompts != DATA.prompts


@settings(max_examples=20)
@given(num_prompts=st.integers(1, 120), num_demonstrations=st.integers(1, 200))
def test_sizes_are_exact_and_nothing_is_there_twice(num_prompts: int, num_demonstrations: int) -> None:
    data = load(3, num_prompts, num_demonstrations)

    assert len({prompt.prompt_id for prompt in data.prompts}) == len(data.prompts) == num_prompts
    assert len(set(data.demonstrations)) == len(data.demonstrations) == num_demonstrations
    assert {demonstration.prompt for demonstration in data.demonstrations} <= set(data.prompts)


def test_a_prompt_is_the_system_message_and_an_opening_and_its_group_the_template() -> None:
    assert {prompt.messages[0] for prompt in DATA.prompts} == {Message("system", "Continue the review.")}
    assert {prompt.messages[1].role for prompt in DATA.prompts} == {"user"}
    assert set(Counter(prompt.group for prompt in DATA.prompts).values()) == {10}  # 480 prompts, 48 templates


def test_the_grammar_is_as_rich_as_promised() -> None:
    assert len(set(OPENINGS)) >= 48
    assert len({category.noun for category in CATEGORIES}) >= 12
    assert min(len(category.aspects) + len(category.plural_aspects) for category in CATEGORIES) >= 8
    assert min(len(set(words[kind])) for words in WORDS.values() for kind in ("adjective", "manner", "moved")) >= 25


def test_openings_say_nothing_about_liking() -> None:
    analyzer = SentimentIntensityAnalyzer()
    scores = [analyzer.polarity_scores(prompt.messages[1].content)["compound"] for prompt in DATA.prompts]

    assert abs(statistics.mean(scores)) < 0.03
    assert max(map(abs, scores)) < 0.35


def test_completions_are_about_as_often_positive_as_negative_and_leave_headroom() -> None:
    analyzer = SentimentIntensityAnalyzer()
    scores = [analyzer.polarity_scores(completion)["compound"] for completion in COMPLETIONS]

    assert 0.0 < statistics.mean(scores) < 0.2
    assert 0.4 < statistics.stdev(scores) < 0.65


def test_completions_are_short_finished_sentences() -> None:
    for completion in COMPLETIONS:
        assert 12 <= len(completion.split()) <= 24
        assert completion[0].isupper()
        assert completion.endswith(".")
        assert not set("{}()") & set(completion)
        assert "  " not in completion


def test_texts_use_the_right_article() -> None:
    words = " ".join([*COMPLETIONS, *(prompt.messages[1].content for prompt in DATA.prompts)]).lower().split()
    after = {article: {word for before, word in pairwise(words) if before == article} for article in ("a", "an")}

    assert {word for word in after["a"] if word[0] in "aeiou"} <= {"useless"}
    assert {word for word in after["an"] if word[0] not in "aeiou"} <= {"hour"}


def test_completions_are_diverse() -> None:
    bigrams = [pair for text in COMPLETIONS[:100] for pair in pairwise(text.split())]

    assert len(set(bigrams)) / len(bigrams) > 0.6
