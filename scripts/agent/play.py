"""An agent of smolagents in front of a server: a task goes in, tools are called, an answer comes out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from agent.requests import TOOLS, Row, answer_to

from hf_qep.extras import require
from hf_qep.progress import SILENT, Progress

MOST_STEPS = 4
MOST_TOKENS = 96
"""Of one answer; a call takes about twenty."""


def play(url: str, model: str, tasks: Sequence[tuple[str, Row | None]], progress: Progress = SILENT) -> list[Row]:
    """What an agent does with each task, one after the other, each with an agent that knows nothing of the others.

    url: of an OpenAI-compatible server, ending in /v1. model: as it calls itself there. tasks: (request, the call that
    answers it, None if that is not known). Rows have `task`, `calls` ({name, arguments, result}), `answer`, `right`
    (None without a known call), `error` and `seconds`. Raises ExtraMissingError without smolagents.
    """
    smolagents = require("agent", "smolagents")
    require("agent", "openai")
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    speaks = smolagents.OpenAIServerModel(
        model_id=model, api_base=url, api_key="none", temperature=0.0, max_tokens=MOST_TOKENS
    )
    rows = []
    with progress.bar("tasks", len(tasks), "task") as bar:
        for task, expected in tasks:
            agent = smolagents.ToolCallingAgent(
                tools=[_tool(smolagents, tool) for tool in TOOLS], model=speaks, max_steps=MOST_STEPS, verbosity_level=0
            )
            rows.append(_play_one(agent, task, expected))
            bar.advance(detail=task)
    return rows


def _play_one(agent: Any, task: str, expected: Row | None) -> Row:
    began, error = time.monotonic(), None
    try:
        answer = str(agent.run(task))
    except Exception as failure:  # of any kind: the agent runs what a model says
        answer, error = "", f"{type(failure).__name__}: {failure}"
    steps = [step for step in agent.memory.steps if getattr(step, "tool_calls", None)]
    calls = [
        {"name": call.name, "arguments": call.arguments, "result": step.observations}
        for step in steps
        for call in step.tool_calls
        if call.name != "final_answer"
    ]
    right = None if expected is None else answer == answer_to(expected["name"], expected["arguments"])
    seconds = round(time.monotonic() - began, 2)
    return {"task": task, "calls": calls, "answer": answer, "right": right, "error": error, "seconds": seconds}


def _tool(smolagents: Any, description: Row) -> Any:
    """A tool of smolagents from its description; it does what `answer_to` says."""
    function = description["function"]
    name = function["name"]

    def forward(self: Any, **arguments: Any) -> str:
        return answer_to(name, arguments)

    inputs = {key: {"description": key, **kind} for key, kind in function["parameters"]["properties"].items()}
    facts = {"name": name, "description": function["description"], "inputs": inputs, "output_type": "string"}
    made = type(name, (smolagents.Tool,), {**facts, "forward": forward, "skip_forward_signature_validation": True})
    return made()
