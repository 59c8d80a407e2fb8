"""A job that was killed, anywhere, goes on and ends with the same bytes as one that was not."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
from collections import namedtuple
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_qep import files as files_module
from hf_qep.engine import assembly, block, streaming, tensor_files, unfinished, writer
from hf_qep.engine.streams import Stream
from hf_qep.engine.unfinished import Unfinished
from hf_qep.errors import DiskSpaceError, OutputExistsError, ResumeError
from tests.clean_process import exit_code
from tests.engine.test_streaming import config, files, rows, streamed

RECIPE = {"method": "rtn"}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_model):
    """(folder of a float model with two blocks, what an undisturbed job makes of it)"""
    folder = tmp_path_factory.mktemp("source")
    tiny_model("llama").save_pretrained(folder / "m")
    streamed(folder / "m", folder / "out", config(**RECIPE))
    return folder / "m", files(folder / "out")


def killed(place: tuple[object, str], call: int, folder: Path, out: Path, **options) -> bool:
    """Run the job in a child that is killed instead of making call number `call` of a function; whether it was."""
    owner, name = place
    owner = owner.__name__ if isinstance(owner, ModuleType) else owner  # a module cannot be pickled
    return exit_code(run_until, owner, name, call, folder, out, options) == -signal.SIGKILL


def run_until(owner: Any, name: str, calls: int, folder: Path, out: Path, options: dict[str, Any]) -> None:
    owner = import_module(owner) if isinstance(owner, str) else owner
    original, left = getattr(owner, name), [calls]

    def counting(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return original(*args, **kwargs)

    setattr(owner, name, counting)
    streamed(folder, out, config(**RECIPE), **options)


PLACES = [
    ((block, "_float_pass"), 0),
    ((block, "_observe"), 2),
    ((block, "_solve_linear"), 3),
    ((streaming, "as_stored"), 0),
    ((unfinished, "flush"), 0),  # the first block is written, but has no name yet
    ((Stream, "save"), 1),  # one of its streams is
    ((unfinished, "flush"), 4),  # all is written, but it does not count yet
    ((block, "_float_pass"), 1),
    ((block, "_solve_linear"), 5),  # from here on the first block is done
    ((unfinished, "flush"), 1),
    ((streaming, "save_file"), 0),
    ((block, "_observe"), 0),
    ((Stream, "save"), 0),
    ((streaming, "forward_rest"), 0),
    ((assembly, "_write"), 0),
    ((writer, "file_table"), 0),
    ((files_module, "_swap"), 0),
]
"""Function and call at which the process dies, one after the other."""


def test_a_job_that_is_killed_again_and_again_ends_with_the_same_files(source, tmp_path):
    folder, expected = source
    done = []
    for number, (place, call) in enumerate(PLACES):
        assert killed(place, call, folder, tmp_path / "out", resume=number > 0), place
        assert not (tmp_path / "out").exists()
        found = Unfinished(tmp_path / "out").latest()
        done.append(found[0] if found else 0)
    assert done == sorted(done) and set(done) == {0, 1, 2}
    streamed(folder, tmp_path / "out", config(**RECIPE), resume=True)
    assert files(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_after_the_last_step_leaves_a_job_that_ends_at_once(source, tmp_path):
    folder, expected = source
    assert killed((Unfinished, "remove"), 1, folder, tmp_path / "out")
    assert files(tmp_path / "out") == expected
    streamed(folder, tmp_path / "out", config(**RECIPE), resume=True)
    assert files(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputExistsError, match="not empty"):
        streamed(folder, tmp_path / "out", config(**RECIPE), resume=True)


@pytest.mark.parametrize("tensors", [3, 17, 20, 30, 50])
def test_a_kill_while_a_file_is_written_leaves_no_half_file_under_a_name(source, tmp_path, tensors):
    folder, expected = source
    assert killed((tensor_files, "_bytes"), tensors, folder, tmp_path / "out")
    streamed(folder, tmp_path / "out", config(**RECIPE), resume=True)
    assert files(tmp_path / "out") == expected


def test_activations_on_the_disk_change_nothing(source, tmp_path):
    folder, expected = source
    assert killed((block, "_solve_linear"), 9, folder, tmp_path / "out", stream_budget=0)
    streamed(folder, tmp_path / "out", config(**RECIPE), resume=True, stream_budget=0)
    assert files(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail_in_second_block(monkeypatch, error):
    original, left = block._solve_linear, [9]

    def failing(*args):
        left[0] -= 1
        if not left[0]:
            raise error
        return original(*args)

    monkeypatch.setattr(block, "_solve_linear", failing)


@pytest.fixture
def interrupted(source, tmp_path, monkeypatch):
    """Folder of the model and of the output of a job that failed in its second block."""
    with monkeypatch.context() as patch:
        fail_in_second_block(patch, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(DiskSpaceError, match="no space is left.*--resume"):
            streamed(source[0], tmp_path / "out", config(**RECIPE), stream_budget=0)
    return source[0], tmp_path / "out"


def test_an_error_keeps_the_blocks_that_are_done_and_nothing_else(source, interrupted):
    folder, out = interrupted
    kept = {path.name for path in Unfinished(out).folder.iterdir()}
    assert kept == {"job.json", "calibration", "block-00000.safetensors", "after-00001"}
    streamed(folder, out, config(**RECIPE), resume=True)
    assert files(out) == source[1] and not Unfinished(out).folder.exists()


def test_a_disk_without_room_is_noticed_before_the_first_block(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 30_000))
    monkeypatch.setattr(block, "_float_pass", lambda *_: 1 / 0)
    with pytest.raises(DiskSpaceError, match="0.00 GB are free"):
        streamed(source[0], tmp_path / "out", config(**RECIPE))
    assert list(tmp_path.iterdir()) == []


def test_an_error_before_the_first_block_is_done_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(block, "_observe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streamed(source[0], tmp_path / "out", config(**RECIPE))
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_is_neither_used_nor_dropped_unasked(source, interrupted):
    folder, out = interrupted
    with pytest.raises(OutputExistsError, match="--resume.*--overwrite"):
        streamed(folder, out, config(**RECIPE))
    streamed(folder, out, config(**RECIPE), overwrite=True)
    assert files(out) == source[1] and not Unfinished(out).folder.exists()


def test_a_job_that_was_never_begun_is_begun(source, tmp_path):
    streamed(source[0], tmp_path / "out", config(**RECIPE), resume=True)
    assert files(tmp_path / "out") == source[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"damping": 0.1}, r"recipe\.damping \(0.03 then, 0.1 now\)"),
        ({"seed": 5, "method": "gptq"}, r'recipe\.method \("rtn" then, "gptq" now\), recipe\.seed'),
        ({"dataset": {"input_ids": rows("llama")["input_ids"].flip(0)}}, r"calibration \("),
    ],
)
def test_another_job_is_refused_and_the_difference_is_named(interrupted, change, said):
    folder, out = interrupted
    with pytest.raises(ResumeError, match=said):
        streamed(folder, out, config(**RECIPE | change), resume=True)
    assert Unfinished(out).latest()[0] == 1


def test_two_processes_do_not_work_on_one_job(source, interrupted):
    folder, out = interrupted
    other = Unfinished(out)
    with (other.folder / "job.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ResumeError, match="another process"):
                streamed(folder, out, config(**RECIPE), **options)
    streamed(folder, out, config(**RECIPE), resume=True)
    assert files(out) == source[1]


def test_other_weights_are_refused(interrupted, tiny_model, tmp_path):
    _, out = interrupted
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ResumeError, match=r"model\.files\.model\.safetensors"):
        streamed(tmp_path / "other", out, config(**RECIPE), resume=True)


def test_other_code_is_refused(interrupted, monkeypatch):
    monkeypatch.setattr("hf_qep.engine.fingerprint._code", lambda: "0" * 64)
    with pytest.raises(ResumeError, match=r"code\.hf_qep"):
        streamed(*interrupted, config(**RECIPE), resume=True)


def test_a_finished_block_that_is_gone_is_named(interrupted):
    folder, out = interrupted
    (Unfinished(out).folder / "block-00000.safetensors").unlink()
    with pytest.raises(ResumeError, match="block-00000"):
        streamed(folder, out, config(**RECIPE), resume=True)


def test_rows_that_the_model_wrote_are_kept(source, tmp_path, monkeypatch):
    written = []

    def write(model, tokenizer, *, num_rows, seq_len, seed):
        written.append(num_rows)
        return rows("llama")["input_ids"]

    monkeypatch.setattr("hf_qep.engine.calibration.sample_rows", write)
    recipe = config(**RECIPE, seq_len=16)
    recipe.dataset = None
    with monkeypatch.context() as patch:
        fail_in_second_block(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            streamed(source[0], tmp_path / "out", recipe)
    streamed(source[0], tmp_path / "out", recipe, resume=True)
    assert len(written) == 1
    weights = "model.safetensors"
    assert files(tmp_path / "out")[0][weights] == source[1][0][weights]


@pytest.mark.parametrize("place", [("forward_rest", "residence"), ("distill_model", "job"), ("finish_loading", "job")])
def test_a_kill_behind_the_last_block_goes_on_with_what_is_left(tiny_model, tmp_path, monkeypatch, place):
    name, module = place
    tiny_model("llama").save_pretrained(tmp_path / "m")
    recipe = config(**RECIPE, distill_epochs=1, distill_signs=False, embedding_bits=8)
    streamed(tmp_path / "m", tmp_path / "out", recipe)
    with monkeypatch.context() as patch:
        patch.setattr(f"hf_qep.engine.{module}.{name}", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streamed(tmp_path / "m", tmp_path / "again", recipe)
    assert Unfinished(tmp_path / "again").latest()[0] == 2
    streamed(tmp_path / "m", tmp_path / "again", recipe, resume=True)
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_a_mixture_of_experts_goes_on_as_well(tiny_model, tmp_path, monkeypatch):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "m")
    recipe = config("qwen3_moe", method="rtn", embedding_bits=8)
    streamed(tmp_path / "m", tmp_path / "out", recipe)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "save_file", failing_on_second_call(streaming.save_file))
        with pytest.raises(KeyboardInterrupt):
            streamed(tmp_path / "m", tmp_path / "again", recipe)
    streamed(tmp_path / "m", tmp_path / "again", recipe, resume=True)
    assert files(tmp_path / "again") == files(tmp_path / "out")


def failing_on_second_call(original):
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return failing
