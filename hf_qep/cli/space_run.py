"""Start the page of `spaces/compare` on this machine, in a process of its own."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qep.cli import output
from hf_qep.errors import ConfigError, SpaceError
from hf_qep.extras import require
from hf_qep.files import bundled

FIRST_PORT, PORTS = 7860, 100
DEMO_SAMPLES, DEMO_SEQ_LEN, DEMO_WINDOW = 32, 128, 256


@dataclass(frozen=True)
class Launch:
    """A page that is about to start. folder: where app.py lies. variables: what it is told by the environment."""

    folder: Path
    variables: dict[str, str]
    host: str
    port: int

    @property
    def url(self) -> str:
        """Where it will be found."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"


def prepare(
    target: str | None,
    *,
    base: str | None,
    original: str | None,
    host: str,
    port: int | None,
    quiet: bool,
    specialists: Sequence[str] = (),
) -> Launch:
    """Find the page and what it compares; without a target quantise the bundled model into the cache.

    Raises ExtraMissingError without gradio, SpaceError if there is no free port.
    """
    require("space", "gradio")
    offered = ",".join(str(Path(one).resolve()) if Path(one).is_dir() else one for one in specialists)
    variables = {"BASE_ID": base or "", "ORIGINAL": original or "", "SPECIALISTS": offered}
    folder = bundled("spaces") / "compare"
    if target is None:
        from hf_qep.cli.demo import DEMO_MODEL

        variables["MODEL_ID"] = str(demo_checkpoint(quiet=quiet))
        variables["BASE_ID"] = base or str(DEMO_MODEL)
    elif (Path(target) / "app.py").is_file():
        folder = Path(target).resolve()
    else:
        variables["MODEL_ID"] = str(Path(target).resolve()) if Path(target).is_dir() else target
        if base and Path(base).is_dir():
            variables["BASE_ID"] = str(Path(base).resolve())
    given = {name: value for name, value in variables.items() if value}
    return Launch(folder, given, host, port if port is not None else _free_port(host))


def serve(launch: Launch, *, quiet: bool) -> int:
    """Run the page until it ends; returns its exit code, 0 after Ctrl+C."""
    environment = {
        **os.environ,
        **launch.variables,
        "GRADIO_SERVER_NAME": launch.host,
        "GRADIO_SERVER_PORT": str(launch.port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    silent = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=launch.folder, env=environment, stdout=silent or sys.stderr
    )

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt  # a page without its command would be left behind

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=30)


def demo_checkpoint(*, quiet: bool) -> Path:
    """The bundled model in one bit, with its record, in the cache; made once per version."""
    from huggingface_hub import constants

    from hf_qep import __version__

    folder = Path(constants.HF_HOME) / "hf_qep" / __version__ / "demo-model-1bit"
    if (folder / "hf_qep_eval.json").is_file():
        return folder
    if not quiet:
        output.note("Quantising the bundled 2.75M-parameter model to one bit; once, less than a minute")
    _make_demo(folder, quiet=quiet)
    return folder


def _make_demo(folder: Path, *, quiet: bool) -> None:
    import copy

    from hf_qep.cli.demo import DEMO_MODEL, HELD_OUT, NAME
    from hf_qep.cli.job import quantize_and_save
    from hf_qep.config import QepConfig
    from hf_qep.engine.calibration import read_texts
    from hf_qep.engine.source import load_float_model
    from hf_qep.evaluation.pair import EvalOptions, evaluate_pair
    from hf_qep.evaluation.samples import record_samples
    from hf_qep.progress import Progress

    float_model, tokenizer = load_float_model(DEMO_MODEL)
    stored_as = float_model.dtype
    config = QepConfig(method="sign", num_samples=DEMO_SAMPLES, seq_len=DEMO_SEQ_LEN)
    saved = quantize_and_save(
        copy.deepcopy(float_model).float(),
        tokenizer,
        config,
        folder,
        base_model=NAME,
        base_folder=DEMO_MODEL,
        stored_as=stored_as,
        overwrite=True,
        progress=Progress(quiet),
    )
    texts = read_texts(str(HELD_OUT))
    record = evaluate_pair(
        float_model,
        saved.reloaded,
        tokenizer,
        texts,
        options=EvalOptions(window=DEMO_WINDOW),
        source=HELD_OUT.name,
        subject_name=NAME + "-1bit",
        baseline_name=NAME,
        subject_folder=folder,
        baseline_folder=DEMO_MODEL,
        command=None,
    )
    samples = record_samples(float_model, saved.reloaded, tokenizer, texts, record)
    if samples is not None:
        samples.write(folder)
    record.write(folder)  # last: its presence says that the folder is whole


def _free_port(host: str) -> int:
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise ConfigError(f"--host {host!r} is no address of this machine") from error
        return port
    raise SpaceError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free; choose one with --port")
