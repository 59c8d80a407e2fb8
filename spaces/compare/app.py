"""A Space that lets an original model and its 1-bit version answer the same prompt, side by side.

Start it with `hf-qep space run`, or `MODEL_ID=... python app.py`. The variables are described in settings.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

try:  # on ZeroGPU this must come before torch
    from spaces import GPU as lend_gpu
except ImportError:

    def lend_gpu(duration: Any = None) -> Any:
        """Elsewhere there is nothing to lend."""
        return lambda function: function


import lanes
from models import Models
from page import ON_LOAD, STYLE, build, theme
from prompts import Request
from settings import SettingsError, read_settings
from specialist_files import load_specialists
from stops import Stops

import hf_qep  # noqa: F401  (makes 1-bit checkpoints known to transformers)

START_SECONDS, SECONDS_PER_TOKEN = 20, 0.15
"""What ZeroGPU is asked for, per lane; a visitor's quota pays for it."""

try:
    settings = read_settings()
except SettingsError as error:
    sys.exit(f"Error: {error}")
models = Models(settings)
stops = Stops()


def seconds_needed(request: Request, ticket: int) -> int:
    """How long the accelerator is needed for this request."""
    count = 2 if models.mode == "live" else 1
    return int(START_SECONDS + count * request.max_new_tokens * SECONDS_PER_TOKEN)


@lend_gpu(duration=seconds_needed)
def run(request: Request, ticket: int) -> Iterator[lanes.Lanes]:
    """Both lanes of one request; on ZeroGPU this runs in another process."""
    yield from lanes.compare(models, request, lambda: stops.is_stopped(ticket))


page = build(models, stops, run, load_specialists(settings))

if __name__ == "__main__":
    page.launch(
        theme=theme(),
        css_paths=STYLE,
        js=ON_LOAD,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        footer_links=["api"],
    )
