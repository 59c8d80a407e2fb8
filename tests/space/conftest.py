"""A tiny model that also writes hostile markup, its 1-bit version with a record, and the page that compares them.

The Space is a folder of plain modules beside app.py, so that folder is put on the path, behind everything else.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.cli.test_commands import run
from tests.loopback_hub.fixtures import hub_api, loopback_hub
from tests.tiny_models import VOCAB, build_model, build_tokenizer

__all__ = ["hub_api", "loopback_hub"]

SPACE = Path(__file__).resolve().parents[2] / "spaces" / "compare"
if str(SPACE) not in sys.path:
    sys.path.append(str(SPACE))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# A proxy of the machine must not be asked for the page itself.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

HOSTILE = (
    '<img src=x onerror="window.hit=1">',
    "<script>window.hit=1</script>",
    "${window.hit=1}",
    "{{value}}`",
    "</div></article><h1>",
    "<b>&amp;",
)
"""What some tokens of the tiny model stand for; it writes them as often as letters."""
LONG = 4000
"""New tokens that take several seconds."""


def hostile_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer of the tests, whose free ids are markup."""
    plain = build_tokenizer()
    described = json.loads(plain.backend_tokenizer.to_str())
    names = described["model"]["vocab"]
    for number in range(len(names), VOCAB):
        names[f"{HOSTILE[number % len(HOSTILE)]}{chr(0x2160 + number - 100)}"] = number
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    core = Tokenizer.from_str(json.dumps(described))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=8192, **special)
    tokenizer.chat_template = plain.chat_template
    return tokenizer


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """(original, 1-bit model with record and samples); both write without end."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("space-models")
    model = build_model("llama")
    for config in (model.config, model.generation_config):
        config.eos_token_id = None
    model.config.max_position_embeddings = 8192
    original, out = work / "tiny-llama", work / "tiny-llama-1bit"
    model.save_pretrained(original)
    hostile_tokenizer().save_pretrained(original)
    (work / "text.txt").write_text("He walked down to the river and sat upon a stone. " * 12)
    small = ("--num-samples", 4, "--seq-len", 16, "--method", "rtn", "--dtype", "float32", "--quiet")
    for words in (
        ("quantize", original, "--out", out, "--dataset", work / "text.txt", *small),
        ("eval", out, "--baseline", original, "--text", work / "text.txt", "--window", 64, "--max-tokens", 300, "-q"),
    ):
        done = run(*words)
        assert done.exit_code == 0, (done.output, done.exception)
    return original, out


@pytest.fixture(scope="session")
def settings_for(pair) -> Callable[..., Any]:
    """`settings_for(**changes)`: settings that compare the tiny pair."""
    from settings import Settings

    original, one_bit = pair
    usual = {"model_id": str(one_bit), "base_id": str(original), "device": "cpu"}
    return lambda **changes: Settings(**{**usual, "max_new_tokens": LONG, "max_input_tokens": 60} | changes)


@pytest.fixture(scope="session")
def live_models(settings_for) -> Any:
    """Both models of the tiny pair, loaded."""
    from models import Models

    return Models(settings_for())


@pytest.fixture
def forwards(live_models) -> Iterator[list[int]]:
    """Grows by one with every step of either model: shows that a generation ended early and not by itself."""
    steps: list[int] = []
    models = (live_models.original.model, live_models.one_bit.model)
    hooks = [model.register_forward_hook(lambda *call: steps.append(1)) for model in models]
    yield steps
    for hook in hooks:
        hook.remove()


@contextmanager
def served(models: Any, specialists: Any = ()) -> Iterator[str]:
    """Address of a page that runs in a thread of this process."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[space]'")
    import lanes
    from page import ON_LOAD, STYLE, build, theme
    from stops import Stops

    stops = Stops()

    def work(request: Any, ticket: int) -> Iterator[Any]:
        yield from lanes.compare(models, request, lambda: stops.is_stopped(ticket))

    page = build(models, stops, work, specialists)
    looks = {"theme": theme(), "css_paths": STYLE, "js": ON_LOAD, "footer_links": ["api"], "ssr_mode": False}
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", share=False, **looks)
    try:
        yield url
    finally:
        page.close()


def generations() -> list[str]:
    """Names of the threads that are writing tokens now."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("generate-")]


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether `condition` becomes true; the limit is only for defects."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return True
        waiting.wait(0.05)
    return condition()
