"""Talking to models in a terminal: a line in, a completion out, word by word."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig as SamplingSettings
from transformers import TextStreamer

from stages.data.records import Message
from stages.data.tasks.task import make_prompt
from stages.data.text import encode_prompt
from stages.generation.config import GenerationConfig
from stages.models.load import freeze, load_policy, load_tokenizer, move

Write = Callable[[str], None]
"""Shows text at once, without a line break of its own."""

HELP = "one line, one completion; /sft shows the SFT model beside the policy, /temp X, /quit"


class Speaker:
    """A model in this process that completes prompts.

    Args:
        path: model directory.
        config: section `generation`: compute type and length limits.
        device: where it runs.
    """

    def __init__(self, path: Path, config: GenerationConfig, device: torch.device | str = "cpu") -> None:
        self._tokenizer = load_tokenizer(path)
        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        model = move(load_policy(path, dtype), torch.device(device))
        freeze(model)
        self._model: Any = model  # the library declares `generate` on a mixin that type checkers do not see
        self._config = config

    def stream(self, messages: tuple[Message, ...], temperature: float, write: Write) -> None:
        """Complete the messages; at temperature 0 with the most likely tokens.

        Raises:
            ValueError: the prompt is longer than the pipeline accepts.
        """
        ids = encode_prompt(self._tokenizer, make_prompt(messages, group=""))
        limit = self._config.max_prompt_tokens
        if len(ids) > limit:
            raise ValueError(f"{len(ids)} tokens with the chat template; generation.max_prompt_tokens={limit}")
        input_ids = torch.tensor([ids], device=self._model.device)
        with torch.no_grad():
            self._model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=self._settings(temperature),
                streamer=_WordStreamer(self._tokenizer, write),
            )

    def _settings(self, temperature: float) -> SamplingSettings:
        # Nothing is cut off the distribution, as in training; the library's own default is another one.
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return SamplingSettings(
            **(sampling if temperature > 0 else {"do_sample": False}),
            max_new_tokens=self._config.max_new_tokens,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
        )


@dataclass
class Chat:
    """Answers lines and obeys commands."""

    policy: Speaker
    start_sft: Callable[[], Speaker]
    """Loads the SFT model, when it is asked for first."""
    make_messages: Callable[[str], tuple[Message, ...]]
    """A line as a prompt of the task."""
    temperature: float
    write: Write
    shows_sft: bool = False
    _sft: Speaker | None = field(default=None, init=False)

    def answer(self, line: str) -> bool:
        """Answer one line or obey its command; False if it asks to quit."""
        command, _, argument = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "/quit":
                return False
            case "/sft":
                self.shows_sft = not self.shows_sft
                self.write(f"SFT model: {'on' if self.shows_sft else 'off'}\n")
            case "/temp":
                self._set_temperature(argument)
            case _ if command.startswith("/"):
                self.write(f"{command}: unknown; {HELP}\n")
            case _:
                self._complete(line.strip())
        return True

    def _set_temperature(self, argument: str) -> None:
        try:
            temperature = float(argument)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature < float("inf"):
            self.write(f"/temp {argument}: expected a number ≥ 0, such as /temp 0.7\n")
            return
        self.temperature = temperature
        self.write(f"temperature: {temperature:g}\n")

    def _complete(self, text: str) -> None:
        messages = self.make_messages(text)
        speakers = {"": self.policy}
        if self.shows_sft:
            self._sft = self._sft or self.start_sft()
            speakers = {"SFT: ": self._sft, "policy: ": self.policy}
        for name, speaker in speakers.items():
            self.write(name)
            try:
                speaker.stream(messages, self.temperature, self.write)
            except ValueError as error:
                self.write(str(error))
            except KeyboardInterrupt:  # ends this completion, not the conversation
                self.write(" [stopped]")
            self.write("\n")


class _WordStreamer(TextStreamer):
    """Hands over whole words as they are finished."""

    def __init__(self, tokenizer: object, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        """Called by the library with text that later tokens do not change."""
        # A model that writes control characters must not steer the terminal.
        self._write("".join(character for character in text if character.isprintable() or character in "\n\t"))
