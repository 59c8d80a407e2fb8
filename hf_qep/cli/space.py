"""`hf-qep space`: a page that compares a 1-bit model with its original, here or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_qep.cli import GuardedCommand, output
from hf_qep.errors import ConfigError
from hf_qep.progress import Progress

if TYPE_CHECKING:
    from hf_qep.hub.space import DeployPlan, DeployResult

app = typer.Typer(
    name="space",
    help="Compare a 1-bit model with its original in the browser: make the page, run it here, put it on the Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BaseOption = Annotated[
    str | None, typer.Option(help="Folder or Hub id of the original. Left out: what the 1-bit model names.")
]
OriginalOption = Annotated[
    str | None, typer.Option(help="live, recorded, off, or auto: live if it fits into memory. Left out: auto.")
]
SpecialistOption = Annotated[
    list[str] | None,
    typer.Option(help="Hub id (with @REVISION) or folder of a student with specialist.json; may be repeated."),
]


@app.command("init", cls=GuardedCommand)
def init_command(
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of the 1-bit model.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the 1-bit model. Left out: pinned by deploy.")] = None,
    base: BaseOption = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the original.")] = None,
    original: OriginalOption = None,
    specialist: SpecialistOption = None,
    title: Annotated[str | None, typer.Option(help="Title of the Space.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Hardware to suggest, such as l4x1.")] = None,
    requirement: Annotated[
        str | None,
        typer.Option(help="Line that brings hf-qep, such as hf-qep==0.1.0. Left out: its source is copied along."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Write the folder of a Space: app, README with metadata, pinned requirements, settings."""
    from hf_qep.hub.space_folder import SpaceReadme, SpaceSettings, write_space

    _check_original(original)
    settings = SpaceSettings(
        model, revision or "", base or "", base_revision or "", original or "", ",".join(specialist or ())
    )
    names = write_space(folder, settings, SpaceReadme(title, hardware, requirement), overwrite=overwrite)
    if as_json:
        output.print_json({"folder": str(folder), "settings": settings.to_variables(), "files": names})
        return
    output.say(f"wrote {len(names)} files to {folder}")
    if not quiet:
        output.note(f"Try it: hf-qep space run {folder}. Put it on the Hub: hf-qep space deploy {folder} OWNER/NAME")


@app.command("run", cls=GuardedCommand)
def run_command(
    target: Annotated[
        str | None,
        typer.Argument(help="Folder of a Space, or folder or Hub id of a 1-bit model. Left out: the bundled model."),
    ] = None,
    base: BaseOption = None,
    original: OriginalOption = None,
    specialist: SpecialistOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port. Left out: the first free one from 7860 on.")] = None,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Start the page on this machine until Ctrl+C. Without a target a small bundled model is quantised first."""
    from hf_qep.cli.space_run import prepare, serve

    _check_original(original)
    launch = prepare(
        target,
        base=base,
        original=original,
        specialists=specialist or (),
        host=host,
        port=port,
        quiet=quiet or as_json,
    )
    if as_json:
        output.print_json({"folder": str(launch.folder), "url": launch.url, "variables": launch.variables})
    elif not quiet:
        output.note(f"Loading the models; then open {launch.url} and stop with Ctrl+C")
    raise typer.Exit(serve(launch, quiet=quiet or as_json))


@app.command("deploy", cls=GuardedCommand)
def deploy_command(
    folder: Annotated[Path, typer.Argument(help="Folder that space init has made.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME of the Space; without OWNER it is your account.")],
    hardware: Annotated[str | None, typer.Option(help="Hardware, such as cpu-basic, zero-a10g or l4x1.")] = None,
    public: Annotated[
        bool | None, typer.Option("--public/--private", help="Who sees it. Left out: as it is; a new one is private.")
    ] = None,
    secret_from_env: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME=VARIABLE: set the secret NAME to what this environment variable holds."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the Space runs.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.", min=0)] = 1800,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")] = False,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Create or update the Space, set its variables, wait until it runs, read everything back."""
    from hf_qep.hub.remote import Remote
    from hf_qep.hub.space import DeployOptions, deploy, plan_deploy, refuse

    secrets = dict(_secret(text) for text in secret_from_env or [])
    remote = Remote()
    options = DeployOptions(hardware, public, secrets, wait, timeout)
    plan = plan_deploy(folder, repo_id, options, remote=remote)
    if dry_run:
        output.show_dry_run(plan, _show_plan, as_json)
        return
    for sentence in plan.warnings:
        output.note(f"Warning: {sentence}")
    refuse(plan)
    if not (quiet or as_json):
        output.note(f"Deploying {len(plan.sends)} of {len(plan.files)} files to {plan.url}")
    with output.said_when_interrupted("Interrupted. Run the same command again, it goes on from here"):
        result = deploy(plan, remote=remote, progress=Progress(quiet or as_json))
    if as_json:
        output.print_json({"dry_run": False, **result.to_dict(), "warnings": plan.warnings})
        return
    _show_result(result)


def _check_original(original: str | None) -> None:
    allowed = ("auto", "live", "recorded", "off")
    if original is not None and original not in allowed:
        raise ConfigError(f"--original {original!r} is not known; use one of {', '.join(allowed)}")


def _secret(text: str) -> tuple[str, str]:
    """(name, value) of NAME or NAME=VARIABLE; the value never stands on the command line."""
    name, equals, variable = text.partition("=")
    value = os.environ.get(variable if equals else name, "")
    if not name or not value:
        raise ConfigError(f"--secret-from-env {name!r}: the environment variable {variable or name!r} is not set")
    return name, value


def _show_plan(plan: DeployPlan) -> None:
    facts: dict[str, Any] = {
        "Space": f"{plan.repo_id} ({'exists' if plan.state else 'would be created'}, on {plan.endpoint})",
        "visibility": "public" if plan.public else "private",
        "hardware": plan.options.hardware,
        "variables": ", ".join(f"{n}={v}" for n, v in plan.variables.items()) or None,
        "secrets to set": ", ".join(sorted(plan.options.secrets)) or None,
        "files to send": f"{len(plan.sends)} of {len(plan.files)}",
        "files to delete": ", ".join(plan.deletes) or None,
    }
    output.print_facts("Dry run: nothing was changed", facts)


def _show_result(result: DeployResult) -> None:
    output.print_facts(
        "Deployed" if result.changed else "Already there; no commit was made",
        {
            "address": result.url,
            "commit": result.commit,
            "visibility": result.visibility,
            "stage": result.stage or "not waited for",
            "hardware": result.hardware,
            "variables": ", ".join(f"{n}={v}" for n, v in result.variables.items()) or None,
            "secrets": ", ".join(result.secrets) or None,
            "files read back": result.files,
        },
    )
