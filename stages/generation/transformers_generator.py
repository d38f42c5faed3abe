"""A generator in this process: slow, deterministic, the bit-exact one for tests and small runs.

Shapes: N prompts of a batch, R rows (completions) of it, P tokens of the longest prompt, left-padded, V vocabulary.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.common.errors import GeneratorError
from stages.common.publish import remove_path
from stages.data.records import Completion
from stages.data.text import decode_completion
from stages.generation.config import GenerationConfig
from stages.generation.protocol import (
    Event,
    Finished,
    Group,
    Published,
    RecordSpan,
    Request,
    Ticket,
    WeightsUpdate,
    require_complete,
)
from stages.models.load import freeze, load_policy

NAME = "generator-0"
LINGER_S = 0.05
"""Seconds that a batch of several prompts waits for its next one: they are submitted one after the other, at once."""


@dataclass(frozen=True)
class _Row:
    """One completion that is being sampled."""

    is_greedy: bool
    max_tokens: int
    draw: torch.Generator | None
    """None: it takes the most likely token."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, token: int, logprob: float) -> None:
        """Take a token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)

    def is_over(self, eos: int) -> bool:
        """Whether it has its end or its length."""
        return len(self.tokens) == self.max_tokens or (bool(self.tokens) and self.tokens[-1] == eos)


class TransformersGenerator:
    """A `Generator` that samples in the order prompts came, in a thread of its own.

    The samples of `generation.prompts_at_once` prompts form one batch with a key-value cache; each prompt is read
    once. Each sample draws from a generator of its own, seeded by the request, so with one prompt at once results
    depend neither on the other prompts nor on any global state.

    Args:
        model: directory of the first weights.
        config: section `generation`.
        tokenizer: of the policy.
        policy_version: updates applied to `model`.
        record: told when it generated and swapped.
    """

    def __init__(
        self,
        model: Path,
        config: GenerationConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        policy_version: int,
        record: RecordSpan,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._eos: int = tokenizer.eos_token_id
        self._record = record
        self._queue: queue.Queue[Ticket | WeightsUpdate | None] = queue.Queue()
        self._held: list[WeightsUpdate | None] = []
        self._events: queue.Queue[Event | Exception] = queue.Queue()
        self._is_closed = False
        self._model: PreTrainedModel
        self._load(WeightsUpdate(policy_version, model))
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """See `Generator.submit`."""
        self._queue.put(ticket)

    def publish(self, update: WeightsUpdate) -> None:
        """See `Generator.publish`."""
        self._queue.put(update)

    def wait(self, timeout_s: float) -> list[Event]:
        """See `Generator.wait`."""
        events: list[Event] = []
        with contextlib.suppress(queue.Empty):
            item = self._events.get(timeout=timeout_s)
            while True:
                if isinstance(item, Exception):
                    raise item
                events.append(item)
                item = self._events.get_nowait()
        return events

    def close(self) -> None:
        """End the thread after the prompt it is working on."""
        self._is_closed = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (item := self._take()) is not None and not self._is_closed:
                events = [self._swap(item)] if isinstance(item, WeightsUpdate) else self._finish(item)
                for event in events:
                    self._events.put(event)
        except Exception as error:  # noqa: BLE001  raised again in the owner's thread by `wait`
            self._events.put(error)

    def _take(self) -> list[Ticket] | WeightsUpdate | None:
        """The next weights, or the prompts that are sampled next; None at the end."""
        item = self._held.pop() if self._held else self._queue.get()
        if not isinstance(item, Ticket):
            return item
        tickets = [item]
        with contextlib.suppress(queue.Empty):
            while len(tickets) < self._config.prompts_at_once:
                item = self._queue.get(timeout=LINGER_S)
                if not isinstance(item, Ticket):
                    self._held.append(item)
                    break
                tickets.append(item)
        return tickets

    def _swap(self, update: WeightsUpdate) -> Published:
        started = time.monotonic()
        self._load(update)
        if update.is_temporary and update.path is not None:
            remove_path(update.path)
        ended = time.monotonic()
        self._record(NAME, "swap", started, ended, update.policy_version)
        return Published(update.policy_version, NAME, ended - started)

    def _load(self, update: WeightsUpdate) -> None:
        assert update.path is not None  # start.py lets no other kind of publisher through
        if update.path.is_dir():
            dtype = torch.bfloat16 if self._config.dtype == "bf16" else torch.float32
            self._model = load_policy(update.path, dtype)
            freeze(self._model)
        else:
            # Copies into the generator's own type; tensors that are not in the file stay as they are.
            unknown = self._model.load_state_dict(load_file(update.path), strict=False).unexpected_keys
            if unknown:
                raise GeneratorError(f"{update.path}: the model has no tensor {unknown[0]!r}")
        self._version = update.policy_version

    def _finish(self, tickets: Sequence[Ticket]) -> list[Event]:
        started = time.monotonic()
        groups = self._generate_groups(tickets)
        self._record(NAME, "generate", started, time.monotonic(), self._version)
        for ticket, group in zip(tickets, groups, strict=True):
            require_complete(group, ticket.request, ticket.plan, self._config.max_new_tokens)
        return [Finished(ticket, group, NAME) for ticket, group in zip(tickets, groups, strict=True)]

    @torch.no_grad()
    def _generate_groups(self, tickets: Sequence[Ticket]) -> list[Group]:
        rows = [self._make_rows(ticket) for ticket in tickets]
        self._generate([ticket.request for ticket in tickets], rows)
        return [
            tuple(self._completion(ticket.request, place, row) for place, row in enumerate(members))
            for ticket, members in zip(tickets, rows, strict=True)
        ]

    def _make_rows(self, ticket: Ticket) -> list[_Row]:
        seed, plan, limit = ticket.request.seed, ticket.plan, self._config.max_new_tokens
        draws = [torch.Generator().manual_seed((seed + k) % 2**63) for k in range(plan.num_samples)]
        rows = [_Row(False, plan.max_tokens(limit, greedy=False), draw) for draw in draws]
        return [*rows, _Row(True, plan.max_tokens(limit, greedy=True), None)] if plan.with_greedy else rows

    def _generate(self, requests: Sequence[Request], groups: Sequence[Sequence[_Row]]) -> None:
        """Fill the rows, token by token; a row that is over leaves the batch."""
        ids, mask = _pad_left([request.prompt_ids for request in requests])  # [N, P] each
        owners = torch.tensor([number for number, group in enumerate(groups) for _ in group])  # [R]
        rows = [row for group in groups for row in group]
        positions = mask.cumsum(dim=1).sub(1).clamp(min=0)  # [N, P]
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        cache, logits = output.past_key_values, output.logits[owners, -1]  # [R, V]
        cache.batch_select_indices(owners)
        mask, positions = mask[owners], positions[owners, -1:]
        while True:
            chosen = self._choose(logits, rows)  # [R]
            open_rows = [number for number, row in enumerate(rows) if not row.is_over(self._eos)]
            if not open_rows:
                break
            if len(open_rows) < len(rows):
                kept = torch.tensor(open_rows)
                rows = [rows[number] for number in open_rows]
                chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
                cache.batch_select_indices(kept)
            mask, positions = torch.cat([mask, torch.ones_like(positions)], dim=1), positions + 1
            output = self._model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> Tensor:
        """The next token of each row, added to it. [R, V] -> [R]"""
        scores = torch.log_softmax(logits.float() / self._config.temperature, dim=-1)
        chosen = scores.argmax(dim=-1)
        if sampled := [number for number, row in enumerate(rows) if row.draw is not None]:
            chosen[sampled] = draw_tokens(scores[sampled].exp(), [row.draw for row in rows if row.draw is not None])
        logprobs = scores.gather(1, chosen[:, None]).squeeze(1)
        for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True):
            row.add(token, logprob)
        return chosen

    def _completion(self, request: Request, place: int, row: _Row) -> Completion:
        return Completion(
            prompt_id=request.prompt_id,
            sample_index=0 if row.is_greedy else place,
            is_greedy=row.is_greedy,
            prompt_ids=request.prompt_ids,
            token_ids=tuple(row.tokens),
            sampling_logprobs=tuple(row.logprobs),
            text=decode_completion(self._tokenizer, row.tokens),
            is_finished=row.tokens[-1] == self._eos,
            first_policy_version=self._version,
            last_policy_version=self._version,
        )


def draw_tokens(probabilities: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
    """A token of each row's distribution, by one uniform number of its own generator. [R, V] -> [R]

    The library's `multinomial` draws as many numbers as there are tokens, a quarter of the time of sampling. float64:
    a sum of 50,000 probabilities in float32 has a rounding error larger than many of them.
    """
    sums = probabilities.double().cumsum(dim=-1)
    uniform = torch.stack([torch.rand(1, generator=draw, dtype=torch.float64) for draw in draws])  # [R, 1]
    # The first token whose sum is above: one of probability 0 adds nothing and is never it.
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).squeeze(1).clamp(max=sums.shape[1] - 1)


def _pad_left(prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Token ids, and 1 where they are real. [N, P] each"""
    longest = max(map(len, prompts))
    ids = torch.tensor([(0,) * (longest - len(prompt)) + prompt for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, (torch.arange(longest) >= longest - lengths[:, None]).long()
