"""The LLM judge and a server that misbehaves: no verdict is lost or counted twice, the budget holds, the key stays."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from stages.common.errors import RunError, SettingError
from stages.judge.config import JudgeConfig
from stages.judge.llm.account import Account
from stages.judge.llm.client import JudgeClient, Lost, Received
from stages.judge.llm.judging import Judging, judge_matches
from stages.judge.matches import Verdict
from tests.hostile_judge import (
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    Behaviour,
    Call,
    Server,
    behave_well,
    completion,
    dribble,
    echo_the_key,
    hang,
    hostile_judge,
    in_turn,
    mixed,
    refuse,
    repeat_the_first,
    reply,
)
from tests.integration.conftest import ROOT
from tests.unit.judge.llm.questions import PRICES, make_config, make_match

KEY = "sk-proj-Zk3/dE+fGh1jKlMn0pQrStUv"
GOOD = json.dumps(completion(10**6))


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("SLIPSTREAM_VERDICTS", str(tmp_path / "verdicts"))


def judge(server: Server, folder: Path, num_matches: int = 4, **settings: object) -> Judging:
    matches = [make_match(number) for number in range(num_matches)]
    return judge_matches(matches, make_config(base_url=server.url, **settings), folder / "work")


def stored(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in (folder / "verdicts").rglob("*.json")]


def verdicts_of(judging: Judging) -> list[Verdict]:
    return [verdict for judgement in judging.judgements for verdict in judgement.verdicts if verdict]


@pytest.mark.parametrize("mode", ["pairwise", "single"])
def test_every_question_is_asked_once_and_never_again(tmp_path: Path, mode: str) -> None:
    async def behave(call: Call) -> None:
        await call.answer(json.dumps({"reason": "so", "points": 7}) if mode == "single" else None)

    matches = [make_match(0), make_match(0), make_match(1, "same", "same "), make_match(2)]
    with hostile_judge(behave) as server:
        config = make_config(base_url=server.url, mode=mode, **PRICES)
        first = judge_matches(matches, config, tmp_path / "work")
        again = judge_matches(matches, config, tmp_path / "other_work")

    assert (first.num_bought, first.num_cached, first.num_calls) == (4, 0, 4)
    assert (again.num_bought, again.num_cached, again.num_calls) == (0, 4, 0)
    assert again.judgements == first.judgements
    assert first.judgements[2].verdicts == (None, None)
    assert (first.prompt_tokens, first.completion_tokens) == (400, 40)
    assert first.cost_usd == again.cost_usd == 0.0012  # (400 * 2 + 40 * 10) / 1e6
    assert set(server.asked.values()) == {1}


def test_replies_that_come_in_another_order_reach_their_questions(tmp_path: Path) -> None:
    waiting: list[Call] = []

    async def behave(call: Call) -> None:
        waiting.append(call)
        if len(waiting) == 8:  # the last one that came is answered first
            for each in reversed(waiting):
                await each.answer(json.dumps({"reason": each.body["messages"][-1]["content"], "choice": "tie"}))

    with hostile_judge(behave) as server:
        judging = judge(server, tmp_path, concurrency=8)

    assert [verdict.reason for verdict in verdicts_of(judging)] == [
        verdict.messages[-1]["content"] for verdict in verdicts_of(judging)
    ]
    assert len(verdicts_of(judging)) == server.num_calls == 8


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(refuse(429, retry_after_ms="20"), id="429 with Retry-After"),
        pytest.param(refuse(429), id="429 without Retry-After"),
        pytest.param(refuse(500), id="500"),
        pytest.param(refuse(503, retry_after="0.02"), id="503 with Retry-After"),
        pytest.param(refuse(408), id="408"),
        pytest.param(reply(GOOD, cut=20), id="connection cut in the body"),
        pytest.param(reply(GOOD[:-20]), id="truncated JSON"),
        pytest.param(reply("Sorry, I am a teapot."), id="prose"),
        pytest.param(reply('{"answer": "first"}'), id="wrong schema"),
        pytest.param(reply(json.dumps(completion(10**6) | {"choices": []})), id="no choice"),
        pytest.param(
            reply(json.dumps(completion(10**6) | {"choices": completion(1)["choices"] * 2})), id="two choices"
        ),
        pytest.param(
            reply(GOOD.replace(json.dumps(completion(10**6)["choices"][0]["message"]["content"]), "null")), id="null"
        ),
        pytest.param(repeat_the_first, id="the same reply again"),
    ],
)
def test_trouble_that_passes_costs_calls_but_no_verdict(tmp_path: Path, trouble: Behaviour) -> None:
    with hostile_judge(in_turn(trouble, behave_well)) as server:
        judging = judge(server, tmp_path, concurrency=4, **PRICES)

    assert (judging.num_bought, judging.num_unanswered, judging.num_unreadable) == (8, 0, 0)
    assert judging.num_calls == server.num_calls
    assert 14 <= server.num_calls <= 16  # the very first copy of a repeated reply is a good one
    assert len({verdict["replies"][0] for verdict in stored(tmp_path)}) == 8  # type: ignore[index]


def test_a_server_that_numbers_its_answers_badly_is_no_trouble(tmp_path: Path) -> None:
    """Ollama draws the id of an answer from 999 numbers."""

    async def behave(call: Call) -> None:
        text = json.dumps({"reason": call.body["messages"][-1]["content"], "choice": "first"})
        await call.answer(text, id="chatcmpl-7")

    with hostile_judge(behave) as server:
        judging = judge(server, tmp_path, **PRICES)

    assert (judging.num_bought, server.num_calls) == (8, 8)


@pytest.mark.parametrize("trouble", [hang, dribble])
def test_a_server_that_hangs_or_dribbles_is_left_in_time(tmp_path: Path, trouble: Behaviour) -> None:
    with hostile_judge(in_turn(trouble, behave_well)) as server:
        judging = judge(server, tmp_path, num_matches=1, call_timeout_s=3)

    assert (judging.num_bought, server.num_calls) == (2, 4)


def test_a_question_without_answer_is_counted_and_asked_again_by_the_next_run(tmp_path: Path) -> None:
    with hostile_judge(mixed(refuse(500), *[behave_well] * 7)) as server:
        first = judge(server, tmp_path, concurrency=1, max_attempts=1, max_error_fraction=0.2)
        server.behave = behave_well
        again = judge(server, tmp_path, concurrency=1)

    assert (first.num_bought, first.num_unanswered, first.num_calls) == (7, 1, 8)
    assert first.judgements[0].win is None
    assert (again.num_bought, again.num_cached, again.num_calls) == (1, 7, 9)


def test_an_unreadable_reply_is_asked_again_once_then_stored(tmp_path: Path) -> None:
    async def babble(call: Call) -> None:
        await call.answer(f"the {'first' if len(call.body['messages']) == 2 else 'second'} is better")

    with hostile_judge(babble) as server:
        judging = judge(server, tmp_path, max_error_fraction=1.0)
        again = judge(server, tmp_path, max_error_fraction=1.0)

    assert (judging.num_bought, judging.num_unreadable, server.num_calls) == (8, 8, 16)
    assert (again.num_cached, again.num_unreadable) == (8, 8)
    assert verdicts_of(judging)[0].replies == ("the first is better", "the second is better")
    assert verdicts_of(judging)[0].prompt_tokens == 2 * PROMPT_TOKENS


def test_a_refusal_is_an_unreadable_reply(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        message = {"role": "assistant", "content": None, "refusal": "I must not judge."}
        await call.answer(choices=[{"index": 0, "message": message}])

    with hostile_judge(behave) as server:
        judging = judge(server, tmp_path, num_matches=1, max_error_fraction=1.0)

    assert verdicts_of(judging)[0].replies == ("I must not judge.",) * 2


def test_too_many_errors_fail_the_run_and_say_which(tmp_path: Path) -> None:
    with (
        hostile_judge(mixed(refuse(500), reply("x"), behave_well, behave_well)) as server,
        pytest.raises(
            RunError,
            match=r"judge\.max_error_fraction=0\.25: of 8 questions 4 got no answer and of 0 no reply could be read",
        ),
    ):
        judge(server, tmp_path, concurrency=1, max_attempts=1, max_error_fraction=0.25)

    assert len(stored(tmp_path)) == 4


@pytest.mark.parametrize("header", ["seconds", "date", "milliseconds", "reset"])
def test_a_pause_the_server_asks_for_holds_every_call_back(tmp_path: Path, header: str) -> None:
    headers = {
        "seconds": {"retry-after": "0.6"},
        "date": {},
        "milliseconds": {"retry-after-ms": "600"},
        "reset": {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "600ms"},
    }[header]

    async def behave(call: Call) -> None:
        if call.number == 0:
            date = {"retry-after": formatdate(time.time() + 2, usegmt=True)}  # whole seconds, so 1 to 2 from now
            await call.send(429, "{}", headers or date)
        else:
            await call.answer()

    with hostile_judge(mixed(behave)) as server:
        judge(server, tmp_path, concurrency=1)
        gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]

    assert gaps[0] >= 0.5
    assert server.num_calls == 9


def test_a_limit_that_a_good_reply_says_is_used_up_is_waited_for(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        used_up = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "500ms"}
        await call.answer(headers=used_up if call.number == 1 else {})

    with hostile_judge(behave) as server:
        judge(server, tmp_path, concurrency=1)

    assert server.times[2] - server.times[1] >= 0.5


def test_a_pause_beyond_the_total_timeout_ends_at_once(tmp_path: Path) -> None:
    with (
        hostile_judge(refuse(429, retry_after="3600")) as server,
        pytest.raises(RunError, match=r"judge\.total_timeout_s=60: .* asked again in 3600 s"),
    ):
        judge(server, tmp_path, concurrency=1, total_timeout_s=60)

    assert server.num_calls == 1


def test_the_total_timeout_keeps_what_was_bought(tmp_path: Path) -> None:
    with (
        hostile_judge(mixed(behave_well, hang)) as server,
        pytest.raises(RunError, match=r"judge\.total_timeout_s=6: over after 1 of 8 questions"),
    ):
        judge(server, tmp_path, concurrency=1, total_timeout_s=6)

    assert len(stored(tmp_path)) == 1


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (400, "judge.max_reply_tokens"),
        (401, "OPENAI_API_KEY"),
        (403, "judge.model"),
        (404, "judge.base_url"),
        (307, ""),
    ],
)
def test_a_refusal_for_good_ends_everything_with_one_line(tmp_path: Path, status: int, advice: str) -> None:
    refusal = refuse(status, "not\nlike this", location="/v1/elsewhere")
    with hostile_judge(refusal) as server, pytest.raises(SettingError) as raised:
        judge(server, tmp_path, concurrency=2)

    assert f"refused with status {status}: 'not like this'; look at " in str(raised.value)
    assert advice in str(raised.value)
    assert "\n" not in str(raised.value)
    assert server.num_calls <= 2


def test_an_endpoint_without_schemas_is_asked_for_text_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def behave(call: Call) -> bool | None:
        if "response_format" in call.body:
            return await refuse(400, "response_format: json_schema is not supported")(call)
        return await behave_well(call)

    with hostile_judge(behave) as server:
        judging = judge(server, tmp_path, concurrency=4, max_attempts=1)
        with pytest.raises(SettingError, match="status 400"):
            judge(server, tmp_path, structured="schema")

    assert judging.is_text_fallback
    assert judging.num_bought == 8
    assert sum("plain text" in record.message for record in caplog.records) == 1
    assert sum("response_format" in body for body in server.bodies[:12]) <= 4


def test_calls_never_pass_the_limit_over_restarts(tmp_path: Path) -> None:
    with hostile_judge(mixed(refuse(500), behave_well)) as server:
        for _ in range(3):
            with pytest.raises(RunError, match=r"judge\.max_calls=10"):
                judge(server, tmp_path, max_calls=10, concurrency=3, num_matches=4 if len(stored(tmp_path)) < 3 else 9)

    assert server.num_calls <= 10
    assert len(stored(tmp_path)) == server.num_billed


def test_more_questions_than_calls_are_left_are_refused_before_any_is_sent(tmp_path: Path) -> None:
    with hostile_judge() as server, pytest.raises(RunError, match=r"judge\.max_calls=7: 8 questions .* only 7 calls"):
        judge(server, tmp_path, max_calls=7)

    assert server.num_calls == 0


def test_money_never_passes_the_limit_by_the_servers_own_account(tmp_path: Path) -> None:
    cost = (PROMPT_TOKENS * 2 + COMPLETION_TOKENS * 10) / 1e6
    trouble = mixed(
        behave_well, refuse(500), reply(GOOD, cut=20), behave_well, reply("{"), refuse(429, retry_after="0")
    )
    limit = 0.05
    with hostile_judge(trouble) as server:
        for _ in range(2):
            with pytest.raises(RunError, match=r"judge\.max_cost_usd=0\.05: .* verdicts that were bought are kept"):
                judge(server, tmp_path, num_matches=40, concurrency=6, max_cost_usd=limit, max_attempts=9, **PRICES)

    assert 0 < server.num_billed * cost <= limit
    assert len({verdict["replies"][0] for verdict in stored(tmp_path)}) == len(stored(tmp_path))  # type: ignore[index]


def test_the_verdicts_of_calls_in_flight_are_kept_when_the_budget_ends(tmp_path: Path) -> None:
    refused = refuse(500)

    async def behave(call: Call) -> bool | None:
        if call.number == 0:
            return await refused(call)
        await asyncio.sleep(0.8)  # longer than the wait before the second attempt, for which there is no call left
        return await behave_well(call)

    with hostile_judge(behave) as server, pytest.raises(RunError, match=r"judge\.max_calls=8: .* 8 requests"):
        judge(server, tmp_path, concurrency=8, max_calls=8)

    assert len(stored(tmp_path)) == 7


def test_who_waits_for_a_pause_is_not_sent_after_the_end(tmp_path: Path) -> None:
    async def behave(call: Call) -> bool:
        if call.number == 0:
            return bool(await refuse(429, retry_after="20")(call))
        await asyncio.sleep(0.3)
        return bool(await refuse(429, "insufficient_quota")(call))

    with hostile_judge(behave) as server, pytest.raises(RunError, match="the quota of this key is used up"):
        judge(server, tmp_path, concurrency=2)

    assert server.num_calls == 2


def test_an_endpoint_that_is_down_does_not_use_up_the_calls(tmp_path: Path) -> None:
    config = make_config(base_url="http://127.0.0.1:9/v1", max_attempts=2, **PRICES)
    with pytest.raises(
        RunError, match=r"8 questions in a row got no answer, the last: connection failed \(ConnectError"
    ):
        judge_matches([make_match(number) for number in range(50)], config, tmp_path / "work")

    with closing(Account(tmp_path / "work" / "account.jsonl", config)) as account:
        assert 16 <= account.num_calls <= 32  # two for each of the 8, and of as many in flight
        assert account.cost_usd == 0


def test_a_bill_above_the_worst_case_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def behave(call: Call) -> None:
        await call.answer(usage={"prompt_tokens": 100_000, "completion_tokens": 1})

    with hostile_judge(behave) as server:
        judging = judge(server, tmp_path)

    assert judging.prompt_tokens == 800_000
    assert sum("bills more than" in record.message for record in caplog.records) == 1


def test_calls_wait_for_money_that_those_in_flight_give_back(tmp_path: Path) -> None:
    # A call costs 0.0003 USD and 0.01 at its worst, so only one is in flight at a time.
    with hostile_judge() as server:
        judging = judge(server, tmp_path, concurrency=8, max_cost_usd=0.013, **PRICES)

    assert judging.num_bought == 8
    assert server.most_at_once == 1


def read_files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_text()


def assert_no_key(text: str) -> None:
    assert [KEY[start : start + 12] for start in range(len(KEY) - 11) if KEY[start : start + 12] in text] == []


def test_the_key_is_in_no_file_log_or_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, name)

    async def refuse_with_the_key(call: Call) -> bool:
        echo = {"retry-after-ms": "10", "x-echo": call.key}
        await call.send(429, json.dumps({"error": {"message": f"slow down, Bearer {call.key}"}}), echo)
        return False

    async def deny_with_the_key(call: Call) -> bool:
        await call.send(401, f"who is Bearer {call.key}? {call.key.replace('/', '%2F')}", {"x-echo": call.key})
        return False

    with hostile_judge(in_turn(refuse_with_the_key, echo_the_key)) as server:
        judging = judge(server, tmp_path)
        server.behave = deny_with_the_key
        with pytest.raises(SettingError) as raised:
            judge(server, tmp_path, num_matches=6)
        server.behave = refuse_with_the_key
        with pytest.raises(RunError):
            judge(server, tmp_path, num_matches=6, max_attempts=2)

    assert judging.num_bought == 8
    assert server.bodies
    assert "[redacted]" in str(raised.value)
    assert "[redacted]" in verdicts_of(judging)[0].reason
    shown = "".join(traceback.format_exception(raised.value)) + repr(raised.value.__context__)
    for text in (shown, str(judging), caplog.text, *read_files(tmp_path)):
        assert_no_key(text)


def test_a_reply_is_redacted_before_anything_reads_it() -> None:
    async def send(config: JudgeConfig) -> Received | Lost:
        async with JudgeClient(config) as client:
            return await client.send([{"role": "user", "content": "which?"}], None)

    with hostile_judge(echo_the_key) as server:
        received = asyncio.run(send(make_config(base_url=server.url)))

    assert isinstance(received, Received)
    assert received.headers["x-echo"] == "[redacted]"
    assert_no_key(str(received))


def test_without_a_key_only_an_endpoint_of_ones_own_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    keys = []

    async def behave(call: Call) -> None:
        keys.append(call.key)
        await call.answer()

    with pytest.raises(SettingError, match="OPENAI_API_KEY is not set"):
        judge_matches([make_match(0)], JudgeConfig(model="gpt"), tmp_path / "work")
    with hostile_judge(behave) as server:
        judge(server, tmp_path, num_matches=1)

    assert keys == ["none", "none"]


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


CHILD = """
import signal
import sys
from pathlib import Path
from stages.common.entry import run_entry
from stages.judge.llm.judging import judge_matches
from tests.unit.judge.llm.questions import make_config, make_match

# A shell that runs the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    config = make_config(base_url=sys.argv[1], concurrency=4, usd_per_million_prompt_tokens=2.0,
                         usd_per_million_completion_tokens=10.0)
    judging = judge_matches([make_match(number) for number in range(30)], config, Path(sys.argv[2]))
    print(judging.num_bought, judging.num_cached, judging.num_calls)

run_entry(main)
"""


def start_child(url: str, folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    environment.pop("DVC_STAGE", None)
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, url, str(folder / "work")],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_calls(server: Server, number: int) -> None:
    limit = time.monotonic() + 30
    while server.num_calls < number:
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize(("end", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_evaluation_that_is_ended_half_way_buys_no_stored_verdict_again(
    tmp_path: Path, end: signal.Signals, code: int
) -> None:
    with hostile_judge(latency_s=0.05) as server:
        with ended(start_child(server.url, tmp_path)) as child:
            wait_for_calls(server, 30)
            child.send_signal(end)
            _, errors = child.communicate(timeout=120)
        assert child.returncode == code, errors.decode()
        assert b"Traceback" not in errors
        assert b"never retrieved" not in errors
        num_calls, kept = server.num_calls, {verdict["key"] for verdict in stored(tmp_path)}
        with ended(start_child(server.url, tmp_path)) as child:
            said, errors = child.communicate(timeout=120)

    assert child.returncode == 0, errors.decode()
    assert num_calls - 4 <= len(kept) < 60  # all but those in flight
    num_bought, num_cached, num_paid = (int(word) for word in said.split())
    assert (num_bought, num_cached) == (60 - len(kept), len(kept))
    # Paid in advance: a call may have been ended between its line and its sending.
    assert server.num_calls <= num_paid <= server.num_calls + 4
    assert server.num_calls <= 60 + 4
    assert len(server.asked) == len(stored(tmp_path)) == 60
    assert max(server.asked.values()) <= 2
    lines = [json.loads(line) for line in (tmp_path / "work" / "account.jsonl").read_text().splitlines()]
    reserved = [line["call"] for line in lines if line["event"] == "reserved"]
    settled = [line for line in lines if line["event"] == "settled"]
    assert reserved == list(range(num_paid))
    assert len(reserved) - 4 <= len(settled) <= len(reserved)
    assert {(line["prompt_tokens"], line["completion_tokens"]) for line in settled} == {(100, 10)}
