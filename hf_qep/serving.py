"""`transformers serve` with what a server of packed checkpoints lacks: the method, and sentences instead of code 500.

The server, its addresses and its options are those of transformers (`transformers.cli.serve`); importing this package
makes it load packed weights. Some answers of version 5.23 are of no use to a client and are put right here. A chat with
a model that has no chat template, a model that cannot be had, a message that lacks a field, and a tool call that the
model did not end all give "Internal Server Error". An error in a stream is no JSON if its text has a quote or a line
break. The list of models, made from the Hub cache, lacks the model that is served from a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.extras import require

NEEDED = ("fastapi", "uvicorn", "openai")
NO_TEMPLATE = (
    "this model has no chat template, so it continues text and holds no conversation; use /v1/completions with a prompt"
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
REQUEST_FIELDS = ("messages", "role", "type", "text", "name", "arguments", "function")
"""What the server reads from a request by name without asking whether it is there."""


def serve(arguments: Sequence[str]) -> None:
    """Run `transformers serve` with these command-line arguments in this process, until it is told to stop.

    Raises ExtraMissingError without the packages of the extra `serve`, CheckpointError for a model that cannot be had,
    ConfigError if this version of transformers has no server of the known form, SystemExit for arguments that it
    refuses.
    """
    for module in NEEDED:
        require("serve", module)
    put_right()
    from transformers.cli.transformers import app

    logged = require("serve", "uvicorn.config").LOGGING_CONFIG
    logged["handlers"]["access"]["stream"] = "ext://sys.stderr"  # standard output is for values alone
    try:
        app(["serve", *arguments], prog_name="transformers")
    except OSError as error:  # of the model that is loaded before the server starts
        raise CheckpointError(f"the model cannot be served: {_first_line(error)}") from error


def put_right() -> None:
    """Let every server that transformers builds in this process answer as said above. Calling it again is harmless.

    Raises ConfigError if this version of transformers builds its server elsewhere.
    """
    try:
        from transformers.cli.serving import server, utils
    except ImportError as error:
        raise ConfigError(
            f"this version of transformers has no server that is known here ({error}); install transformers>=5.23"
        ) from error
    if not hasattr(server.build_server, "__wrapped__"):
        server.build_server = _with_answers(server.build_server)
        utils._StreamError.__init__ = _escaped


def chat_template_of(folder: str | Path) -> bool | None:
    """Whether the tokenizer files in a folder bring a chat template; None for what is no folder, such as a Hub id."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    if any((folder / name).exists() for name in TEMPLATE_FILES):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")


def _with_answers(build_server: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(build_server)
    def build(model_manager: Any, *args: Any, **kwargs: Any) -> Any:
        cached = model_manager.get_gen_models
        model_manager.get_gen_models = lambda: listed(model_manager, cached)
        model_manager.load_model_and_processor = _naming_the_model(model_manager.load_model_and_processor)
        app = build_server(model_manager, *args, **kwargs)
        for kind in (ValueError, CheckpointError, KeyError):
            app.exception_handler(kind)(_answer)
        return app

    return build


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _naming_the_model(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_named(name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(name, *args, **kwargs)
        except OSError as error:
            raise CheckpointError(
                f"the model {name.removesuffix('@main')!r} cannot be had: {_first_line(error)}"
            ) from error

    return load_named


def listed(model_manager: Any, cached: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Entries of the model list: the one that is served always, then those loaded, then those of the Hub cache."""
    from huggingface_hub.errors import CacheNotFound

    served = [model_manager.force_model] if model_manager.force_model else []
    loaded = [name.removesuffix("@main") for name in model_manager.loaded_models]
    entries = [{"id": n, "object": "model", "created": 0, "owned_by": ""} for n in dict.fromkeys([*served, *loaded])]
    with suppress(CacheNotFound):  # a machine that never downloaded anything
        entries += [entry for entry in cached() if entry["id"] not in (*served, *loaded)]
    return entries


def _escaped(stream_error: Any, msg: str) -> None:
    """Takes the place of `_StreamError.__init__`, whose text goes between quotes as it is."""
    stream_error.msg = json.dumps(msg)[1:-1]


async def _answer(_request: Any, error: Exception) -> Any:
    """The error as a sentence with the code that fits it; others stay defects of the server."""
    from fastapi.responses import JSONResponse

    if isinstance(error, ValueError) and "chat template" in str(error):
        return JSONResponse({"detail": NO_TEMPLATE}, status_code=400)
    if isinstance(error, ValueError) and "could not parse region" in str(error):
        return JSONResponse({"detail": f"the model's tool call cannot be read: {error}"}, status_code=500)
    if isinstance(error, CheckpointError):
        return JSONResponse({"detail": str(error)}, status_code=404)
    if isinstance(error, KeyError) and error.args[0] in REQUEST_FIELDS:
        return JSONResponse({"detail": f"the request lacks the field `{error.args[0]}`"}, status_code=422)
    raise error
