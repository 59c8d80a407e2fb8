"""`hf-qep serve`: the OpenAI-compatible server of transformers, with packed checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_qep.cli import output


def serve_command(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or Hub id, packed or float. Left out: each request names what is to be loaded."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    options: Annotated[
        list[str] | None,
        typer.Argument(help="After --, more options of `transformers serve`, such as: -- --continuous-batching."),
    ] = None,
    quiet: output.QuietOption = False,
    as_json: output.JsonOption = False,
) -> None:
    """Serve a checkpoint to OpenAI clients: `transformers serve` where the method qep is known.

    With --json standard output says where it listens, before it does; the server's log goes to standard error.
    """
    from hf_qep.serving import NO_TEMPLATE, chat_template_of, serve

    if model is not None and model.startswith("-"):  # what stood behind -- without a model before it
        model, options = None, [model, *(options or [])]
    chats = chat_template_of(model) if model is not None else None
    if as_json:
        output.print_json({"url": f"http://{host}:{port}/v1", "model": model, "chat_template": chats})
    elif not quiet:
        output.note(f"http://{host}:{port}/v1 once the model is loaded; Ctrl+C ends it.")
    if chats is False and not quiet:
        output.note(f"Note: {NO_TEMPLATE}.")
    serve([*([model] if model is not None else []), "--host", host, "--port", str(port), *(options or [])])
