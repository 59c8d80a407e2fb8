"""Quantise, measure and publish Cohere's Command A family: recipes, plans and the commands that carry them out.

    python scripts/command_a.py recipes
    python scripts/command_a.py plan command-a
    python scripts/command_a.py run command-r7b --out out/command-r7b --print
    python scripts/command_a.py push command-r7b out/command-r7b --namespace YOU --dry-run

`plan` reads config.json only. `run` and `push` print the `hf-qep` commands they stand for and then run them; `--print`
stops after printing. No weights of these models have been made with this script yet: every number about a result comes
from the record that `run` writes, and from nowhere else.

The recipes name no commit: `run` asks the Hub for that of the branch `main`, prints it, uses it in every step and
leaves it in the manifest; `--revision` repeats a run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from commands import carry_out

ENGLISH = "HuggingFaceFW/fineweb:sample-10BT:train:text"
JAPANESE = "HuggingFaceFW/fineweb-2:jpn_Jpan:train:text"
FRENCH = "HuggingFaceFW/fineweb-2:fra_Latn:train:text"
ARABIC = "HuggingFaceFW/fineweb-2:arb_Arab:train:text"
MATHS = "HuggingFaceTB/finemath:finemath-4plus:train:text"

GENERAL = {ENGLISH: 0.5, JAPANESE: 0.3, FRENCH: 0.1, ARABIC: 0.1}
ENGLISH_TASKS = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")
JAPANESE_TASKS = ("ja_leaderboard_jcommonsenseqa", "ja_leaderboard_xwinograd")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)


@dataclass(frozen=True)
class Recipe:
    """How one model of the family is quantised and measured. Texts are Hub data sets, none of which is a test set."""

    model: str
    card_name: str
    calibration: dict[str, float]
    """Hub data set (id:config:split:column) -> share of the calibration tokens."""
    tasks: tuple[str, ...]
    bits: float = 1.0
    method: str = "sign"
    num_samples: int = 256
    seq_len: int = 2048
    held_out: str = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"
    licence: str = "cc-by-nc-4.0"
    """As the model's card states it; the push reads it again from the base repository and goes by that."""
    gated: bool = True
    note: str = ""

    @property
    def dataset(self) -> str:
        """The calibration mix as `--dataset` takes it."""
        return ",".join(f"{name}*{share:g}" for name, share in self.calibration.items())


RECIPES = {
    "command-a": Recipe(
        "CohereLabs/c4ai-command-a-03-2025",
        "c4ai-command-a-03-2025-QEP-1bit",
        GENERAL,
        ENGLISH_TASKS + JAPANESE_TASKS,
    ),
    "command-a-reasoning": Recipe(
        "CohereLabs/command-a-reasoning-08-2025",
        "command-a-reasoning-08-2025-QEP-1bit",
        {ENGLISH: 0.3, MATHS: 0.4, JAPANESE: 0.3},
        (*ENGLISH_TASKS, *JAPANESE_TASKS, "ja_leaderboard_mgsm"),
        note="Scored without its thinking mode: the tasks compare likelihoods of given answers.",
    ),
    "command-a-vision": Recipe(
        "CohereLabs/command-a-vision-07-2025",
        "command-a-vision-07-2025-QEP-1bit",
        GENERAL,
        ENGLISH_TASKS + JAPANESE_TASKS,
        note="Only the language model is quantised; the vision tower stays float. No image task is measured.",
    ),
    "command-a-translate": Recipe(
        "CohereLabs/command-a-translate-08-2025",
        "command-a-translate-08-2025-QEP-1bit",
        {ENGLISH: 0.3, JAPANESE: 0.3, FRENCH: 0.2, ARABIC: 0.2},
        ENGLISH_TASKS + JAPANESE_TASKS,
        note="No translation score is measured by these tasks.",
    ),
    "command-r7b": Recipe(
        "CohereLabs/c4ai-command-r7b-12-2024",
        "c4ai-command-r7b-12-2024-QEP-1bit",
        GENERAL,
        ENGLISH_TASKS + JAPANESE_TASKS,
        num_samples=512,
        note="Small for one bit: expect a large loss, and see `--method factored --bits 2`.",
    ),
}

NameArgument = Annotated[str, typer.Argument(help=f"One of {', '.join(RECIPES)}.")]
ModelOption = Annotated[str | None, typer.Option(help="Use this Hub id or folder instead of the recipe's model.")]
RevisionOption = Annotated[str | None, typer.Option(help="Commit of the model. Left out: that of main, now.")]
PrintOption = Annotated[bool, typer.Option("--print", help="Print the commands and stop.")]


def find(name: str) -> Recipe:
    """The recipe of a name; exits with the list of names if there is none."""
    if name not in RECIPES:
        raise typer.BadParameter(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


@app.command("recipes")
def recipes_command() -> None:
    """All recipes as JSON."""
    typer.echo(json.dumps({name: asdict(recipe) for name, recipe in RECIPES.items()}, indent=2))


@app.command("plan")
def plan_command(
    name: NameArgument,
    model: ModelOption = None,
    revision: RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Passed on to hf-qep plan.")] = False,
    only_print: PrintOption = False,
) -> None:
    """Bytes of the result, peak memory and time of the run, from config.json alone."""
    recipe = find(name)
    plan = ["plan", model or recipe.model, "--bits", f"{recipe.bits:g}", "--method", recipe.method, "--effort", "fast"]
    plan += ["--num-samples", str(recipe.num_samples), "--seq-len", str(recipe.seq_len)]
    plan += ["--revision", revision] if revision else []
    plan += ["--json"] if as_json else []
    carry_out([plan], only_print)


@app.command("run")
def run_command(
    name: NameArgument,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint, its record and its card.")],
    model: ModelOption = None,
    revision: RevisionOption = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration text instead of the recipe's mix.")] = None,
    text: Annotated[str | None, typer.Option(help="Held-out text instead of the recipe's.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks instead of the recipe's; 'none' for none.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration rows instead of the recipe's.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per row instead of the recipe's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    only_print: PrintOption = False,
) -> None:
    """Quantise, evaluate and write the card."""
    recipe = find(name)
    source = model or recipe.model
    pin = revision or (None if only_print or Path(source).is_dir() else commit_of(source))
    words = ["none"] if tasks == "none" else (tasks.split(",") if tasks else list(recipe.tasks))
    quantize = ["quantize", source, "--out", str(out), "--bits", f"{recipe.bits:g}", "--method", recipe.method]
    quantize += ["--dataset", dataset or recipe.dataset, "--num-samples", str(num_samples or recipe.num_samples)]
    quantize += ["--seq-len", str(seq_len or recipe.seq_len), "--device", device, "--effort", "fast"]
    quantize += ["--revision", pin] if pin else []
    evaluate = ["eval", str(out), "--text", text or recipe.held_out, "--device", device, "--speed"]
    evaluate += [] if words == ["none"] else ["--tasks", ",".join(words)]
    evaluate += ["--baseline", source] if Path(source).is_dir() else []
    carry_out([quantize, evaluate, ["card", str(out)]], only_print)


@app.command("push")
def push_command(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(help="Folder that `run` wrote.")],
    namespace: Annotated[str, typer.Option(help="User or organisation that will own the repository.")],
    public: Annotated[bool, typer.Option("--public", help="Visible to all; asks for the licence.")] = False,
    accept_license: Annotated[bool, typer.Option("--accept-license", help="Passed on to hf-qep push.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Passed on to hf-qep push.")] = False,
    only_print: PrintOption = False,
) -> None:
    """Publish the folder under the recipe's name, private unless --public, with the gate of the base model."""
    recipe = find(name)
    repo = f"{namespace}/{recipe.card_name}"
    # Again, because only now the name that readers must load is known.
    card = ["card", str(folder), "--repo-id", repo, "--quantized-by", namespace]
    push = ["push", str(folder), repo]
    push += ["--gated", "auto"] if recipe.gated else []
    push += ["--public"] if public else []
    push += ["--accept-license"] if accept_license else []
    push += ["--dry-run"] if dry_run else []
    carry_out([card, push], only_print)


def commit_of(model: str) -> str:
    """Commit of the branch main of a Hub model."""
    from huggingface_hub import HfApi

    return HfApi().model_info(model).sha


if __name__ == "__main__":
    app()
