"""Made-up requests to four tools, each with the call that answers it: what the agent's specialist learns from.

Every number, name and city is drawn; nothing comes from a data set. Phrasings are split: those of `HELD_OUT` are never
trained on, and measure whether the specialist reads a request or remembers a sentence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]

CITIES = (
    *("Lisbon", "Oslo", "Paris", "Rome", "Vienna", "Berlin", "Madrid", "Dublin", "Athens", "Prague", "Warsaw", "Kyoto"),
    *("Cairo", "Lima", "Quito", "Boston", "Denver", "Geneva", "Milan", "Porto", "Turin", "Tokyo", "Delhi", "Sydney"),
)
CUSTOMERS = (
    *(
        "Alice Brown",
        "Peter Jones",
        "Mary Smith",
        "John Miller",
        "Clara Wood",
        "Henry Ford",
        "Anna White",
        "Jane Black",
    ),
    *(
        "Thomas Hill",
        "Lucy Gray",
        "Edward King",
        "Rose Field",
        "Martin Bell",
        "Emma Stone",
        "David Young",
        "Ruth Green",
    ),
)
UNITS = {
    "miles": ("kilometres", 1.609344),
    "kilometres": ("miles", 0.621371),
    "pounds": ("kilograms", 0.453592),
    "kilograms": ("pounds", 2.204623),
    "feet": ("metres", 0.3048),
    "metres": ("feet", 3.28084),
}
OPERATIONS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
SKIES = ("sunny", "rain", "snow", "cloudy", "windy", "fog")
PLANS = ("basic", "standard", "premium")

_STRING, _NUMBER = {"type": "string"}, {"type": "number"}


def _tool(name: str, description: str, properties: dict[str, Any]) -> Row:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: tuple[Row, ...] = (
    _tool("get_weather", "Weather of a city today.", {"city": _STRING}),
    _tool(
        "convert_units", "Convert a value to another unit.", {"value": _NUMBER, "source": _STRING, "target": _STRING}
    ),
    _tool(
        "use_calculator",
        "One operation on two numbers.",
        {"left": _NUMBER, "operation": {"type": "string", "enum": list(OPERATIONS)}, "right": _NUMBER},
    ),
    _tool("find_customer", "Plan and open invoices of a customer.", {"name": _STRING}),
)
"""The tools in the form of an OpenAI request."""
FINAL_ANSWER = _tool("final_answer", "Gives the final answer to the task.", {"answer": _STRING})
"""How agents of smolagents end."""

TRAINED = {
    "get_weather": (
        *("What is the weather in {city}?", "How is the weather in {city} today?", "Is it raining in {city}?"),
        *("Tell me the weather of {city}.", "Will I need a coat in {city}?", "What does the sky look like in {city}?"),
        *("Weather in {city}, please.", "Is it cold in {city} today?", "Give me the weather for {city}."),
        *("I am going to {city}; how is the weather there?", "How warm is it in {city}?", "Is there snow in {city}?"),
    ),
    "convert_units": (
        *("Convert {value} {source} to {target}.", "How many {target} are {value} {source}?"),
        *("What is {value} {source} in {target}?", "Turn {value} {source} into {target}."),
        *("{value} {source} in {target}, please.", "I have {value} {source}; how much is that in {target}?"),
        *("Give me {value} {source} as {target}.", "How much is {value} {source} in {target}?"),
        *("Change {value} {source} to {target}.", "Write {value} {source} in {target}."),
    ),
    "add": (
        "What is {left} plus {right}?",
        "Add {left} and {right}.",
        "{left} + {right}",
        "Sum of {left} and {right}?",
    ),
    "subtract": (
        *(
            "What is {left} minus {right}?",
            "Take {right} from {left}.",
            "{left} - {right}",
            "Subtract {right} from {left}.",
        ),
    ),
    "multiply": (
        *(
            "What is {left} times {right}?",
            "Multiply {left} by {right}.",
            "{left} * {right}",
            "Product of {left} and {right}?",
        ),
    ),
    "divide": (
        *(
            "What is {left} divided by {right}?",
            "Divide {left} by {right}.",
            "{left} / {right}",
            "Split {left} into {right} parts.",
        ),
    ),
    "find_customer": (
        *("Find the customer {name}.", "Which plan does {name} have?", "Show me the record of {name}."),
        *("Does {name} have open invoices?", "Look up {name}.", "What do we know about {name}?"),
        *("Open the file of our customer {name}.", "How many invoices are open for {name}?", "Is {name} on a plan?"),
        *("Search for {name}.", "I need the record of {name}.", "{name}: plan and invoices, please."),
    ),
}
"""Phrasings by tool, for `use_calculator` by operation."""

HELD_OUT = {
    "get_weather": (
        *("Do I need a coat today in {city}?", "Please tell me how the weather is in {city}."),
        *("How cold is it in {city}?", "Is the sky clear over {city}, or is it raining?"),
    ),
    "convert_units": (
        *("How many {target} is {value} {source}?", "Please turn {value} {source} to {target}."),
        *("Tell me what {value} {source} are in {target}.", "I need {value} {source} in {target}."),
    ),
    "add": ("How much is {left} plus {right}?", "Please add {left} and {right}."),
    "subtract": ("How much is {left} minus {right}?", "Please subtract {right} from {left}."),
    "multiply": ("How much is {left} times {right}?", "Please multiply {left} by {right}."),
    "divide": ("How much is {left} divided by {right}?", "Please divide {left} by {right}."),
    "find_customer": (
        *("Look up the record of {name}.", "Which invoices are open for {name}?"),
        *("Tell me what plan {name} is on.", "Show me the customer {name}, please."),
    ),
}

_OPENINGS = ("", "", "", "", "Hello. ", "Good morning. ", "One question. ", "Now this. ")


def draw_call(generator: random.Random, phrasings: dict[str, Sequence[str]]) -> tuple[str, Row]:
    """(request, call) with a tool, arguments and one of its phrasings drawn by `generator`."""
    name = generator.choice([tool["function"]["name"] for tool in TOOLS])
    key, arguments = name, _draw_arguments(generator, name)
    if name == "use_calculator":
        key = arguments["operation"]
    text = generator.choice(phrasings[key]).format(**arguments)
    return generator.choice(_OPENINGS) + text, {"name": name, "arguments": arguments}


def _draw_arguments(generator: random.Random, name: str) -> Row:
    if name == "get_weather":
        return {"city": generator.choice(CITIES)}
    if name == "find_customer":
        return {"name": generator.choice(CUSTOMERS)}
    if name == "convert_units":
        source = generator.choice(list(UNITS))
        return {"value": draw_number(generator), "source": source, "target": UNITS[source][0]}
    operation = generator.choice(list(OPERATIONS))
    return {"left": draw_number(generator), "operation": operation, "right": draw_number(generator)}


def draw_number(generator: random.Random) -> int:
    """One to three digits, each length as often as the others."""
    digits = generator.randrange(1, 4)
    return generator.randrange(max(2, 10 ** (digits - 1)), 10**digits)


def answer_to(name: str, arguments: Row) -> str:
    """What a tool returns. Weather and customers are made up from the name, always the same.

    Raises KeyError for an unknown tool, unit or operation.
    """
    if name == "get_weather":
        made_up = random.Random(arguments["city"])
        return f"{made_up.randrange(2, 35)} degrees and {made_up.choice(SKIES)} in {arguments['city']}"
    if name == "find_customer":
        made_up = random.Random(arguments["name"])
        return f"{arguments['name']}: {made_up.choice(PLANS)} plan, {made_up.randrange(9)} open invoices"
    if name == "convert_units":
        _, factor = UNITS[arguments["source"]]
        return f"{float(arguments['value']) * factor:.1f} {arguments['target']}"
    if name == "use_calculator":
        return _calculate(float(arguments["left"]), arguments["operation"], float(arguments["right"]))
    raise KeyError(name)


def _calculate(left: float, operation: str, right: float) -> str:
    results = {
        "add": lambda: left + right,
        "subtract": lambda: left - right,
        "multiply": lambda: left * right,
        "divide": lambda: left / right,
    }
    return f"{round(results[operation](), 2):g}" if operation == "divide" else f"{results[operation]():.0f}"


def call_rows(count: int, *, held_out: bool, seed: int) -> list[Row]:
    """`count` rows {messages, tools, expected}: a request, the four tools, and the call that answers it."""
    generator = random.Random(f"{seed}:{held_out}")
    phrasings = HELD_OUT if held_out else TRAINED
    rows = []
    for _ in range(count):
        text, call = draw_call(generator, phrasings)
        rows.append({"messages": [{"role": "user", "content": text}], "tools": list(TOOLS), "expected": [call]})
    return rows


def conversations(count: int, *, seed: int) -> Iterator[Row]:
    """`count` training rows {messages, tools, expected}; of four, one goes on behind the tool's result.

    What follows a result is `final_answer` with that result, or the result itself as text where no such tool is
    offered: then `expected` is empty and `said` has the text.
    """
    generator = random.Random(f"conversations:{seed}")
    for _ in range(count):
        text, call = draw_call(generator, TRAINED)
        tools = [*TOOLS, FINAL_ANSWER] if generator.random() < 0.7 else list(TOOLS)
        row: Row = {"messages": [{"role": "user", "content": text}], "tools": tools, "expected": [call]}
        if generator.random() < 0.25:
            result = (
                answer_to(call["name"], call["arguments"])
                if call["name"] != "get_weather"
                else _other_weather(generator, call)
            )
            row["messages"].append({"role": "tool", "content": result})
            ends = FINAL_ANSWER in tools
            row["expected"] = [{"name": "final_answer", "arguments": {"answer": result}}] if ends else []
            row |= {} if ends else {"said": result}
        yield row


def _other_weather(generator: random.Random, call: Row) -> str:
    """Weather that the city does not have, so that a result must be read and cannot be remembered."""
    city = call["arguments"]["city"]
    return f"{generator.randrange(2, 35)} degrees and {generator.choice(SKIES)} in {city}"
