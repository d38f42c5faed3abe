"""One question through everything that can go wrong: refusals, pauses, broken and repeated replies."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.errors import RunError, SettingError
from stages.judge.config import JudgeConfig
from stages.judge.llm.account import NOTHING, Account, Reservation, Tokens, bound_tokens
from stages.judge.llm.answers import Answer, UnusableError, read_answer, shorten
from stages.judge.llm.client import KEY_VARIABLE, JudgeClient, Lost, Received
from stages.judge.llm.pacing import Pacing, read_reset, read_retry_after

Messages = Sequence[Mapping[str, str]]

OK = 200
DEAD_AFTER = 8
"""Questions without an answer, and no answer between them."""
MAY_PASS = (408, 409, 429)
"""Statuses below 500 after which the same request may succeed later."""
MAY_BE_BILLED = (408, 504)
"""Somebody on the way lost patience; what the model itself did nobody says."""
SCHEMA_WORDS = ("response_format", "json_schema", "structured output")
"""How endpoints name what they cannot do."""
ADVICE = {
    400: "judge.model, judge.max_reply_tokens and judge.temperature (null: not sent)",
    401: KEY_VARIABLE,
    403: f"{KEY_VARIABLE}, and whether it may use judge.model",
    404: "judge.model and judge.base_url",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What came of one question."""

    answer: Answer | None
    """None: judge.max_attempts attempts failed."""
    num_calls: int
    latency_s: float
    """Of the call that was answered."""
    billed: Tokens
    """Of that call; what it costs at most where the endpoint does not say."""


@dataclass(frozen=True)
class _Failure:
    reason: str
    is_paused: bool = False
    """Whether the endpoint has said when to come back."""
    is_attempt: bool = True


class Asker:
    """Asks questions one by one; what one of them learns about the endpoint holds for all."""

    def __init__(self, config: JudgeConfig, account: Account, client: JudgeClient, pacing: Pacing) -> None:
        self._config = config
        self._account = account
        self._client = client
        self._pacing = pacing
        self._seen: set[tuple[str, str]] = set()
        self._num_unanswered_in_a_row = 0
        self._is_warned = False
        self.is_structured = config.structured != "text"
        """Whether replies are held to the schema; with judge.structured=auto False once that was refused."""

    async def ask(self, messages: Messages, response_format: Mapping[str, Any]) -> Asked:
        """Ask until there is an answer, at most judge.max_attempts times.

        Raises:
            SettingError: the endpoint refuses it for good; nothing else that is asked can succeed.
            RunError: the budget or the time is used up, or nothing is answered any more.
        """
        num_calls, num_failed, reason = 0, 0, ""
        while num_failed < self._config.max_attempts:
            outcome = await self._try(messages, response_format)
            num_calls += 1
            if isinstance(outcome, Asked):
                return Asked(outcome.answer, num_calls, outcome.latency_s, outcome.billed)
            num_failed, reason = num_failed + outcome.is_attempt, outcome.reason
            logger.info("a call to the judge failed reason=%s attempt=%d", reason, num_failed)
            if outcome.is_attempt and not outcome.is_paused and num_failed < self._config.max_attempts:
                await self._pacing.back_off(num_failed)
        logger.warning("the judge gave no answer attempts=%d last=%s", num_failed, reason)
        self._note_unanswered(reason)
        return Asked(None, num_calls, 0.0, NOTHING)

    async def _try(self, messages: Messages, response_format: Mapping[str, Any]) -> Asked | _Failure:
        worst = bound_tokens(messages, response_format, self._config.max_reply_tokens)
        reservation = await self._reserve(worst)
        was_structured = self.is_structured
        received = await self._client.send(messages, response_format if was_structured else None)
        if isinstance(received, Lost):
            self._account.settle(reservation, None if received.is_sent else NOTHING)
            return _Failure(received.reason)
        wait_s = self._read_pause(received)
        if received.status == OK:
            return self._accept(received, reservation)
        self._account.settle(reservation, None if received.status in MAY_BE_BILLED else NOTHING)
        return self._refused(received, was_structured, is_paused=bool(wait_s))

    async def _reserve(self, worst: Tokens) -> Reservation:
        while True:
            await self._pacing.wait_until_open()
            # Nothing may be awaited between the look at the pause and the sending.
            reservation = self._account.reserve(worst)
            if reservation is not None:
                return reservation
            await self._account.wait_for_change()

    def _read_pause(self, received: Received) -> float | None:
        wait_s = None
        if received.status in (429, 503):
            wait_s = read_retry_after(received.headers, time.time())
        wait_s = max(wait_s or 0.0, read_reset(received.headers) or 0.0)
        if wait_s > 0:
            logger.info("the judge's endpoint asks for a pause status=%d wait_s=%.3g", received.status, wait_s)
            self._pacing.pause(wait_s)
        return wait_s

    def _accept(self, received: Received, reservation: Reservation) -> Asked | _Failure:
        try:
            answer = read_answer(received.body, self._client.redact)
        except UnusableError as error:
            self._account.settle(reservation, None)
            return _Failure(f"unusable reply: {error}")
        # The id alone says little: some servers draw it from a few hundred numbers.
        if (answer.id, answer.text) in self._seen:
            # Its usage is that of the earlier reply, so it says nothing about this call.
            self._account.settle(reservation, None)
            return _Failure("the reply has the id and the text of an earlier one")
        self._seen.add((answer.id, answer.text))
        self._num_unanswered_in_a_row = 0
        self._check_bill(answer.tokens, reservation.worst)
        self._account.settle(reservation, answer.tokens)
        return Asked(answer, 1, received.latency_s, answer.tokens or reservation.worst)

    def _note_unanswered(self, reason: str) -> None:
        """An endpoint that is down must not use up the calls of the whole evaluation."""
        self._num_unanswered_in_a_row += 1
        if self._num_unanswered_in_a_row >= DEAD_AFTER:
            raise RunError(
                f"judge.base_url={self._config.base_url}: {DEAD_AFTER} questions in a row got no answer, the last: "
                f"{reason}; look whether it is up and run the stage again: what was bought is kept"
            )

    def _check_bill(self, tokens: Tokens | None, worst: Tokens) -> None:
        if tokens and (tokens.prompt > worst.prompt or tokens.completion > worst.completion) and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "the judge's endpoint bills more than a call can cost, so that a limit may be passed by a call's cost "
                "tokens=%s at_most=%s",
                tokens,
                worst,
            )

    def _refused(self, received: Received, was_structured: bool, *, is_paused: bool) -> _Failure:
        says = shorten(received.body, self._client.redact)
        if was_structured and self._can_do_without_schema(received):
            self._turn_to_text(says)
            return _Failure("the schema was refused", is_attempt=False)
        if "insufficient_quota" in received.body:
            raise RunError(f"judge.base_url={self._config.base_url}: the quota of this key is used up: {says!r}")
        if received.status in MAY_PASS or received.status >= 500:
            return _Failure(f"status {received.status}: {says}", is_paused)
        raise SettingError(
            f"judge.base_url={self._config.base_url}: refused with status {received.status}: {says!r}; look at "
            f"{ADVICE.get(received.status, 'judge.base_url')} (judge.model={self._config.model})"
        )

    def _can_do_without_schema(self, received: Received) -> bool:
        is_about_schema = any(word in received.body.lower() for word in SCHEMA_WORDS)
        return self._config.structured == "auto" and received.status in (400, 422) and is_about_schema

    def _turn_to_text(self, says: str) -> None:
        if self.is_structured:
            self.is_structured = False
            logger.warning(
                "the judge's endpoint cannot hold replies to a schema and is asked for plain text instead "
                "(judge.structured: text asks so from the start) says=%s",
                says,
            )
