"""docs/metrics.md has a row for every metric the code logs, and no row for one it does not."""

import ast
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from stages.data.text import LengthReport
from stages.judge.agreement import measure_agreement
from stages.judge.alarms import raise_alarms
from stages.judge.evaluate import evaluate_comparison, select_numbers
from stages.judge.length_control import measure_length_control
from stages.judge.llm.judging import Judging
from stages.judge.llm_judge import count_questions
from stages.judge.pass_rate import measure_pass_rates
from stages.judge.preferences import measure_preferences
from stages.rl.offline import OfflineResult, PairEvaluation
from stages.rl.progress import Progress
from stages.rl.report import summarise, summarise_offline
from stages.rl.timeline import Timeline
from stages.rl.train import Result
from stages.rl.validation import Evaluation
from tests.unit.judge.comparisons import small_comparison
from tests.unit.judge.judgements import pairwise, single

COMPONENTS = (
    "learner|reward|eval|rollout|time|sft|online_dpo|remax|copg|best_of_n|value|dpo|data|judge|perf|pairs|samples|policy|"
    "system"
)
NAME = re.compile(rf"({COMPONENTS})/[a-z0-9_/{{}}]+")
PLACEHOLDER = re.compile(r"\{\w*\}")
ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def read_rows() -> list[str]:
    return ROW.findall(Path("docs/metrics.md").read_text())


def read_literals() -> set[str]:
    """Every string literal under stages/; in an f-string `{name}` stands for a variable, `{}` for an expression."""
    literals: set[str] = set()
    for path in Path("stages").rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                literals.add("".join(_spell(part) for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                literals.add(node.value)
    return literals


def _spell(part: ast.expr) -> str:
    if isinstance(part, ast.FormattedValue):
        return f"{{{part.value.id if isinstance(part.value, ast.Name) else ''}}}"
    assert isinstance(part, ast.Constant)
    return str(part.value)


def matches(name: str, pattern: str) -> bool:
    """Whether a name is what an f-string may give: each placeholder stands for one word or more."""
    return re.fullmatch("[a-z0-9_{}]+".join(re.escape(part) for part in PLACEHOLDER.split(pattern)), name) is not None


def has_source(row: str, literals: set[str]) -> bool:
    """Whether code can log this name: as it stands, or as an f-string whose filled-in word occurs in the code."""
    if row in literals:
        return True
    component, _, rest = row.partition("/")
    word = PLACEHOLDER.split(rest)[0].rstrip("_")
    # An f-string without a word of its own would match anything.
    words = {literal for literal in literals if re.search(r"[a-z]{3}", PLACEHOLDER.sub("", literal))}
    is_word = any(word == literal or ("{" in literal and matches(word, literal)) for literal in words)
    families = [literal for literal in literals if NAME.fullmatch(literal) and literal.startswith(f"{component}/{{")]
    return is_word and any(matches(row, family) for family in families)


def test_every_logged_name_has_a_row() -> None:
    rows = read_rows()
    names = sorted(literal for literal in read_literals() if NAME.fullmatch(literal))

    assert len(names) > 30
    assert [
        name for name in names if name not in rows and not any("{" in name and matches(row, name) for row in rows)
    ] == []


def test_every_row_is_logged_by_the_code() -> None:
    literals = read_literals()
    rows = [row for row in read_rows() if not row.startswith("metrics/")]

    assert [row for row in rows if not has_source(row, literals)] == []


def test_every_row_has_a_known_component_and_appears_once() -> None:
    rows = read_rows()

    assert sorted({row for row in rows if rows.count(row) > 1}) == []
    assert [row for row in rows if not NAME.fullmatch(row) and not row.startswith("metrics/")] == []


def collect_judge_names() -> set[str]:
    """Numbers of a comparison and of an LLM judge in both of its modes."""
    comparison = small_comparison()
    judgements = [pairwise("a", "first", "second"), pairwise("b", "second", "first")]
    compared = evaluate_comparison(comparison, seed=0)
    preferences = measure_preferences(judgements, seed=0)
    parts = [
        compared,
        measure_pass_rates(comparison, seed=0),
        preferences,
        measure_preferences([single("a", 7, 3)], seed=0),
        measure_length_control(judgements, seed=0),
        measure_agreement(judgements, gold=[1.0, 0.0], proxy=[1.0, 0.0]),
        raise_alarms(compared | preferences)[1],
        count_questions(Judging((), 4, 0, 4, 0, 0, 100, 40, 0.01, is_text_fallback=False)),
    ]
    return {name for part in parts for name in select_numbers(part)}


def test_every_number_of_the_judge_and_of_the_policy_has_a_row(tmp_path: Path) -> None:
    evaluation = Evaluation(policy_version=0, score=0.5, kl_nats=0.0, completion_tokens=3.0, finished_fraction=1.0)
    progress = Progress(first=evaluation, best=evaluation, last=evaluation, staleness=Counter([0]))
    result = Result(
        progress, Timeline(tmp_path / "timeline.jsonl"), dropped={}, publish_bytes=0, num_prompts_too_long=0
    )
    judged = {f"judge/{re.sub('^pass_at_[0-9]+', 'pass_at_{k}', name)}" for name in collect_judge_names()}
    evaluated = {f"eval/{name}" for name in asdict(evaluation)} - {"eval/policy_version"}

    rows = read_rows()

    assert sorted(judged) == sorted(row for row in rows if row.startswith("judge/"))
    assert sorted((evaluated | {f"policy/{name}" for name in summarise(result, 1)}) - set(rows)) == []


def test_every_number_of_an_offline_policy_has_a_row(tmp_path: Path) -> None:
    evaluation = PairEvaluation(policy_version=0, loss=0.7, accuracy=0.5, margin=0.0)
    result = OfflineResult(evaluation, evaluation, evaluation, 8, 4, LengthReport(8, 0, 0))

    names = {f"policy/{name}" for name in summarise_offline(result, Timeline(tmp_path / "timeline.jsonl"), 1)}

    assert sorted(names - set(read_rows())) == []


@pytest.mark.parametrize("row", [row for row in read_rows() if row.startswith("metrics/")])
def test_fields_of_metrics_files_occur_in_the_code(row: str) -> None:
    _, _, field = row.partition(": ")

    assert field in read_literals()
