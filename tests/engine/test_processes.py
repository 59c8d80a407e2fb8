"""Several processes end with the bytes of one, and end together."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from datetime import timedelta
from importlib import import_module

import pytest
import torch
from torch.distributed import TCPStore

from hf_qep.cli import app
from hf_qep.engine.together.launch import joined, launched, own_device
from hf_qep.engine.unfinished import Unfinished
from hf_qep.errors import ConfigError, NonFiniteError
from tests.clean_process import exit_codes
from tests.engine.test_streaming import config, files, streamed
from tests.tiny_models import build_tokenizer

RECIPES = {"llama": {"method": "sign", "batch_size": 1, "embedding_bits": 8}, "qwen3_moe": {"method": "rtn"}}
PATIENCE = 90


def together(count, folder, out, recipe, plans=(), patience=PATIENCE, **options):
    """Exit codes of processes that do a job together, and the errors they end with, as (type, message)."""
    plans = list(plans) + [None] * (count - len(plans))
    said = [out.with_name(f"{out.name}-said-{index}.json") for index in range(count)]
    calls = [(folder, out, recipe, plan, place, options) for plan, place in zip(plans, said, strict=True)]
    codes = launch(do_part, calls, patience)
    errors = [tuple(json.loads(place.read_text())) if place.exists() else None for place in said]
    for place in said:
        place.unlink(missing_ok=True)
    return codes, errors


def launch(target, calls, patience=PATIENCE, count=None):
    """Exit codes of calls in processes with the environment that torchrun makes, and a store that they meet at. count:
    of processes, if it is not that of the calls. patience: of each with the others."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    parts = [(index, count or len(calls), store.port, patience, target, call) for index, call in enumerate(calls)]
    return exit_codes(launched_part, parts, PATIENCE)


def launched_part(index, count, port, patience, target, call):
    names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    names |= {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_QEP_PATIENCE": patience,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    target(*call)


def do_part(folder, out, recipe, plan, said, options):
    if plan is not None:
        disturb(*plan)
    try:
        with joined(torch.device("cpu")) as processes:
            streamed(folder, out, recipe, processes=processes, **options)
    except Exception as error:
        said.write_text(json.dumps([type(error).__name__, str(error)]))
        raise SystemExit(2) from None


def disturb(place, calls, what):
    """Make a call of a function fail, or kill the process instead; after so many calls that do not."""
    module, _, name = place.rpartition(".")
    owner = import_module(module) if module.islower() else import_module(module.rpartition(".")[0]).Stream
    original, left = getattr(owner, name), [calls]

    def counting(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            return original(*args, **kwargs)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            left[0] = 10**9
            time.sleep(9)
            return original(*args, **kwargs)
        raise what

    setattr(owner, name, counting)


def recipe_of(family):
    return config(family, **{"batch_size": 1} | RECIPES[family])


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_model):
    """family -> (folder of a float model, what one process makes of it)"""
    found = {}
    for family in RECIPES:
        folder = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(folder / "m")
        streamed(folder / "m", folder / "out", recipe_of(family))
        found[family] = folder / "m", files(folder / "out")
    return found


@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("llama", 3), ("qwen3_moe", 2)])
def test_the_files_are_those_of_one_process(source, tmp_path, family, count):
    folder, expected = source[family]
    codes, errors = together(count, folder, tmp_path / "out", recipe_of(family), stream_budget=5000)
    assert codes == [0] * count and errors == [None] * count
    assert files(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLS = {
    "the first, in the second block": (0, ("hf_qep.engine.block._solve_linear", 2, "kill"), 1),
    "the second, in the second block": (1, ("hf_qep.engine.block._solve_linear", 5, "kill"), 2),
    "the second, in the first block": (1, ("hf_qep.engine.block._observe_batches", 2, "kill"), 2),
    "the second, while streams are saved": (1, ("hf_qep.engine.streams.Stream.like", 4, "kill"), 2),
}


@pytest.mark.parametrize("name", KILLS)
def test_when_one_is_killed_the_other_ends_and_any_number_goes_on(source, tmp_path, name):
    index, plan, count = KILLS[name]
    folder, expected = source["llama"]
    began = time.monotonic()
    codes, errors = together(2, folder, tmp_path / "out", recipe_of("llama"), [None] * index + [plan])
    assert codes[index] == -signal.SIGKILL and codes[1 - index] == 2
    kind, message = errors[1 - index]
    assert kind == "LostProcessError" and "--resume" in message and "block" in message
    assert time.monotonic() - began < 60
    assert not (tmp_path / "out").exists()
    assert all(path.name == ".out.unfinished" for path in tmp_path.iterdir())
    if "second block" in name:
        assert Unfinished(tmp_path / "out").latest()[0] == 1
    assert together(count, folder, tmp_path / "out", recipe_of("llama"), resume=True)[0] == [0] * count
    assert files(tmp_path / "out") == expected


def test_one_that_says_nothing_is_given_up(source, tmp_path):
    plan = ("hf_qep.engine.block._solve_linear", 5, "hang")
    codes, errors = together(2, source["llama"][0], tmp_path / "out", recipe_of("llama"), [None, plan], patience=4)
    assert codes == [2, 2] and "process 0 of 2 lost another one in block 2 of 2" in errors[0][1]
    assert Unfinished(tmp_path / "out").latest()[0] == 1


def test_one_that_waits_for_the_others_in_vain_says_so(source, tmp_path):
    call = (source["llama"][0], tmp_path / "out", recipe_of("llama"), None, tmp_path / "said", {})
    assert launch(do_part, [call], patience=2, count=2) == [2]
    kind, message = json.loads((tmp_path / "said").read_text())
    assert kind == "LostProcessError" and "the 2 processes have not found each other" in message


FAILURES = {
    "a linear": (1, ("hf_qep.engine.block.weighted_error", 5, NonFiniteError("it is NaN")), "NonFiniteError"),
    "the disk": (0, ("hf_qep.engine.tensor_files.header_of", 4, OSError(errno.ENOSPC, "Full")), "DiskSpaceError"),
    "the output": (0, ("hf_qep.cli.job.save_checkpoint", 0, OSError(errno.EIO, "Broken")), "OSError"),
    "a defect": (1, ("hf_qep.engine.block._put_in", 2, KeyError("x")), "LostProcessError"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_goes_wrong_in_one_ends_all_with_the_same_words(source, tmp_path, name):
    index, plan, kind = FAILURES[name]
    folder, expected = source["llama"]
    codes, errors = together(2, folder, tmp_path / "out", recipe_of("llama"), [None] * index + [plan])
    assert codes == [2, 2]
    assert errors[1 - index][0] == kind
    if name == "a defect":
        assert errors[index][0] == "KeyError" and "process 1 of 2 failed in block 1 of 2, KeyError: 'x'" in errors[0][1]
    else:
        said = "no space is left on the disk" if kind == "DiskSpaceError" else str(plan[2])
        assert errors[0] == errors[1] and said in errors[0][1]
    assert not (tmp_path / "out").exists()
    assert set(os.listdir(tmp_path)) <= {".out.unfinished"}
    streamed(folder, tmp_path / "out", recipe_of("llama"), resume=True)
    assert files(tmp_path / "out") == expected


def test_what_cannot_be_shared_is_refused(source, tmp_path):
    folder, _ = source["llama"]
    codes, errors = together(2, folder, tmp_path / "out", config(method="auto"))
    assert codes == [2, 2] and errors[0] == errors[1]
    assert "2 processes cannot share this job: method `auto` compares all layers first" in errors[0][1]
    codes, errors = together(2, folder, tmp_path / "out", config(batch_size=8))
    assert codes == [2, 2] and "2 processes cannot share 1 batches" in errors[1][1]
    assert list(tmp_path.iterdir()) == []


def test_environments_that_are_half_there_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == 1
    with joined(torch.device("cpu")) as processes:
        assert (processes.count, processes.first, processes.gather("x")) == (1, True, ["x"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is not set"):
        launched()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ConfigError, match="--multi_gpu"):
        launched()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert own_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert own_device(torch.device("cpu")) == torch.device("cpu")


def print_part(words, place):
    with place.open("w") as file, contextlib.redirect_stdout(file):
        app(words)


def test_only_the_first_prints_a_result(source, tmp_path):
    folder, _ = source["llama"]
    (tmp_path / "text.txt").write_text("He walked down to the river in the morning and sat upon a stone. " * 8)
    build_tokenizer().save_pretrained(folder)
    words = ["quantize", folder, "--effort", "fast", "--method", "rtn", "--dataset", tmp_path / "text.txt", "--json"]
    words += ["--num-samples", 8, "--seq-len", 16, "--batch-size", 2, "--out", tmp_path / "out"]
    places = [tmp_path / "first", tmp_path / "second"]
    for expected in (0, 2):  # the second time the folder is there
        assert launch(print_part, [(list(map(str, words)), place) for place in places]) == [expected] * 2
        assert ("error" in json.loads(places[0].read_text())) is bool(expected)
        assert places[1].read_text() == ""
