"""`hf-qep card`: README.md of a measured checkpoint, for the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_qep.cli import output
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.hub.cards.card import Written
    from hf_qep.hub.cards.facts import CardFacts
    from hf_qep.hub.remote import Remote


def card_command(
    folder: Annotated[Path, typer.Argument(help="Folder that quantize has made and eval has measured.")],
    repo_id: Annotated[
        str | None, typer.Option(help="OWNER/NAME it will have on the Hub; the card tells readers to load that.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="OWNER/NAME of the original, if it was quantised from a folder.")
    ] = None,
    base_card: Annotated[
        Path | None,
        typer.Option(help="README.md of the original, or its folder. Left out: asked of the Hub, else of its cache."),
    ] = None,
    quantized_by: Annotated[
        str | None, typer.Option(help="Account that made it. Left out: the owner in --repo-id.")
    ] = None,
    baseline_record: Annotated[
        list[Path] | None,
        typer.Option(
            help="Record of another method on the same original and text (hf_qep_eval.json, or the output of `compare "
            "--json`), shown beside this one; may be repeated."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a card that was written or changed by hand.")
    ] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Write the model card from what was measured: README.md, a plot, and results of registered benchmarks.

    Numbers come from hf_qep_eval.json, hf_qep_manifest.json and hf_qep_samples.json alone; what is not in them is
    called not measured. Licence, gate and languages are those of the original. Nothing is sent anywhere.
    """
    from hf_qep.hub.cards.card import write_card
    from hf_qep.hub.cards.facts import CardOptions, gather

    options = CardOptions(
        repo_id=repo_id,
        quantized_by=quantized_by,
        base_model=base_model,
        base_card=base_card,
        baseline_records=tuple(baseline_record or ()),
    )
    facts = gather(folder, options, remote=_remote(), progress=Progress(quiet or as_json))
    written = write_card(folder, facts, overwrite=overwrite)
    notes = list(written.notes)
    if repo_id is None:
        notes.append("the card tells readers to load the folder's name; give --repo-id for the name on the Hub")
    _show(folder, facts, written, notes, as_json=as_json, quiet=quiet)


def _show(folder: Path, facts: CardFacts, written: Written, notes: list[str], *, as_json: bool, quiet: bool) -> None:
    gate = facts.base.gated or ("auto" if facts.decision.gate else "none")
    files = [written.card, *filter(None, [written.plot]), *written.results]
    if as_json:
        output.print_json(
            {
                "card": str(written.card),
                "files": [str(path) for path in files],
                "base_model": facts.base_id,
                "base_model_verified": facts.base_seen,
                "licence": facts.licence,
                "licence_decision": facts.decision.reason,
                "gate": gate,
                "notes": notes,
            }
        )
        return
    output.print_facts(
        "Card",
        {
            "files": ", ".join(path.relative_to(folder).as_posix() for path in files),
            "original": f"{facts.base_name} ({'the Hub knows it' if facts.base_seen else 'not verified'})",
            "licence": facts.licence,
            "decision": facts.decision.reason,
            "gate": f"{gate}, once it is public" if gate != "none" else gate,
        },
    )
    for sentence in [] if quiet else notes:
        output.note(f"Note: {sentence}")


def _remote() -> Remote | None:
    """The Hub, or None where the user forbids to ask it."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    from hf_qep.hub.remote import Remote

    return Remote()
