"""A Hub model whose weight files come one by one, may go again, and fail in every way that files and networks have."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from hf_qep.cli.job import stream_and_save
from hf_qep.engine import assembly, streaming, unfinished
from hf_qep.engine.on_demand import load_on_demand
from hf_qep.engine.remote import cache as hub_cache
from hf_qep.engine.remote import files as hub_files
from hf_qep.engine.remote import shards as hub_shards
from hf_qep.engine.remote.shards import open_shards
from hf_qep.engine.shards import Shards
from hf_qep.engine.tensor_files import TensorFile
from hf_qep.engine.unfinished import Unfinished
from hf_qep.errors import CheckpointError, ConfigError, DiskSpaceError
from tests.engine.test_streaming import config, files, streamed
from tests.loopback_hub.fixtures import loopback_hub

__all__ = ["loopback_hub"]
REPO = "acme/tiny"


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_model):
    """(folder of a model of three blocks and several weight files, what an undisturbed job makes of it)"""
    folder = tmp_path_factory.mktemp("source")
    tiny_model("cohere2").save_pretrained(folder / "m", max_shard_size="60KB")
    streamed(folder / "m", folder / "out", config("cohere2"))
    return folder / "m", files(folder / "out")[0]


@pytest.fixture(autouse=True)
def without_waiting():
    with pytest.MonkeyPatch.context() as patch:  # not `monkeypatch`, which would then end after the Hub
        patch.setattr(hub_files, "PAUSES", (0.0, 0.0))
        patch.setattr(hub_cache, "LOOK_SECONDS", 0.01)
        patch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here
        yield


@pytest.fixture
def hub(loopback_hub, source):
    content = {path.name: path.read_bytes() for path in source[0].iterdir()}
    loopback_hub.add_repo(REPO, files=content, card={"license": "mit"})
    return loopback_hub


def job(out: Path, revision=None, drop=False, resume=False, **recipe):
    """A streaming job of the model on the Hub, as the command does it."""
    shards = open_shards(REPO, revision, drop=drop, account=Unfinished(out).shards)
    model, blocks, tokenizer = load_on_demand(shards.folder, shards=shards)
    origin = {"base_model": REPO, "base_folder": shards.folder}
    return stream_and_save(model, blocks, tokenizer, config("cohere2", **recipe), out, resume=resume, **origin)


def index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def shards_of(folder: Path, block: int) -> set[str]:
    return {shard for name, shard in index(folder).items() if f".layers.{block}." in name}


def only_of(folder: Path, block: int) -> str:
    """A weight file that only this block needs."""
    others = {shard for name, shard in index(folder).items() if f".layers.{block}." not in name}
    return sorted(shards_of(folder, block) - others)[0]


def cached(hub) -> set[str]:
    return {path.name for path in hub.home.rglob("snapshots/*/*.safetensors")}


def content_path(source, name: str) -> str:
    """Of a weight file at the storage host."""
    return f"/content/{hashlib.sha256((source[0] / name).read_bytes()).hexdigest()}"


def downloads(hub, source) -> list[str]:
    """Weight files in the order in which they were brought; headers are not asked for by HEAD."""
    return [path.rpartition("/")[2] for method, path, _ in hub.log if method == "HEAD" and path.endswith("tensors")]


def as_it_was(hub, *faults):
    for fault in faults:
        fault.times = 0


def test_weight_files_come_when_they_are_needed(hub, source, tmp_path, monkeypatch):
    folder, expected = source
    at_start, behind = [], []
    begin, durable = hub_shards.HubShards.begin, hub_shards.HubShards.durable
    monkeypatch.setattr(hub_shards, "AHEAD", 0)
    monkeypatch.setattr(hub_shards.HubShards, "begin", lambda s, *n: (at_start.append(cached(hub)), begin(s, *n)))
    monkeypatch.setattr(hub_shards.HubShards, "durable", lambda s, n: (behind.append(cached(hub)), durable(s, n)))
    job(tmp_path / "out")
    assert files(tmp_path / "out")[0] == expected
    outside = {shard for name, shard in index(folder).items() if ".layers." not in name}
    assert at_start == [outside]
    assert behind[1:] == [outside.union(*(shards_of(folder, b) for b in range(n))) for n in (1, 2, 3)]
    assert cached(hub) == set(index(folder).values())
    assert all(size > 1 for size in map(len, behind))


def test_the_next_files_come_while_a_block_is_at_work(hub, source, tmp_path, monkeypatch):
    """Not more of them than were allowed."""
    folder, ahead = source[0], []
    durable = hub_shards.HubShards.durable

    def patient(shards, done):
        if done in (1, 2):
            first = sorted(shards_of(folder, done) - shards_of(folder, done - 1))[: hub_shards.AHEAD]
            until = time.monotonic() + 20
            while not set(first) <= cached(hub) and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.05)  # for one that should not come
            needed = set().union(*(shards_of(folder, block) for block in range(done)))
            ahead.append(cached(hub) - needed - outside)
        durable(shards, done)

    outside = {shard for name, shard in index(folder).items() if ".layers." not in name}
    monkeypatch.setattr(hub_shards.HubShards, "durable", patient)
    job(tmp_path / "out")
    later = [sorted(shards_of(folder, block) - shards_of(folder, block - 1)) for block in (1, 2)]
    assert [sorted(names) for names in ahead] == [sorted(set(names[: hub_shards.AHEAD]) - outside) for names in later]
    assert ahead[0]


def test_a_model_behind_a_gate_says_so_at_once(hub, source, tmp_path, monkeypatch):
    hub.repo(REPO).gated = "manual"
    monkeypatch.setenv("HF_TOKEN", hub.other_token)
    with pytest.raises(CheckpointError, match="gated.*accept its terms.*hf auth login"):
        open_shards(REPO)


def spoil(hub, source, monkeypatch, where="content", **fault):
    """Let the weight file that only the second block needs fail from the moment on at which the job begins to run."""
    name, begun = only_of(source[0], 1), []
    path = content_path(source, name) if where == "content" else f"/resolve/.*/{name}"
    begin = hub_shards.HubShards.begin

    def spoilt(shards, *where):
        begun.append(hub.fail("*", path, **fault))
        begin(shards, *where)

    monkeypatch.setattr(hub_shards.HubShards, "begin", spoilt)
    return begun


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503, "times": 2},
        {"kind": "reset"},
        {"kind": "cut"},
        {"kind": "truncate"},
        {"kind": "short"},
        {"kind": "garbled"},
        {"where": "resolve", "status": 500, "times": 3},
    ],
    ids=lambda fault: "-".join(map(str, fault.values())),
)
def test_what_passes_is_waited_for(hub, source, tmp_path, monkeypatch, fault):
    begun = spoil(hub, source, monkeypatch, **fault)
    job(tmp_path / "out")
    assert begun[0].times == 0
    assert files(tmp_path / "out")[0] == source[1]


GATED, GONE = {"X-Error-Code": "GatedRepo"}, {"X-Error-Code": "EntryNotFound"}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 503, "times": 99}, "503.*the connection.*--resume"),
        ({"kind": "reset", "times": 99}, "the connection.*--resume"),
        ({"kind": "garbled", "times": 99}, "its sha256 is not.*--resume"),
        ({"kind": "short", "times": 99}, "Consistency check failed.*--resume"),
        ({"where": "resolve", "status": 403, "times": 99, "headers": GATED}, "gated.*accept its terms.*--resume"),
        ({"where": "resolve", "status": 401, "times": 99}, r"refuses access \(401\).*--resume"),
        ({"where": "resolve", "status": 404, "times": 99, "headers": GONE}, "has no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_what_does_not_pass_is_named_and_the_job_goes_on_later(hub, source, tmp_path, monkeypatch, fault, said):
    with monkeypatch.context() as patch:
        begun = spoil(hub, source, patch, **fault)
        with pytest.raises(CheckpointError, match=f"{only_of(source[0], 1)}.*{said}"):
            job(tmp_path / "out")
    assert Unfinished(tmp_path / "out").latest()[0] == 1
    as_it_was(hub, *begun)
    job(tmp_path / "out", resume=True)
    assert files(tmp_path / "out")[0] == source[1]


def test_a_hub_that_is_away_is_named_and_the_job_goes_on_later(hub, source, tmp_path, monkeypatch):
    faults, durable = [], hub_shards.HubShards.durable
    monkeypatch.setattr(hub_shards, "AHEAD", 0)

    def away(shards, done):
        durable(shards, done)
        faults.append(hub.fail("*", ".", kind="reset", times=999))

    with monkeypatch.context() as patch:
        patch.setattr(hub_shards.HubShards, "durable", away)
        with pytest.raises(CheckpointError):
            job(tmp_path / "out")
        with pytest.raises(CheckpointError, match="cannot download"):
            job(tmp_path / "out", resume=True)
    as_it_was(hub, *faults)
    job(tmp_path / "out", resume=True)
    assert files(tmp_path / "out")[0] == source[1]


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40])
def test_an_unknown_revision_is_named(hub, tmp_path, revision):
    with pytest.raises(CheckpointError, match=f"has no revision '{revision}'.*branch, tag or commit"):
        job(tmp_path / "out", revision)


def test_a_model_that_is_not_there_is_named(hub):
    with pytest.raises(CheckpointError, match="no such model, or it is private"):
        open_shards("acme/nothing")


def test_a_branch_that_moves_changes_nothing(hub, source, tmp_path, monkeypatch):
    begin = hub_shards.HubShards.begin

    def moved(shards, *where):
        repo = hub.repo(REPO)
        tree = {path: blob for path, blob in repo.commit("main").tree.items() if not path.startswith("model-")}
        repo.add_commit("main", "other", tree, repo.commit("main").id, "alice")
        begin(shards, *where)

    before = hub.repo(REPO).commit("main").id
    monkeypatch.setattr(hub_shards.HubShards, "begin", moved)
    job(tmp_path / "out")
    found, manifest = files(tmp_path / "out")
    assert found == source[1] and manifest["revision"] == before != hub.repo(REPO).commit("main").id
    with pytest.raises(CheckpointError, match="its index names it"):
        job(tmp_path / "next")


# ---- dropping ----


@pytest.fixture
def peaks(hub, monkeypatch):
    """How many weight files the cache held whenever a block ran."""
    found, run = [], hub_shards.HubShards.run
    monkeypatch.setattr(
        hub_shards.HubShards, "run", lambda shards, block: (found.append(len(cached(hub))), run(shards, block))
    )
    return found


def test_files_that_no_later_block_needs_are_dropped(hub, source, tmp_path, peaks):
    job(tmp_path / "out", drop=True)
    assert files(tmp_path / "out")[0] == source[1]
    assert cached(hub) == set() and not list(hub.home.rglob("blobs/" + "?" * 64))
    everything = set(index(source[0]).values())
    assert max(peaks) < len(everything)
    assert sorted(downloads(hub, source)) == sorted(everything)


def test_what_was_in_the_cache_before_stays_there(hub, source, tmp_path):
    there = only_of(source[0], 1)
    hf_hub_download(REPO, there)
    job(tmp_path / "out", drop=True)
    assert cached(hub) == {there}


def test_a_resumed_job_brings_only_what_it_needs(hub, source, tmp_path, monkeypatch):
    folder, expected = source
    with monkeypatch.context() as patch:
        begun = spoil(hub, source, patch, where="resolve", status=403, times=99)
        with pytest.raises(CheckpointError):
            job(tmp_path / "out", drop=True)
    as_it_was(hub, *begun)
    outside = {shard for name, shard in index(folder).items() if ".layers." not in name}
    later = shards_of(folder, 1) | shards_of(folder, 2)
    assert cached(hub) <= later | outside  # those of the first block alone have gone
    hub.log.clear()
    before = cached(hub)
    job(tmp_path / "out", drop=True, resume=True)
    assert files(tmp_path / "out")[0] == expected
    assert sorted(downloads(hub, source)) == sorted((later | outside) - before)
    assert cached(hub) == set()


def test_a_download_that_a_kill_cut_off_is_looked_at_again(hub, source, tmp_path):
    name = only_of(source[0], 1)
    path = Path(hf_hub_download(REPO, name))
    whole = path.read_bytes()
    path.resolve().write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    account = tmp_path / "account.json"
    account.write_text(json.dumps({name: False}))
    shards = open_shards(REPO, account=account)
    shards.cache.fetch(name)
    assert path.read_bytes() == whole
    assert json.loads(account.read_text())[name] is True


def test_partial_downloads_that_a_kill_left_are_removed(hub, source, tmp_path):
    name = only_of(source[0], 1)
    shards = open_shards(REPO)
    blobs = shards.folder.parents[1] / "blobs"
    digest = hashlib.sha256((source[0] / name).read_bytes()).hexdigest()
    old, new = blobs / f"{digest}.11111111.incomplete", blobs / f"{digest}.22222222.incomplete"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    shards.cache.fetch(name)
    assert not old.exists() and new.exists()


def test_nothing_is_dropped_from_a_folder(source):
    with pytest.raises(ConfigError, match="nothing is removed"):
        open_shards(source[0], drop=True)


def test_a_file_that_another_process_removes_comes_again(hub, source, tmp_path, monkeypatch):
    name, durable = only_of(source[0], 2), hub_shards.HubShards.durable

    def removed(shards, done):
        shards.cache.fetch(name)
        hub_files.remove_cached(shards.folder, name)
        durable(shards, done)

    monkeypatch.setattr(hub_shards.HubShards, "durable", removed)
    job(tmp_path / "out")
    assert files(tmp_path / "out")[0] == source[1]


def test_a_model_of_one_file_needs_no_ceremony(hub, tmp_path, tiny_model):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    hub.add_repo("acme/one", files={path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()})
    shards = open_shards("acme/one", drop=True)
    assert cached(hub) == {"model.safetensors"}
    model, blocks, _ = load_on_demand(shards.folder, shards=shards)
    with blocks.holding_all():
        found = dict(model.named_parameters())
        assert all(torch.equal(found[name], p) for name, p in tiny_model("llama").named_parameters())


def test_a_whole_cache_needs_no_connection_and_is_the_same_job(hub, source, tmp_path, monkeypatch):
    shards = open_shards(REPO)
    asked = shards.digests()
    assert asked == {name: hashlib.sha256((source[0] / name).read_bytes()).hexdigest() for name in shards.names}
    for name in shards.names[1:]:
        shards.cache.fetch(name)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
            open_shards(REPO).cache.fetch(shards.names[0])
    shards.cache.fetch(shards.names[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = open_shards(REPO)
    assert again.folder == shards.folder and again.digests() == asked
    load_on_demand(again.folder, shards=again)


# ---- disks ----


def with_room(monkeypatch, size):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, size))


def test_a_disk_that_is_too_small_is_noticed_before_the_first_block(hub, source, tmp_path, monkeypatch):
    sizes = {path.name: path.stat().st_size for path in source[0].glob("*.safetensors")}
    room = sum(sizes[name] for name in shards_of(source[0], 1)) * 5 // 4  # the shards of a block, and one ahead
    assert room < sum(sizes.values()) / 2
    monkeypatch.setattr(Unfinished, "check_room", lambda *_: 0)
    monkeypatch.setattr("hf_qep.engine.writer.free_space_check", lambda *_: None)
    with_room(monkeypatch, room)
    with pytest.raises(DiskSpaceError, match="still to come, and the output, need.*--drop-shards"):
        job(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "check_room", lambda *_: room)  # for the output, on the same disk
        with pytest.raises(DiskSpaceError, match="still to come, and the output"):
            job(tmp_path / "out", drop=True)
    job(tmp_path / "out", drop=True)
    assert files(tmp_path / "out")[0] == source[1]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


FULL_DISKS = [(hub_files, "download", full), (unfinished, "write_tensors", full), (assembly, "_write", full)]
FULL_DISKS += [(streaming, "save_file", full_for_safetensors)]


@pytest.mark.parametrize("place", FULL_DISKS, ids=lambda place: place[1])
def test_a_disk_that_fills_up_stops_the_job_until_there_is_room(hub, source, tmp_path, monkeypatch, place):
    owner, name, fail = place
    original, durable = getattr(owner, name), hub_shards.HubShards.durable
    monkeypatch.setattr(hub_shards, "AHEAD", 0)

    def fill_up(shards, done):
        durable(shards, done)
        if done:
            setattr(owner, name, fail)

    with monkeypatch.context() as patch:
        patch.setattr(hub_shards.HubShards, "durable", fill_up)
        with pytest.raises(DiskSpaceError, match="(?i)no space.*--resume"):
            job(tmp_path / "out")
    setattr(owner, name, original)
    assert Unfinished(tmp_path / "out").latest()[0] == (3 if owner is assembly else 1)
    job(tmp_path / "out", resume=True)
    assert files(tmp_path / "out")[0] == source[1]


def remove(path):
    path.unlink()


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-7])


def replace(path):
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize(("harm", "said"), [(remove, "gone"), (cut_off, "has changed"), (replace, "has changed")])
def test_a_local_file_that_is_harmed_stops_the_job_until_it_is_back(source, tmp_path, monkeypatch, harm, said):
    folder = shutil.copytree(source[0], tmp_path / "m")
    name = only_of(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "durable", lambda shards, done: harm(shards.folder / name) if done == 1 else None)
        with pytest.raises(CheckpointError, match=f"{name}.*{said}.*put it back.*--resume"):
            streamed(folder, tmp_path / "out", config("cohere2"))
    shutil.copy(source[0] / name, folder / name)
    streamed(folder, tmp_path / "out", config("cohere2"), resume=True)
    assert files(tmp_path / "out")[0] == source[1]


def test_a_file_that_ends_while_it_is_read_is_named(source, tmp_path, monkeypatch):
    name = only_of(source[0], 1)
    path = Path(shutil.copy(source[0] / name, tmp_path / name))
    file = TensorFile(path)
    last = max(file.entries, key=lambda tensor: file.entries[tensor].start)
    cut_off(path)
    monkeypatch.setattr(file, "check", lambda: None)  # it was looked at a moment before
    with pytest.raises(CheckpointError, match=f"{name}.*ends before.*put it back"):
        file.read(last)
