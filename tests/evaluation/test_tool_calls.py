"""Tool calls: what is read out of an answer, how it is compared, and that a model with known answers gets its score."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_qep.errors import ConfigError
from hf_qep.evaluation.pair import EvalOptions, compare_on_tasks
from hf_qep.evaluation.tasks import find_tasks
from hf_qep.evaluation.tool_calls import Call, answer_calls, parse_calls, same_json, score_answer
from tests.evaluation.templates import ARGUMENTS, ASKED, CONVERSATION, TEMPLATES, TOOL

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    Call, st.text("abc_", min_size=1, max_size=4), st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
)
FORECAST = Call("forecast", {"city": "Oslo"})


def written(call: Call, name: str = "name", arguments: str = "arguments") -> str:
    return json.dumps({name: call.name, arguments: call.arguments})


FORMS = {
    "tags": lambda calls: "Let me see.\n" + "\n".join(f"<tool_call>\n{written(c)}\n</tool_call>" for c in calls),
    "list": lambda calls: "[" + ", ".join(map(written, calls)) + "]",
    "actions": lambda calls: f"<|START_ACTION|>[{', '.join(written(c, 'tool_name', 'parameters') for c in calls)}]",
    "block": lambda calls: f"Action: ```json\n[{', '.join(written(c, 'tool_name', 'parameters') for c in calls)}]\n```",
}


@given(st.lists(CALLS, min_size=1, max_size=3), st.sampled_from(sorted(FORMS)))
def test_calls_come_back_from_every_form_they_are_written_in(calls, form):
    text = FORMS[form](calls)
    if any(mark in json.dumps([c.arguments for c in calls]) for mark in ("<", "`")):
        return  # a mark inside an argument ends the region, in all parsers
    read = parse_calls(text)
    assert read is not None and len(read) == len(calls)
    assert all(a.matches(b) for a, b in zip(read, calls, strict=True))


@given(CALLS)
def test_a_single_call_in_the_manner_of_llama_comes_back(call):
    text = written(call, arguments="parameters")
    for answer in (text, f"<|python_tag|>{text}<|eom_id|>", f"<think>{{}}</think>\n{text}<|eot_id|>"):
        (read,) = parse_calls(answer)
        assert read.matches(call)


@pytest.mark.parametrize(
    "text",
    [
        *('<tool_call>{"name": "forecast", "arguments": {"city": "Os', "<tool_call></tool_call>", "{broken", "[]"),
        *('{"name": "forecast"}', '{"name": 3, "arguments": {}}', '{"city": "Oslo"}', "<|python_tag|>print(1)"),
        '<|START_ACTION|>[{"tool_name": "forecast", "parameters": "Oslo"}]<|END_ACTION|>',
        '{"name": "forecast", "arguments": {"days": NaN}}',
    ],
)
def test_what_looks_like_a_call_and_is_none_is_wrong_everywhere(text):
    assert parse_calls(text) is None
    assert set(score_answer(text, [FORECAST]).values()) == {0.0}
    assert set(score_answer(text, []).values()) == {0.0}


def test_plain_text_is_no_call_and_right_only_where_none_is_expected():
    assert parse_calls("It is 7 degrees.") == ()
    assert set(score_answer("It is 7 degrees.", []).values()) == {1.0}
    assert set(score_answer("It is 7 degrees.", [FORECAST]).values()) == {0.0}
    assert set(score_answer(written(FORECAST), []).values()) == {0.0}


@given(VALUES)
def test_json_values_equal_themselves_in_another_order_and_no_boolean_equals_a_number(value):
    turned = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert same_json(value, json.loads(json.dumps(turned)))
    assert not same_json([True], [1]) and not same_json({"a": 0}, {"a": False})
    assert same_json({"a": 1, "b": [2.0]}, {"b": [2], "a": 1.0}) and not same_json("1", 1)


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_call_rendered_by_the_template_of_a_family_is_read_back(tiny_tokenizer, family):
    ask = {"tools": [TOOL], "tokenize": False, "chat_template": TEMPLATES[family]}
    asked = tiny_tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, **ask)
    whole = tiny_tokenizer.apply_chat_template(CONVERSATION, **ask)
    assert whole.startswith(asked)
    (call,) = parse_calls(whole.removeprefix(asked))
    assert call.matches(Call("forecast", ARGUMENTS))


class Parrot(nn.Module):
    """Says, after each prompt of a known length, a text that is known, and then the end."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))
        self.tokenizer, self.answers, self.start = tokenizer, iter(answers), None

    def can_generate(self):
        return True

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        if self.start is None:
            self.start = input_ids.shape[1]
            said = self.tokenizer(next(self.answers), add_special_tokens=False)["input_ids"]
            self.script = [*said, self.tokenizer.eos_token_id]
        token = self.script[input_ids.shape[1] - self.start]
        if token == self.tokenizer.eos_token_id:
            self.start = None
        logits = torch.zeros(1, input_ids.shape[1], len(self.tokenizer))
        logits[..., token] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.fixture
def four_requests(tmp_path):
    """A file of four requests that all expect the same call, the last one none."""
    row = {"messages": [{"role": "user", "content": "Weather in Oslo?"}], "tools": [TOOL]}
    expected = {"name": "forecast", "arguments": {"city": "Oslo"}}
    rows = [row | {"expected": expected}, row | {"expected": [expected]}, row | {"expected": [expected]}]
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, row | {"expected": []}]))
    return path


RIGHT, OTHER = written(FORECAST), written(Call("forecast", {"city": "Rome"}))


def test_models_with_known_answers_get_their_scores_side_by_side(tiny_tokenizer, four_requests):
    tasks = find_tasks([f"calls={four_requests}"])
    original = Parrot(tiny_tokenizer, [RIGHT, RIGHT, RIGHT, "Hello."])
    packed = Parrot(tiny_tokenizer, [RIGHT, OTHER, '{"name": "forec', "Hello."])
    (result,) = compare_on_tasks(original, packed, tiny_tokenizer, tasks, options=EvalOptions(limit=9))
    scores = {m.name: (m.baseline.value, m.subject.value) for m in result.metrics}
    assert scores == {"exact_match": (1.0, 0.5), "tool_name": (1.0, 0.75), "parsed": (1.0, 0.75)}
    exact = result.metrics[0]
    assert exact.subject.stderr == pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2)
    assert exact.retention.corrected.value == 0.5 and exact.retention.paired
    assert (result.prompt, result.form, result.items, result.chance) == ("own:calls", "tool_calls", 4, 0.0)


def test_tool_calls_need_a_chat_template(tiny_tokenizer, four_requests):
    (task,) = find_tasks([f"calls={four_requests}"])
    bare = SimpleNamespace(chat_template=None)
    with pytest.raises(ConfigError, match="'calls' needs a chat template"):
        answer_calls(Parrot(tiny_tokenizer, []), bare, task.local)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [], "tools": [], "expected": []}, "row 0 .* at least one"),
        ({"messages": ASKED, "tools": [], "expected": "forecast"}, "must be calls"),
        ({"messages": ASKED, "tools": [], "expected": [{"name": "forecast"}]}, "must be calls"),
    ],
)
def test_rows_that_ask_nothing_are_refused(tmp_path, row, message):
    (tmp_path / "calls.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=message):
        find_tasks(["calls"], tmp_path)


def test_a_later_row_without_a_column_is_refused(tmp_path):
    rows = [{"messages": ASKED, "tools": [], "expected": []}, {"messages": ASKED, "tools": []}]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ConfigError, match="row 1 .* 'expected'"):
        find_tasks(["calls"], tmp_path)
