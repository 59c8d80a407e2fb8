"""A small model that calls tools: the demo model with a chat template, taught made-up requests, packed to signs.

The vocabulary gets one token for each mark of the template, each tool and each piece of JSON between two values, so a
call is a dozen tokens, most of them copied. `RESPONSE` tells transformers how to read the calls out of what was said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from agent.requests import FINAL_ANSWER, TOOLS, Row, call_rows, conversations

from hf_qep import QepConfig
from hf_qep.cli.demo import DEMO_MODEL
from hf_qep.cli.job import quantize_and_save
from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.samples import CAUSAL_LM, IGNORED, TaskData
from hf_qep.distill.student_trainer import train_student
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.source import load_quantized
from hf_qep.evaluation import EvalOptions, evaluate_pair
from hf_qep.evaluation.environment import command_line
from hf_qep.evaluation.tasks import Task
from hf_qep.evaluation.tool_calls import call_task
from hf_qep.files import check_output
from hf_qep.progress import Progress


@dataclass(frozen=True)
class Preset:
    """rows, epochs: what the float model learns from. packed_rows, packed_epochs: what the packed one is calibrated on
    and trained towards the float one with. judged: requests of held-out phrasings."""

    rows: int
    epochs: float
    packed_rows: int
    packed_epochs: int
    judged: int


PRESETS = {"full": Preset(9000, 2, 2400, 1, 200), "quick": Preset(40, 1, 40, 0, 4)}
TRAIN_SEED, PACK_SEED, JUDGE_SEED = 0, 1, 2
LEARNING_RATE, BATCH = 1e-3, 4
EMBEDDING_BITS = 8

NAMES = tuple(tool["function"]["name"] for tool in (*TOOLS, FINAL_ANSWER))
MARKS = ("<|tools|>", "<|user|>", "<|tool|>", "<|assistant|>", "<tool_call>", "</tool_call>")
PIECES = (
    *('{"name": "', '", "arguments": {', '"}}', "}}", '"city": "', '"name": "', '"answer": "'),
    *('"value": ', ', "source": "', '", "target": "', '"left": ', ', "operation": "', '", "right": '),
)

TEMPLATE = """\
{#- Tools by name alone: the specialist knows what they take. Results stand where the calls stood. -#}
{{- bos_token -}}
{%- if tools %}{{- "<|tools|>" }}{%- for tool in tools %}{{- (tool.function or tool).name }}{%- endfor %}{%- endif %}
{%- for message in messages %}
  {%- set text = (message.content or "") | trim %}
  {%- if message.role == "tool" or text.startswith("Observation:") %}
    {{- "<|tool|>" + text.replace("Observation:", "") | trim }}
  {%- elif message.role == "user" %}
    {{- "<|user|>" + text.replace("New task:", "") | trim }}
  {%- elif message.role == "assistant" and not message.tool_calls and not text.startswith("Calling tools:") %}
    {{- "<|assistant|>" + text + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{%- endif %}
"""

RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<EOS_TOKEN>", "content": "text"},
    },
}


def give_voice(model: Any, tokenizer: Any) -> None:
    """Add tokens, chat template and response template, in place. New embeddings begin as means of their old pieces."""
    from tokenizers import AddedToken

    texts = [*MARKS, *NAMES, *PIECES]
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=text in MARKS[:4]) for text in texts])
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        for text, ids in zip(texts, pieces, strict=True):
            weight[tokenizer.convert_tokens_to_ids(text)] = weight[ids].mean(0)


def said_by(row: Row) -> str:
    """The answer of a training row as the model writes it, with its end."""
    calls = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in row["expected"])
    return calls + row.get("said", "") + "<EOS_TOKEN>"


def as_task(tokenizer: Any, rows: Iterable[Row], length: int = 256) -> TaskData:
    """Rows one behind the other in sequences of `length` tokens: ids and labels (sequences, length) int64.

    Only answers are labelled. What does not fit into a sequence begins the next one; the rest is padded.
    """
    sequences: list[tuple[list[int], list[int]]] = [([], [])]
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["messages"], tools=row["tools"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        answer = tokenizer(said_by(row), add_special_tokens=False)["input_ids"]
        if len(sequences[-1][0]) + len(prompt) + len(answer) > length:
            sequences.append(([], []))
        sequences[-1][0].extend([*prompt, *answer])
        sequences[-1][1].extend([*[IGNORED] * len(prompt), *answer])
    ids = torch.full((len(sequences), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for number, (tokens, answers) in enumerate(sequences):
        ids[number, : len(tokens)], labels[number, : len(tokens)] = torch.tensor(tokens), torch.tensor(answers)
    return TaskData(CAUSAL_LM, {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}, labels)


def make_specialist(out: Path, preset: Preset, progress: Progress) -> dict[str, Any]:
    """Teach the demo model, pack it, measure both; `out` gets `float` and `packed`, the latter with its record.

    Returns what was measured. The same preset gives the same files on the same machine. Raises OutputExistsError if
    `out` is not empty, else QepError as its parts do.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_output(out, overwrite=False)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    give_voice(model, tokenizer)
    lesson = as_task(tokenizer, conversations(preset.rows, seed=TRAIN_SEED))
    schedule = {"epochs": preset.epochs, "learning_rate": LEARNING_RATE, "batch_size": BATCH}
    report = train_student(model, lesson, loss=DistillLoss(alpha=1.0), progress=progress, **schedule)
    model.to(torch.bfloat16).save_pretrained(out / "float")
    tokenizer.save_pretrained(out / "float")
    packed = _pack(out, tokenizer, preset, progress)
    original = AutoModelForCausalLM.from_pretrained(out / "float", dtype=torch.float32)
    rows = call_rows(preset.judged, held_out=True, seed=JUDGE_SEED)
    record = evaluate_pair(
        original,
        packed,
        tokenizer,
        None,
        tasks=[Task("tool_calls", call_task("tool_calls", rows, len(rows)))],
        options=EvalOptions(),
        subject_name="packed",
        baseline_name="float",
        subject_folder=out / "packed",
        baseline_folder=out / "float",
        command=command_line(),
        progress=progress,
    )
    record.write(out / "packed")
    scores = {m.name: {"original": m.baseline.value, "packed": m.subject.value} for m in record.tasks[0].metrics}
    return {"seconds of training": round(report.seconds), "bits per weight": record.bits.model, **scores}


def _pack(out: Path, tokenizer: Any, preset: Preset, progress: Progress) -> Any:
    """The packed model in float32, as it loads from `out / "packed"`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out / "float", dtype=torch.float32)
    rows = dict(as_task(tokenizer, conversations(preset.packed_rows, seed=PACK_SEED)).inputs)
    count = len(rows["input_ids"])
    config = QepConfig(
        num_samples=count, batch_size=8, distill_epochs=preset.packed_epochs, embedding_bits=EMBEDDING_BITS
    )
    quantize_and_save(
        model,
        tokenizer,
        config,
        out / "packed",
        base_model="float",
        base_folder=out / "float",
        calibration=load_calibration(rows, None, num_samples=count, seq_len=1, seed=0),
        stored_as=torch.bfloat16,
        progress=progress,
    )
    return load_quantized(out / "packed", type(model), torch.float32)
