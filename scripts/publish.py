"""The whole way of a model to its readers: quantise, measure, card, push, verify, load by its id, Space.

    hf auth login
    python scripts/publish.py Qwen/Qwen3-0.6B --namespace YOU --work publish --dataset my-text.txt --text held-out.txt

Every step is an `hf-qep` command that is printed before it runs, and can be run again by itself; the first that fails
ends the script. Repository and Space are private. `--print` shows the commands and runs nothing. With HF_ENDPOINT set
the same goes to another Hub, which is how it is tested.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from commands import carry_out

LOAD = """
import sys
import hf_qep
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("The old man opened the door, and", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True))
"""
"""What a reader does, in a process that has seen nothing of this folder."""


def publish(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the float model.")],
    namespace: Annotated[str, typer.Option(help="User or organisation that will own the repositories.")],
    work: Annotated[Path, typer.Option(help="New folder for the checkpoint and the Space.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the repository. Left out: that of the model, -QEP-1bit.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Folder of the float model, if its id cannot be had.")] = None,
    method: Annotated[str, typer.Option(help="As in hf-qep quantize.")] = "sign",
    bits: Annotated[float, typer.Option(help="As in hf-qep quantize.")] = 1.0,
    effort: Annotated[str, typer.Option(help="As in hf-qep quantize.")] = "balanced",
    dataset: Annotated[str | None, typer.Option(help="Calibration text. Left out: the model writes its own.")] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
    text: Annotated[str | None, typer.Option(help="Held-out text. Left out: three short tales.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Hardware of the Space.")] = None,
    space: Annotated[bool, typer.Option("--space/--no-space", help="Also deploy the Space.")] = True,
    only_print: Annotated[bool, typer.Option("--print", help="Print the commands and stop.")] = False,
) -> None:
    """From a float model to a private repository and a private Space, each step checked."""
    title = name or f"{Path(model).name}-QEP-1bit"
    folder, repo = work / title, f"{namespace}/{title}"
    quantize = ["quantize", model, "--out", str(folder), "--method", method, "--bits", f"{bits:g}"]
    quantize += ["--num-samples", str(num_samples), "--seq-len", str(seq_len), "--effort", effort]
    quantize += ["--dataset", dataset] if dataset else []
    measured_on = ["--text", text] if text else []
    against = ["--baseline", baseline] if baseline else []
    evaluate = ["eval", str(folder), "--speed", *measured_on, *against]
    card = ["card", str(folder), "--repo-id", repo, "--quantized-by", namespace]
    carry_out([quantize, evaluate, card, ["push", str(folder), repo], ["verify", repo, *measured_on]], only_print)
    load_by_id(repo, only_print)
    if space:
        page = work / f"{title}-space"
        deploy = ["space", "deploy", str(page), f"{repo}-compare"]
        deploy += ["--hardware", hardware] if hardware else []
        carry_out([["space", "init", str(page), "--model", repo, "--base", model], deploy], only_print)


def load_by_id(repo: str, only_print: bool) -> None:
    """Load the pushed model in another process and let it write a sentence."""
    typer.echo(f"python: AutoModelForCausalLM.from_pretrained({repo!r})", err=not only_print)
    if not only_print and (code := subprocess.run([sys.executable, "-c", LOAD, repo]).returncode):
        raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(publish)
