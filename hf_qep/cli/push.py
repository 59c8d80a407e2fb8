"""`hf-qep push`: a checked folder to the Hub, private unless asked otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.hub.publish import PushPlan, PushResult

RESUME = "Interrupted. No half push is visible on the Hub; run the same command again, it goes on from here"


def push_command(
    folder: Annotated[
        Path, typer.Argument(help="Folder that quantize, eval and card have filled, or distill train and report.")
    ],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; without OWNER it is your account.")],
    public: Annotated[bool, typer.Option("--public", help="Show it to everybody. Left out: private.")] = False,
    gated: Annotated[
        str | None, typer.Option(help="auto, manual or none. Left out: as the original has it and the licence demands.")
    ] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="You have read the licence and publish under its terms.")
    ] = False,
    revision: Annotated[str, typer.Option(help="Branch to push to; it is made if it is missing.")] = "main",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a repository that holds another model.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Publish a folder: checked first, resumable, read back, never half there. The token comes from `hf auth login`."""
    from hf_qep.hub.publish import PushOptions, execute, plan_push, refuse
    from hf_qep.hub.remote import Remote

    options = PushOptions(
        public=public,
        gated=gated,
        accept_license=accept_license,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        overwrite=overwrite,
    )
    progress = Progress(quiet or as_json)
    remote = Remote()
    plan = plan_push(folder, repo_id, options, remote=remote, progress=progress)
    if dry_run:
        output.show_dry_run(plan, show_plan, as_json)
        return
    for sentence in plan.warnings:
        output.note(f"Warning: {sentence}")
    refuse(plan)
    if not (quiet or as_json):
        output.note(f"Pushing {len(plan.sends)} of {len(plan.files)} files to {_target(plan)}")
    with output.said_when_interrupted(RESUME):
        result = execute(plan, remote=remote, progress=progress)
    if as_json:
        output.print_json({"dry_run": False, **result.to_dict(), "warnings": plan.warnings})
        return
    show_result(result)
    if not quiet:
        at = f" --revision {result.pull_request or revision}" if result.pull_request or revision != "main" else ""
        output.note(f"Check it as a reader would: hf-qep verify {result.repo_id}{at}")


def show_plan(plan: PushPlan) -> None:
    """What a push would do, as tables."""
    size = sum(file.size for file in plan.sends)
    facts: dict[str, Any] = {
        "repository": f"{plan.repo_id} ({'exists' if plan.state else 'would be created'}, on {plan.endpoint})",
        "visibility": plan.visibility,
        "revision": "a pull request against main" if plan.options.create_pr else plan.options.revision,
        "gate": plan.gate or "none",
        "licence": plan.licence,
        "decision": plan.decision,
        "commit message": plan.message,
        "to send": f"{len(plan.sends)} of {len(plan.files)} files, {output.human_bytes(size)}",
    }
    output.print_facts("Dry run: nothing was changed", facts)
    rows = [(f.path, f.size, f.sha256, plan.actions.get(f.path, "not compared")) for f in plan.files]
    rows += [(name, None, None, "delete") for name in sorted(n for n, a in plan.actions.items() if a == "delete")]
    output.print_table("Files", ["name", "bytes", "sha256", "on the Hub"], rows)
    for name in plan.kept:
        output.say(f"* {name!r} on the Hub is left alone")


def show_result(result: PushResult) -> None:
    """What a push did."""
    output.print_facts(
        "Pushed" if result.changed else "Already there; no commit was made",
        {
            "address": result.url,
            "commit": result.commit,
            "visibility": result.visibility,
            "gate": result.gate,
            "files read back": len(result.files),
        },
    )


def _target(plan: PushPlan) -> str:
    where = "a pull request" if plan.options.create_pr else plan.options.revision
    return f"{plan.repo_id} ({plan.visibility}, {where}, gate {plan.gate or 'none'})"
