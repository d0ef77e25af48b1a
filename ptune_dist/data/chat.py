"""Chats: conversations as rows, and templates whose input and target become a user's and an assistant's turn.

The text is that of the tokenizer's own chat template. What the base reads is what it will be asked: the conversation so
far, as the template writes it for an answer (`add_generation_prompt`). What is supervised is what the template adds
when the answer follows, up to the token that ends the turn. So every turn of the assistant is one example.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ptune_dist.config.schema import DataConfig
from ptune_dist.data.framing import describe_empty
from ptune_dist.data.sources import Rows
from ptune_dist.data.views import GroupedRows
from ptune_dist.errors import UserError

INPUT = "chat_input"  # columns of a turn
TARGET = "chat_target"
ANSWER = "chat_answer"
BATCH_ROWS = 1000
ROLES = {"human": "user", "gpt": "assistant"}  # of other formats
PROBE = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is two."},
]
PROBE_TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
    }
]
NO_MESSAGES = "is not a list of messages, such as [{role: user, content: ...}, {role: assistant, content: ...}]"

Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Chat:
    """The tokenizer's chat template with what a config adds. `key` names the config's key in errors.

    system: the system prompt of chats without one. text: added to every chat's system prompt. earlier: turns of a user
    and the assistant that precede what is wrapped.
    """

    tokenizer: PreTrainedTokenizerBase
    key: str
    system: str | None = None
    text: str = ""
    earlier: tuple[tuple[str, str], ...] = ()

    def facts(self) -> list[Any]:
        """What the text of a chat depends on beside the template and the row."""
        return [self.key, self.system, self.text, self.earlier]

    @property
    def wraps(self) -> bool:
        """Whether it writes what data.template and data.target render; else the rows are chats themselves."""
        return self.key == "data.chat"

    @functools.cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """The special tokens, one of which may end a turn."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return tuple(filter(None, dict.fromkeys([*map(str, self.tokenizer.all_special_tokens), *added])))

    @functools.cached_property
    def opening(self) -> str:
        """What precedes the text of every question that is wrapped. Raises UserError."""
        return os.path.commonprefix([self.wrap_input(text, lambda: "data.chat") for text in ("A", "B")])

    def render(self, messages: Messages, *, tools: list[Any] | None = None, asks: bool = False) -> str:
        """The text of a conversation; with `asks`, up to where an answer begins. Raises any error of the template."""
        if self.system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        if self.text:
            messages = self.add_text(messages)
        found = self.tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=asks
        )
        assert isinstance(found, str), "one conversation gives one text"
        return found

    def add_text(self, messages: Messages) -> Messages:
        """The same conversation whose system prompt ends with `text`."""
        if not messages or messages[0]["role"] != "system":
            return [{"role": "system", "content": self.text}, *messages]
        first = messages[0]
        whole = f"{text_of_content(first['content']).rstrip()}\n\n{self.text}"
        return [{**first, "content": whole}, *messages[1:]]

    def split_turn(
        self, messages: Messages, where: Callable[[], str], *, tools: list[Any] | None = None
    ) -> tuple[str, str]:
        """What precedes the last turn, which is the assistant's, and the turn itself. Raises UserError."""
        try:
            before = self.render(messages[:-1], tools=tools, asks=True)
            whole = self.render(messages, tools=tools)
        except Exception as error:  # templates are the tokenizer's code and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{where()}: {self.key}: the base's chat template cannot write this row: {reason}"
            ) from None
        if not whole.startswith(before):
            raise UserError(f"{where()}: {self.key}: {describe_unstable(self.tokenizer)}")
        return before, self.without_rest(whole[len(before) :])

    def without_rest(self, turn: str) -> str:
        """A turn without the space that follows its end: a base that answers has stopped there."""
        stripped = turn.rstrip()
        return stripped if stripped.endswith(self.end_tokens) else turn

    def wrap(self, text: str, target: str, where: Callable[[], str]) -> tuple[str, str]:
        """An input and a target as turns of a user and of the assistant. Raises UserError."""
        if not target.strip():
            raise UserError(describe_empty(where(), "data.target"))
        turns = [*self.earlier, (text, target.strip())]
        return self.split_turn([message for turn in turns for message in messages_of(*turn)], where)

    def wrap_input(self, text: str, where: Callable[[], str]) -> str:
        """As `wrap`, of an input alone."""
        return self.wrap(text, "-", where)[0]

    def find_end(self, *, has_tools: bool = False) -> str | None:
        """The special token that ends the assistant's turns. Raises UserError for a template that cannot be used."""
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.key}: the base's tokenizer has no chat template: write a template for the text")
        before, turn = self.split_turn(PROBE, lambda: "model.path")
        if has_tools and self.split_turn(PROBE, lambda: "model.path", tools=PROBE_TOOLS)[0] == before:
            raise UserError("data.tools: the base's chat template writes no tools: leave it out")
        return next((token for token in self.end_tokens if turn.endswith(token)), None)


def messages_of(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def describe_unstable(tokenizer: PreTrainedTokenizerBase) -> str:
    name = tokenizer.name_or_path or "the base"
    return (
        f"the chat template of {name} is not prefix-stable: what precedes an answer changes once the answer follows, "
        "so the base would be trained on other text than it is asked with: use data.template"
    )


@dataclasses.dataclass(frozen=True)
class ChatRows(GroupedRows):
    """One row for each of the assistant's turns, with columns INPUT, TARGET and ANSWER beside those of its row."""

    chat: Chat | None = None
    column: str = ""
    tools: str | None = None  # the column of the tools that a conversation may use

    def columns(self) -> list[str]:
        return [*self.whole.columns(), INPUT, TARGET, ANSWER]

    def make(self, row: dict[str, Any], number: int, index: int) -> dict[str, Any]:
        assert self.chat is not None
        where = functools.partial(self.where, index)
        messages = read_messages(row.get(self.column), self.column, where)
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise UserError(f"{where()}: data.messages: column {self.column!r} has no assistant's turn to learn")
        shown = messages[: turns[number] + 1]
        if not text_of_content(shown[-1]["content"]).strip() and not shown[-1].get("tool_calls"):
            raise UserError(f"{where()}: data.messages: an assistant's turn is empty: fill it or drop the row")
        before, turn = self.chat.split_turn(shown, where, tools=read_tools(row, self.tools, where))
        return {**row, INPUT: before, TARGET: turn, ANSWER: text_of_content(shown[-1].get("content"))}


def spread_turns(rows: Rows, data: DataConfig, chat: Chat) -> ChatRows:
    """The turns of conversations as rows. Raises UserError."""
    assert data.messages is not None
    check_column(rows, "data.messages", data.messages)
    check_column(rows, "data.tools", data.tools)
    counts = np.ones(len(rows), np.int64)
    for first in range(0, len(rows), BATCH_ROWS):
        for index, row in enumerate(rows.read(first, first + BATCH_ROWS), first):
            counts[index] = max(1, count_turns(row.get(data.messages)))
    ends = np.cumsum(counts)
    return ChatRows(rows.name, rows.source, rows.kind, rows.unreadable, rows, ends, chat, data.messages, data.tools)


def count_turns(value: Any) -> int:
    """The assistant's turns of a conversation; none in what is no conversation, which is refused as a row."""
    try:
        return sum(message["role"] == "assistant" for message in read_messages(value, "", str))
    except UserError:
        return 0


def read_messages(value: Any, column: str, where: Callable[[], str]) -> Messages:
    """A conversation as transformers has it, of a list, or of its JSON text. Raises UserError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{where()}: data.messages: column {column!r} {NO_MESSAGES}")
    found = []
    for message in value:
        own = {key: part for key, part in message.items() if part is not None and key not in ("from", "value")}
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or content is None and not message.get("tool_calls"):
            raise UserError(f"{where()}: data.messages: column {column!r} {NO_MESSAGES}")
        found.append({**own, "role": ROLES.get(role, role), "content": "" if content is None else content})
    return found


def read_tools(row: dict[str, Any], column: str | None, where: Callable[[], str]) -> list[Any] | None:
    """The tools of a row: a list, its JSON text, or none. Raises UserError."""
    value = None if column is None else row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{where()}: data.tools: column {column!r} is not JSON") from None
    if value in (None, "", []):
        return None
    if not isinstance(value, list):
        raise UserError(f"{where()}: data.tools: column {column!r} is not a list of tools")
    return value


def text_of_content(content: Any) -> str:
    """The text of a message, which may be a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


@dataclasses.dataclass(frozen=True)
class QuestionRows(GroupedRows):
    """Conversations that are to be answered, with column INPUT."""

    chat: Chat | None = None
    data: DataConfig | None = None

    def columns(self) -> list[str]:
        return [*self.whole.columns(), INPUT]

    def make(self, row: dict[str, Any], number: int, index: int) -> dict[str, Any]:
        assert self.chat is not None and self.data is not None
        return {**row, INPUT: read_question(row, self.data, self.chat, functools.partial(self.where, index))}


def ask_rows(rows: Rows, data: DataConfig, chat: Chat) -> QuestionRows:
    """Conversations with the text that asks for an answer. Raises UserError."""
    check_column(rows, "data.messages", data.messages)
    ends = np.arange(1, len(rows) + 1)
    return QuestionRows(rows.name, rows.source, rows.kind, rows.unreadable, rows, ends, chat, data)


def check_column(rows: Rows, key: str, column: str | None) -> None:
    if column is not None and column not in rows.columns():
        raise UserError(
            f"{key} is column {column!r}, which {rows.name} does not have; its columns: {', '.join(rows.columns())}"
        )


def read_question(row: dict[str, Any], data: DataConfig, chat: Chat, where: Callable[[], str]) -> str:
    """The text of a conversation up to where an answer begins; an answer that it ends with is left out."""
    assert data.messages is not None
    messages = read_messages(row.get(data.messages), data.messages, where)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    answer = {"role": "assistant", "content": "-"}
    return chat.split_turn([*messages, answer], where, tools=read_tools(row, data.tools, where))[0]
