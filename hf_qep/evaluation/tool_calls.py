"""Tool calls as an agent's client would read them: which tools with which arguments, compared as JSON values.

A task file has rows {messages, tools, expected}: messages and tools as in an OpenAI request, `expected` one call
{name, arguments} or a list of them, in order; an empty list means that no tool is to be called. The model answers
greedily after its own chat template. Three scores per row, each 0 or 1:

    exact_match   every call has the expected name and arguments that are equal as JSON (1 and 1.0 are, 1 and true not)
    tool_name     the names are right, whatever the arguments
    parsed        what was said can be read: as calls where some are expected, else as text without any

What cannot be read counts as wrong in all three. There is no level of guessing: chance is taken as 0.

Read are (`parse_calls`): JSON between <tool_call> tags (Qwen, Hermes), one JSON object or list that is the whole
answer, behind <|python_tag|> or not (Llama 3: `parameters` for `arguments`), and the list of actions of Command models
(`tool_name`, `parameters`) behind <|START_ACTION|> or in a block after "Action:".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_qep.errors import ConfigError
from hf_qep.evaluation.greedy import continue_greedily
from hf_qep.progress import SILENT, Progress

COLUMNS = frozenset({"messages", "tools", "expected"})
FORM = "tool_calls"
MAX_NEW_TOKENS = 256
SCORES = ("exact_match", "tool_name", "parsed")

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_ACTIONS = re.compile(r"(?:<\|START_ACTION\|>|Action:\s*```json)(.*?)(?:<\|END_ACTION\|>|```|\Z)", re.DOTALL)
_THOUGHT = re.compile(r"<think>.*?</think>|<\|START_THINKING\|>.*?<\|END_THINKING\|>", re.DOTALL)
_ENDS = re.compile(r"(?:<\|(?:eom_id|eot_id|im_end|endoftext|END_OF_TURN_TOKEN)\|>\s*)+\Z")
_NO_TOOL = "directly-answer"
"""Command R's name for an answer without a tool."""


@dataclass(frozen=True)
class Call:
    """One tool call. arguments: JSON values by name."""

    name: str
    arguments: Mapping[str, Any]

    def matches(self, other: Call) -> bool:
        """Whether name and arguments are the same, as JSON values."""
        return self.name == other.name and same_json(self.arguments, other.arguments)


@dataclass(frozen=True)
class CallRow:
    """One request. messages, tools: as in an OpenAI request. expected: the calls that answer it, in order."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    expected: tuple[Call, ...]


@dataclass(frozen=True)
class CallTask:
    """Rows of one task file; the attributes are those of `prompts.LocalTask`."""

    name: str
    items: tuple[CallRow, ...]
    rows_in_file: int
    form: str = FORM
    chance: float = 0.0
    majority: None = None

    @property
    def prompt(self) -> str:
        """How records name the prompt."""
        return f"own:{self.name}"


def call_task(name: str, rows: Sequence[Mapping[str, Any]], rows_in_file: int) -> CallTask:
    """Rows {messages, tools, expected} as a task. Raises ConfigError for a row that is none, with its number."""
    return CallTask(name, tuple(_row(name, number, row) for number, row in enumerate(rows)), rows_in_file)


def _row(name: str, number: int, row: Mapping[str, Any]) -> CallRow:
    where = f"row {number} of task {name!r}"
    if lacking := sorted(COLUMNS - row.keys()):
        raise ConfigError(f"{where} lacks the column {lacking[0]!r}")
    messages, tools, expected = row["messages"], row["tools"], row["expected"]
    if not (isinstance(messages, list) and messages and isinstance(tools, list)):
        raise ConfigError(f"{where} needs a list of `messages`, at least one, and a list of `tools`")
    calls = [_as_call(call) for call in (expected if isinstance(expected, list) else [expected])]
    if None in calls:
        raise ConfigError(f"{where} has `expected` {expected!r:.80}; it must be calls {{name, arguments}}")
    return CallRow(tuple(messages), tuple(tools), tuple(call for call in calls if call))


def parse_calls(text: str) -> tuple[Call, ...] | None:
    """The calls in what a model said, in order: none for plain text, None if they are there but cannot be read.

    text: the answer with its special tokens, without its end.
    """
    text = _ENDS.sub("", _THOUGHT.sub("", text)).strip()
    if "<tool_call>" in text:
        return _calls_of([_loaded(part) for part in _TAGGED.findall(text)])
    if marked := _ACTIONS.search(text):
        return _calls_of([_loaded(marked[1])])
    is_marked, text = text.startswith("<|python_tag|>"), text.removeprefix("<|python_tag|>").strip()
    if not (is_marked or text.startswith(("{", "["))):
        return ()
    whole = _loaded(text)
    return _calls_of([_loaded(part) for part in text.split(";")] if whole is None and is_marked else [whole])


def same_json(first: Any, second: Any) -> bool:
    """Whether two parsed JSON values are equal: numbers by value, objects whatever their order, true never 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_json(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same_json, first, second))
    return type(first) in (int, float, str, type(None)) and first == second


def answer_calls(
    model: nn.Module,
    tokenizer: Any,
    task: CallTask,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = SILENT,
) -> dict[str, np.ndarray]:
    """Scores of one model: name in SCORES -> (rows,) float64 of 0 and 1.

    Raises ConfigError without a chat template, or if the template refuses the tools or messages of a row.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the task {task.name!r} needs a chat template to ask for tool calls in, and the tokenizer has none"
        )
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    with progress.bar(f"tool calls, {task.name}", len(task.items), "request") as bar:
        for row in task.items:
            ids = _asked(tokenizer, row)
            said = tokenizer.decode(continue_greedily(model, ids, tokenizer, max_new_tokens), skip_special_tokens=False)
            for name, value in score_answer(said, row.expected).items():
                scores[name].append(value)
            bar.advance()
    return {name: np.array(values) for name, values in scores.items()}


def score_answer(said: str, expected: Sequence[Call]) -> dict[str, float]:
    """The three scores of one answer, each 0.0 or 1.0."""
    calls = parse_calls(said)
    parsed = calls is not None and bool(calls) == bool(expected)
    names = parsed and [call.name for call in calls] == [call.name for call in expected]
    exact = names and all(call.matches(other) for call, other in zip(calls, expected, strict=True))
    return {"exact_match": float(exact), "tool_name": float(names), "parsed": float(parsed)}


def _asked(tokenizer: Any, row: CallRow) -> torch.Tensor:
    """(1, tokens) ids of the request, up to where the model begins."""
    from jinja2 import TemplateError

    messages, tools = [dict(m) for m in row.messages], [dict(t) for t in row.tools]
    try:
        asked = tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        raise ConfigError(f"the chat template refuses a request: {error}") from error
    return torch.tensor([asked["input_ids"]])


def _loaded(text: str) -> Any:
    """Parsed JSON; None for what is none (null is no call either)."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _calls_of(values: Sequence[Any]) -> tuple[Call, ...] | None:
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    calls = [_as_call(value) for value in flat]
    if not flat or None in calls:
        return None
    return tuple(call for call in calls if call and call.name != _NO_TOOL)


def _as_call(value: Any) -> Call | None:
    """A call from the forms that models write; None if it is none."""
    if not isinstance(value, Mapping):
        return None
    value = value["function"] if isinstance(value.get("function"), Mapping) else value
    name = value.get("name", value.get("tool_name"))
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # the form of OpenAI's answers
        arguments = _loaded(arguments)
    return Call(name, arguments) if isinstance(name, str) and isinstance(arguments, Mapping) else None
