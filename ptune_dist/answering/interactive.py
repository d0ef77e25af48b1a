"""`generate RUN --interactive`: a conversation in a terminal, with the history that the run's chats have.

A run of chats is asked with all turns so far, as the base's chat template writes them. Any other run knows single rows
alone, so each line is one.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptune_dist.commands import (
    GenerateRequest,
    build_decoding,
    build_run_inputs,
    find_tasks,
    read_input_rows,
)
from ptune_dist.config.schema import Config
from ptune_dist.data.build import build_templates
from ptune_dist.data.sources import Rows
from ptune_dist.distributed.world import init_distributed
from ptune_dist.errors import UserError
from ptune_dist.evaluation.generate import generate_of_tasks
from ptune_dist.run.reading import Reading, build_reading
from ptune_dist.run.stored_prompt import build_trained_job

MESSAGES = "messages"  # the column of a conversation, where the rows of the run had a template
Answer = Callable[[Reading, Rows, Callable[[str], None]], str]


def chat_with_run(config: Config, run_dir: Path, request: GenerateRequest) -> None:
    """Answer lines from the terminal until an empty one or the end of the input. Raises UserError."""
    world = init_distributed()
    if world.size > 1:
        raise UserError("--interactive: a chat needs one process: start it without torchrun")
    reading = build_reading(config)
    conversation = Conversation(reading)
    conversation.ask("?")  # that one line can be a row shows before the base is read
    conversation.forget()
    job = build_trained_job(reading, run_dir, world)
    decoding = build_decoding(job, run_dir, request)

    def answer(own: Reading, rows: Rows, show: Callable[[str], None]) -> str:
        inputs = build_run_inputs(own, rows)
        tasks = find_tasks(own.config, rows, request.task)
        shown = replace(decoding, listener=lambda _, text: show(text))
        ((_, text),) = generate_of_tasks(job.engine, job.tokenizer, inputs, shown, tasks)
        return text

    if sys.stdin.isatty():
        history = "" if conversation.has_history else ", each line by itself"
        print(f"{run_dir}{history}; an empty line ends, Ctrl-C stops an answer", file=sys.stderr, flush=True)
    with interrupts_as_exceptions():
        talk(conversation, answer)


class Conversation:
    """What has been asked and answered, and how the next line is put."""

    def __init__(self, reading: Reading):
        self._reading = reading
        self._turns: list[dict[str, Any]] = []
        self._text = ""

    @property
    def has_history(self) -> bool:
        return self._reading.config.data.is_chat

    def ask(self, text: str) -> tuple[Reading, Rows]:
        """The next question as a row, and how it is read. Raises UserError."""
        config = self._reading.config
        self._text = text
        rows = read_input_rows(config.data, config.prompt, text, None)
        if not self.has_history or not self._turns:
            return self._reading, rows
        column = config.data.messages or MESSAGES
        turns = [*self._turns, {"role": "user", "content": self._render(rows)}]
        update: dict[str, Any] = {"data": config.data.model_copy(update={"messages": column, "chat": False})}
        if config.data.chat:  # the user's turns hold what stands around the template
            update["prompt"] = config.prompt.model_copy(update={"text": None})
        reading = replace(self._reading, config=config.model_copy(update=update))
        return reading, make_rows({column: turns})

    def _render(self, rows: Rows) -> str:
        """What the user says in a turn: the line, or what the run's template makes of it."""
        config = self._reading.config
        if config.data.messages is not None:
            return self._text
        template, _ = build_templates(config.data, config.prompt.placement, config.prompt.around)
        return template.render(rows.read(0, 1)[0])

    def hear(self, answer: str) -> None:
        """The answer to the last question becomes a part of what the next one continues."""
        if not self.has_history or not answer:
            return
        config = self._reading.config
        rows = read_input_rows(config.data, config.prompt, self._text, None)
        self._turns.append({"role": "user", "content": self._render(rows)})
        self._turns.append({"role": "assistant", "content": answer})

    def forget(self) -> None:
        self._turns.clear()


def make_rows(row: dict[str, Any]) -> Rows:
    import datasets

    return Rows("--interactive", datasets.Dataset.from_list([row]), "rows")


def talk(conversation: Conversation, answer: Answer) -> None:
    """Read lines and write answers."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            print()
            return
        if not text:
            return
        shown = Shown()
        try:
            found = answer(*conversation.ask(text), shown.show)
            shown.show(found)
        except KeyboardInterrupt:
            pass
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        print(flush=True)
        conversation.hear(shown.text)


class Shown:
    """An answer on the terminal, which grows as its tokens come."""

    def __init__(self) -> None:
        self.text = ""

    def show(self, text: str) -> None:
        """Write what of `text` is not there yet. A character whose bytes are not complete waits for them."""
        text = text.lstrip().rstrip("\ufffd")
        if text.startswith(self.text):
            print(text[len(self.text) :], end="", flush=True)
            self.text = text


@contextlib.contextmanager
def interrupts_as_exceptions() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, where the command would end with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
