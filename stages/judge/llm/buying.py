"""All questions of an evaluation that no stored verdict answers, asked at once and each verdict kept as it comes."""

import asyncio
import signal
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.errors import RunError
from stages.common.progress import progress
from stages.judge.config import JudgeConfig
from stages.judge.llm.account import NOTHING, Account, compute_cost
from stages.judge.llm.asking import Asked, Asker
from stages.judge.llm.client import JudgeClient
from stages.judge.llm.pacing import Pacing
from stages.judge.llm.redaction import Redact
from stages.judge.llm.rubric import Reading, Rubric
from stages.judge.llm.verdicts import VerdictStore
from stages.judge.matches import Verdict


@dataclass(frozen=True)
class Question:
    """What is asked, and its name."""

    key: str
    """Hash of all that the reply depends on."""
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Purchase:
    """What was bought."""

    verdicts: dict[str, Verdict]
    """By key; a question without an answer has none."""
    is_text_fallback: bool
    """Whether the endpoint refused the schema, so that plain text was asked for."""


@dataclass(frozen=True)
class _Shop:
    """What all workers share."""

    config: JudgeConfig
    rubric: Rubric
    store: VerdictStore
    asker: Asker
    redact: Redact


def buy_verdicts(
    questions: Sequence[Question], config: JudgeConfig, rubric: Rubric, store: VerdictStore, account: Account
) -> Purchase:
    """Ask all these questions; must not be called inside an event loop.

    An interrupt ends it at once. What is stored by then stays stored; calls in flight are lost and count as paid.

    Raises:
        SettingError: there is no key, or the endpoint refuses for good.
        RunError: the budget or the time is used up. Verdicts of calls in flight are kept first.
    """
    return _run(_buy(questions, config, rubric, store, account))


def _run(purchase: Coroutine[Any, Any, Purchase]) -> Purchase:
    """`asyncio.run`, which SIGTERM ends as Ctrl-C does: an exit raised inside a task would be lost as its error."""
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return asyncio.run(purchase)
    is_asked_to_end = False

    async def watch() -> Purchase:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def end(*_: object) -> None:
            nonlocal is_asked_to_end
            is_asked_to_end = True
            task.cancel()
            loop.call_soon_threadsafe(lambda: None)  # it may be waiting for the network

        signal.signal(signal.SIGTERM, end)
        return await purchase

    try:
        return asyncio.run(watch())
    except asyncio.CancelledError:
        if not is_asked_to_end:
            raise
    finally:
        signal.signal(signal.SIGTERM, handler)
    signal.raise_signal(signal.SIGTERM)
    raise asyncio.CancelledError  # the handler has returned, which the stages' own does not


async def _buy(
    questions: Sequence[Question], config: JudgeConfig, rubric: Rubric, store: VerdictStore, account: Account
) -> Purchase:
    pacing = Pacing(config.seed, config.total_timeout_s)
    async with JudgeClient(config) as client:
        shop = _Shop(config, rubric, store, Asker(config, account, client, pacing), client.redact)
        verdicts: dict[str, Verdict] = {}
        waiting, done = iter(questions), progress(len(questions), "judging", unit="question")
        next(done, None)
        num_workers = min(config.concurrency, len(questions))
        workers = [asyncio.create_task(_work(shop, waiting, verdicts, done)) for _ in range(num_workers)]
        try:
            async with asyncio.timeout(config.total_timeout_s) as limit:
                await _finish(workers, pacing)
        except TimeoutError:
            if not limit.expired():
                raise
            raise RunError(
                f"judge.total_timeout_s={config.total_timeout_s:g}: over after {len(verdicts)} of {len(questions)} "
                "questions; what was bought is kept: run the stage again to go on"
            ) from None
        return Purchase(verdicts, config.structured == "auto" and not shop.asker.is_structured)


async def _finish(workers: Sequence[asyncio.Task[None]], pacing: Pacing) -> None:
    try:
        await asyncio.gather(*workers)
    except RunError:
        # Calls in flight are paid for: their verdicts are kept before this ends.
        pacing.stop()
        await asyncio.gather(*workers, return_exceptions=True)
        raise
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _work(shop: _Shop, waiting: Iterator[Question], verdicts: dict[str, Verdict], done: Iterator[int]) -> None:
    for question in waiting:
        verdict = await _judge(shop, question)
        if verdict is not None:
            # In a thread: forcing a file to disk may take long, and all other calls would wait for it.
            verdicts[question.key] = await asyncio.to_thread(shop.store.add, verdict)
        next(done, None)


async def _judge(shop: _Shop, question: Question) -> Verdict | None:
    """The verdict on one question; None if no answer came. An unreadable reply is asked again once."""
    started_at = time.time()
    asked = [await shop.asker.ask(question.messages, shop.rubric.response_format)]
    replies = [answer.text for call in asked if (answer := call.answer)]
    reading = shop.rubric.read(replies[0]) if replies else None
    if replies and reading is None:
        again = shop.rubric.ask_again(question.messages, replies[0])
        asked.append(await shop.asker.ask(again, shop.rubric.response_format))
        replies += [answer.text for call in asked[1:] if (answer := call.answer)]
        reading = shop.rubric.read(replies[-1])
    if len(replies) < len(asked):
        return None
    return _make_verdict(shop, question, asked, reading or Reading(None, None, ""), started_at)


def _make_verdict(
    shop: _Shop, question: Question, asked: Sequence[Asked], reading: Reading, started_at: float
) -> Verdict:
    tokens = sum((call.billed for call in asked), NOTHING)
    answers = [call.answer for call in asked if call.answer]
    return Verdict(
        key=question.key,
        messages=question.messages,
        replies=tuple(answer.text for answer in answers),
        choice=reading.choice,
        points=reading.points,
        reason=shop.redact(reading.reason),
        model=answers[-1].model,
        prompt_tokens=tokens.prompt,
        completion_tokens=tokens.completion,
        cost_usd=compute_cost(tokens, shop.config),
        num_calls=sum(call.num_calls for call in asked),
        started_at=started_at,
        latency_s=sum(call.latency_s for call in asked),
    )
