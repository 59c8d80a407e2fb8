"""`hf-qep demo`: the bundled language model, quantised several ways and measured on text it has never seen, offline."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_qep.config import QepConfig
    from hf_qep.evaluation.record import EvalRecord

PACKAGE = Path(__file__).resolve().parent.parent
DEMO_MODEL = PACKAGE / "demo_model"
NAME = "hf_qep/demo_model"
HELD_OUT = PACKAGE / "demo_text" / "held_out.txt"
DEFAULT_METHODS = ["rtn", "gptq", "onebit", "sign"]
PROMPT = "The old man opened the door, and"
NEW_TOKENS = 48
WINDOW = 256  # the model was trained on windows of 256 and 512 tokens

NEXT_STEPS = """What to try next, with a network:
  hf-qep quantize Qwen/Qwen3-0.6B --out qwen3-0.6b-1bit
  hf-qep inspect qwen3-0.6b-1bit
  hf-qep eval qwen3-0.6b-1bit --text your-text.txt
  hf-qep compare Qwen/Qwen3-0.6B --methods onebit,sign --propagation 0,1"""


def demo_command(
    text: Annotated[Path | None, typer.Option(help="Text file to measure on. Left out: the bundled tales.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration text. Left out: the model writes its own.")] = None,
    method: Annotated[list[str], typer.Option(help="Method to try; may be repeated.")] = DEFAULT_METHODS,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for one checkpoint per method.")] = Path("demo-out"),
    num_samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 256,
    distill_epochs: Annotated[
        int, typer.Option(help="Passes of training at the end of one more run of the last method; 0: none.", min=0)
    ] = 8,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Quantise the bundled 2.75M-parameter model to one bit in several ways and compare; works offline."""
    began = time.monotonic()
    import torch

    from hf_qep.config import QepConfig

    torch.set_num_threads(1)  # so small a model gains nothing from two, and on a busy machine took eight times longer
    rows = {"dataset": dataset, "num_samples": num_samples, "seq_len": seq_len}
    configs = {m: QepConfig(method=m, **rows) for m in method}
    if distill_epochs:
        configs[f"{method[-1]}-distilled"] = QepConfig(method=method[-1], distill_epochs=distill_epochs, **rows)
    result = run_demo(configs, text or HELD_OUT, out, quiet=quiet or as_json)
    result["seconds"] = round(time.monotonic() - began, 1)
    if as_json:
        output.print_json(result)
        return
    _show(result)
    if not quiet:
        output.say(NEXT_STEPS)


def run_demo(configs: dict[str, QepConfig], text: Path, out: Path, *, quiet: bool) -> dict[str, Any]:
    """Quantise, save, reload and measure once per config, by the name of its folder below `out`; all see the same
    calibration rows and the same text."""
    from hf_qep.cli.job import quantize_and_save
    from hf_qep.engine.calibration import calibration_of
    from hf_qep.engine.source import load_float_model
    from hf_qep.modules import cast_weights

    progress = Progress(quiet)
    say = (lambda text: None) if quiet else output.note
    float_model, tokenizer = load_float_model(DEMO_MODEL)
    stored_as = float_model.dtype
    float_model.float()  # six times faster than bfloat16 on a processor that has no units for it
    first = next(iter(configs.values()))
    say(f"{first.num_samples} calibration rows: {first.dataset or 'the model writes them itself'}")
    calibration = calibration_of(first, tokenizer, float_model)
    records, samples = {}, {}
    for name, config in configs.items():
        folder = out / name
        say(f"{name}: quantise, save, load back, measure")
        saved = quantize_and_save(
            copy.deepcopy(float_model),
            tokenizer,
            config,
            folder,
            base_model=NAME,
            base_folder=DEMO_MODEL,
            calibration=calibration,
            stored_as=stored_as,
            overwrite=True,
            progress=progress,
        )
        cast_weights(saved.reloaded, float_model.dtype)
        records[name] = measure((float_model, saved.reloaded), tokenizer, text, folder, progress)
        samples[name] = sample(saved.reloaded, tokenizer)
    best = min(records, key=lambda name: records[name].text.kl.value)
    return {
        "rows": [_float_row(records[best]), *(_row(name, record) for name, record in records.items())],
        "best": best,
        "prompt": PROMPT,
        "samples": {"float": sample(float_model, tokenizer), best: samples[best]},
        "text": {"name": text.name, "tokens": records[best].text.kl.n},
        "calibration": calibration.description,
        "out": str(out),
    }


def measure(
    models: tuple[PreTrainedModel, PreTrainedModel], tokenizer: Any, text: Path, folder: Path, progress: Progress
) -> EvalRecord:
    """Float and quantised model on `text`; the record is written into the checkpoint's folder as well."""
    from hf_qep.engine.calibration import read_texts
    from hf_qep.evaluation.pair import EvalOptions, evaluate_pair

    record = evaluate_pair(
        *models,
        tokenizer,
        read_texts(str(text)),
        options=EvalOptions(window=WINDOW),
        source=text.name,
        subject_name=folder.name,
        baseline_name=NAME,
        subject_folder=folder,
        baseline_folder=DEMO_MODEL,
        command="hf-qep demo",
        progress=progress,
    )
    record.write(folder)
    return record


def sample(model: PreTrainedModel, tokenizer: Any) -> str:
    """What the model writes after PROMPT; the same random numbers for every model."""
    import torch

    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=40, temperature=0.8)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _float_row(record: EvalRecord) -> dict[str, Any]:
    from hf_qep.cli.inspect import describe_checkpoint

    stored = describe_checkpoint(DEMO_MODEL)
    return {
        "name": "float",
        "bits_linear": stored["bits_linear"],
        "bits_model": stored["bits_model"],
        "kl": 0.0,
        "kl_stderr": None,
        "top1_agreement": 1.0,
        "perplexity": _value(record.text.baseline.perplexity),
        "file_bytes": stored["file_bytes"],
    }


def _row(name: str, record: EvalRecord) -> dict[str, Any]:
    return {
        "name": name,
        "bits_linear": record.bits.linear,
        "bits_model": record.bits.model,
        "kl": record.text.kl.value,
        "kl_stderr": record.text.kl.stderr,
        "top1_agreement": record.text.top1_agreement.value,
        "perplexity": _value(record.text.subject.perplexity),
        "file_bytes": record.cost.subject.file_bytes,
    }


def _value(estimate: Any) -> float | None:
    return None if estimate is None else estimate.value


def _show(result: dict[str, Any]) -> None:
    title = f"{result['text']['tokens']} tokens of {result['text']['name']}, KL in nats per token"
    columns = ["method", "bits, linears", "bits, model", "KL", "+-", "top-1", "perplexity", "weight file"]
    keys = ("name", "bits_linear", "bits_model", "kl", "kl_stderr", "top1_agreement", "perplexity")
    rows = [[*(row[k] for k in keys), output.human_bytes(row["file_bytes"])] for row in result["rows"]]
    output.print_table(title, columns, rows)
    for name, text in result["samples"].items():
        output.say(f"{name}: {result['prompt']}{text}\n")
    output.say(f"Checkpoints and measurements: {result['out']}")
