"""Words of the page: labels, examples, and one sentence for everything that can go wrong."""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "1-bit or original?"
INTRO = (
    "The same prompt, seed and settings go to a language model and to its 1-bit version. "
    "Read both texts, and see what one bit costs and what it saves."
)
NAMES = {"original": "Original", "one_bit": "1-bit"}
FOOTER = (
    "Outputs may be wrong, offensive or made up; nothing here is advice. Do not enter personal data. "
    "This page is Apache-2.0."
)
LICENCE = "Licence of {name}: {licence}."
NO_LICENCE = "Licence of {name}: its card names none."
DUPLICATE = "Duplicate this Space"

STATUS = {
    "idle": "Ready",
    "waiting": "Waiting",
    "writing": "Writing",
    "done": "Done",
    "stopped": "Stopped",
    "error": "Failed",
    "recorded": "Recorded",
    "off": "Not available",
}


@dataclass(frozen=True)
class Example:
    """A prompt that can be tried with one click."""

    label: str
    prompt: str


EXAMPLES = (
    Example("Story", "The old man opened the door, and"),
    Example("Explain", "Explain in three sentences why the sky is blue."),
    Example("E-mail", "Write a short, polite e-mail that moves a meeting from Tuesday to Thursday."),
    Example("日本語：説明", "日本の四季について、三つの文で説明してください。"),
    Example("日本語：翻訳", "次の文を英語に翻訳してください。「明日は雨が降るかもしれません。」"),
    Example("Code", "Write a Python function that returns the n-th Fibonacci number, with a docstring."),
    Example("Known to fail: arithmetic", "What is 487 times 312? Show each step."),
)

NO_MODEL = "No model is set. Give the variable MODEL_ID the name of a 1-bit model on the Hub, or a folder."
EMPTY_PROMPT = "The prompt is empty. Type something, or choose an example."
NOTHING_TO_STOP = "Nothing is running."
STOPPING = "Stopping."
QUEUED = "Waiting for a free place."
STOPPED_WAITING = "Stopped before it began."
OUT_OF_MEMORY = "Out of memory. Use a shorter prompt or fewer new tokens."
NO_ROOM = "The original needs about {needed} of memory and {free} are free, so it does not run here."
NO_RECORDING = (
    "The original does not run here, and there is no recording for this prompt. The examples below the prompt are "
    "those that were recorded."
)
NOT_RECORDED_AT_ALL = "There are no recorded outputs with this model."
OTHER_WEIGHTS = "The {what} of this model is of other weights than these, so it is not shown. Run: hf-qep eval"
TURNED_OFF = "The original is switched off in this Space."
NO_BASE = "The quantised model does not say what it was made from. Set the variable BASE_ID."
NO_SPECIALISTS = (
    "No specialist is set: give the variable SPECIALISTS the names of students on the Hub, or folders, that hold a "
    "specialist.json, divided by commas."
)
SPECIALISTS = (
    "A specialist is a small student that learned one task from a large teacher. Both answer the same item here; the "
    "times are of one pass of each on the processor."
)
NO_TEACHER = "The teacher is not here, so the student answers alone."
NO_ROOM_HERE = "It needs about {needed} of memory and {free} are free."
READ_BEFORE = "The teacher reads its instructions and examples beforehand; that time is not counted."
LONG_DEAL = "This is {tokens} tokens long, and the {who} has room for {room}. Shorten a text."
EMPTY_DRAWING = "Nothing is drawn. Draw a glyph, or choose a drawing."
DRAW_HINT = "Or choose the brush and draw one glyph above, as large as the field."
PROMPT_HINT = "Shift+Enter starts both models."
NO_CHAT_TEMPLATE = "This model has no chat template: it continues your text, and a system prompt is put before it."
TRIMMED_CHARS = "The prompt was cut to its last {limit} characters."
TRIMMED_TOKENS = "The prompt was cut to its last {kept} of {all} tokens."
RECORDED_GREEDY = "Recorded without sampling: set the temperature to 0 for a fair comparison."
