"""Packed checkpoints behind the OpenAI-compatible server of transformers, by its HTTP addresses."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_qep
from tests.script_modules import imported
from tests.serving.conftest import SPECIALIST

with imported("agent.requests") as found:
    REQUESTS = found.__dict__["agent.requests"].requests

TOOLS = list(REQUESTS.TOOLS)
LONG = 400
"""Tokens of an answer that nobody waits for."""


def chat(text, **more):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 48, "temperature": 0, **more}


def endless(count):
    """A completion of exactly so many tokens: the one that ends a text is never taken."""
    settings = {"max_new_tokens": count, "do_sample": False, "suppress_tokens": [2], "eos_token_id": 2}
    return {"prompt": "The ferryman", "generation_config": json.dumps(settings)}


def call_of(message):
    (call,) = message["tool_calls"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def test_the_model_that_is_served_is_listed_once(server):
    status, listed = server.ask("/v1/models")
    assert status == 200
    assert [entry["id"] for entry in listed["data"]].count(str(SPECIALIST)) == 1


def test_a_completion_is_what_the_packed_model_writes_by_itself(server):
    assert hf_qep.__version__
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SPECIALIST), AutoTokenizer.from_pretrained(SPECIALIST)
    assert any(isinstance(module, hf_qep.QepLinear) for module in model.modules())
    ids = tokenizer("The ferryman", return_tensors="pt")
    with torch.inference_mode():
        own = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    status, answer = server.ask("/v1/completions", {"prompt": "The ferryman", "max_tokens": 12, "temperature": 0})
    assert status == 200
    assert answer["choices"][0]["text"] == tokenizer.decode(own, skip_special_tokens=True)
    assert answer["usage"]["completion_tokens"] == len(own)


def test_a_stream_adds_up_to_the_whole_answer(server):
    whole = server.ask("/v1/completions", endless(24))[1]
    events = server.events("/v1/completions", endless(24))
    assert len(events) > 5
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"


def test_a_chat_with_tools_ends_in_a_call_whole_and_streamed(server):
    asked = chat("What is the weather in Oslo?", tools=TOOLS)
    choice = server.ask("/v1/chat/completions", asked)[1]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert call_of(choice["message"]) == ("get_weather", {"city": "Oslo"})
    events = server.events("/v1/chat/completions", asked)
    (delta,) = [e["choices"][0]["delta"] for e in events if e["choices"][0]["delta"].get("tool_calls")]
    assert call_of(delta) == ("get_weather", {"city": "Oslo"})
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def answers(server, bodies, workers):
    """(text, calls, reason) of each request, so many of them at a time."""

    def answer(body):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        (choice,) = server.ask(path, body)[1]["choices"]
        calls = [call["function"] for call in choice.get("message", {}).get("tool_calls") or []]
        return choice.get("text", choice.get("message", {}).get("content")), calls, choice["finish_reason"]

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(answer, bodies))


CHATS = [chat(f"Weather in {city}, please.", tools=TOOLS) for city in ("Oslo", "Lima", "Rome", "Cairo")]


def test_several_requests_at_once_get_the_answers_they_get_alone(server):
    bodies = [*CHATS, endless(9), endless(17)]
    assert answers(server, bodies, workers=6) == answers(server, bodies, workers=1)


def test_requests_that_are_batched_get_the_answers_they_get_alone(server, batching_server):
    assert answers(batching_server, CHATS, workers=4) == answers(server, CHATS, workers=1)


def test_closing_a_stream_ends_the_generation(server):
    (timed,) = server.manager.loaded_models.values()
    steps = []
    hook = timed.model.register_forward_pre_hook(lambda *_: steps.append(time.monotonic()))
    try:
        server.ask("/v1/completions", endless(40))
        assert len(steps) == 40  # nothing else ends such an answer before its time
        connection = server.connection()
        body = json.dumps(endless(LONG) | {"stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        answer.close()
        connection.close()
        server.ask("/v1/completions", endless(1))  # waits its turn behind the other one
    finally:
        hook.remove()
    assert len(steps) < 40 + LONG


def test_an_error_in_a_stream_is_an_event_that_can_be_read(server, monkeypatch):
    (timed,) = server.manager.loaded_models.values()

    def fail(**_):
        raise RuntimeError('no "room"\nleft')

    monkeypatch.setattr(timed.model, "generate", fail)
    assert server.events("/v1/completions", endless(3)) == [{"error": 'no "room"\nleft'}]


def test_a_call_that_the_model_does_not_end_is_told(server):
    asked = chat("What is the weather in Oslo?", tools=TOOLS) | {"max_tokens": 4}
    status, answer = server.ask("/v1/chat/completions", asked)
    assert status == 500
    assert "tool call cannot be read" in answer["detail"]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", "{not json", 422, "JSON"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt must be a string"),
        ("/v1/completions", {"promt": "a"}, 422, "promt"),
        ("/v1/chat/completions", {"max_tokens": 3}, 422, "lacks the field `messages`"),
        ("/v1/chat/completions", {"messages": [{"content": "a"}]}, 422, "lacks the field `role`"),
        ("/v1/chat/completions", chat("a", model="org/other"), 400, "org/other"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong_with_it(server, path, body, status, says):
    got, answer = server.ask(path, body)
    assert got == status
    assert says in json.dumps(answer["detail"])


def test_a_model_that_cannot_be_had_is_not_found(open_server):
    status, answer = open_server.ask("/v1/chat/completions", chat("a", model="no/such-model"))
    assert status == 404
    assert "no/such-model" in answer["detail"]
    assert open_server.ask("/v1/models")[0] == 200


def test_a_server_that_is_pinned_to_nothing_loads_a_packed_model_that_is_named(open_server):
    asked = {"model": str(SPECIALIST), "prompt": "The ferryman", "max_tokens": 3, "temperature": 0}
    assert open_server.ask("/v1/completions", asked)[0] == 200
    assert str(SPECIALIST) in [entry["id"] for entry in open_server.ask("/v1/models")[1]["data"]]


def test_a_model_without_a_chat_template_completes_and_says_that_it_does_not_chat(base_server):
    status, answer = base_server.ask("/v1/chat/completions", chat("Hello"))
    assert status == 400
    assert "no chat template" in answer["detail"] and "/v1/completions" in answer["detail"]
    status, answer = base_server.ask("/v1/completions", endless(5))
    assert status == 200 and answer["usage"]["completion_tokens"] == 5
