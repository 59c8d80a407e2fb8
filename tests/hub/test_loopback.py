"""The loopback Hub itself, seen through the real client: what the tests of publishing rely on."""

from __future__ import annotations

import base64
import json
import struct
import threading
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from tests.loopback_hub import LoopbackHub
from tests.loopback_hub.checks import add, refused
from tests.loopback_hub.fixtures import talking_to

REPO = "alice/model"
CARD = "---\nlicense: apache-2.0\nbase_model: acme/base\nbase_model_relation: quantized\n---\n# A model\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of 300 kB in two files, with a card and a folder."""
    root = tmp_path / "model"
    (root / ".eval_results").mkdir(parents=True)
    for name, size in (("model-00001-of-00002", 200_000), ("model-00002-of-00002", 100_000)):
        header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        (root / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    (root / "config.json").write_text('{"model_type": "llama"}')
    (root / "README.md").write_text(CARD)
    (root / ".eval_results" / "x.yaml").write_text("- dataset: {id: a/b, task_id: t}\n  value: 0.5\n")
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- files


@pytest.mark.parametrize("part_size", [None, 64 * 1024], ids=["one piece", "parts"])
def test_a_folder_comes_back_as_it_was_sent(part_size, loopback_hub, hub_api, folder):
    loopback_hub.state.part_size = part_size
    hub_api.create_repo(REPO, private=True)
    first = hub_api.upload_folder(repo_id=REPO, folder_path=folder)
    assert loopback_hub.files(REPO) == content(folder)
    assert sum("/upload/" in path for _, path, _ in loopback_hub.log) == (2 if part_size is None else 4 + 2)
    again = hub_api.upload_folder(repo_id=REPO, folder_path=folder)
    assert again.oid == first.oid
    assert len(loopback_hub.repo(REPO).commits) == 2

    fetched = Path(hub_api.snapshot_download(REPO))
    assert {k: v for k, v in content(fetched).items() if k != ".gitattributes"} == content(folder)
    hub_api.verify_repo_checksums(REPO)


def test_what_a_repository_says_of_itself(loopback_hub, hub_api, folder):
    hub_api.create_repo(REPO)
    commit = hub_api.upload_folder(repo_id=REPO, folder_path=folder)
    info = hub_api.model_info(REPO, files_metadata=True)
    assert (info.sha, info.private, info.gated, info.author) == (commit.oid, False, False, "alice")
    assert {"base_model:quantized:acme/base", "license:apache-2.0"} <= set(info.tags)
    assert info.card_data.base_model_relation == "quantized"
    assert info.config == {"model_type": "llama"}
    assert info.eval_results[0].value == 0.5
    weights = next(s for s in info.siblings if s.rfilename == "model-00001-of-00002.safetensors")
    assert weights.lfs.size == weights.size == len(loopback_hub.files(REPO)[weights.rfilename])


def test_trees_come_in_pages_and_paths_can_be_asked_for(loopback_hub, hub_api):
    loopback_hub.add_repo(REPO, files={f"folder/{n}.txt": b"x" for n in range(7)} | {"w.safetensors": b"abc"})
    loopback_hub.state.page_size = 3
    everything = list(hub_api.list_repo_tree(REPO, recursive=True))
    assert [e.path for e in everything] == sorted(
        [".gitattributes", "folder", "w.safetensors", *(f"folder/{n}.txt" for n in range(7))]
    )
    assert sum("/tree/" in path for _, path, _ in loopback_hub.log) == 4
    assert [e.path for e in hub_api.list_repo_tree(REPO)] == [".gitattributes", "folder", "w.safetensors"]
    assert len(list(hub_api.list_repo_tree(REPO, "folder"))) == 7
    with pytest.raises(EntryNotFoundError):
        list(hub_api.list_repo_tree(REPO, "nowhere"))
    found = hub_api.get_paths_info(REPO, ["w.safetensors", "folder", "missing"], expand=True)
    assert [(f.path, bool(f.last_commit)) for f in found] == [("w.safetensors", True), ("folder", True)]


@pytest.mark.parametrize("path", ["config.json", "w.safetensors"])
@pytest.mark.parametrize(
    "span, expected", [("bytes=2-4", b"cde"), ("bytes=7-", b"hij"), ("bytes=-2", b"ij"), ("bytes=8-99", b"ij")]
)
def test_parts_of_files(path, span, expected, loopback_hub):
    loopback_hub.add_repo(REPO, files={path: b"abcdefghij"})
    answer = get_session().get(f"{loopback_hub.endpoint}/{REPO}/resolve/main/{path}", headers={"Range": span})
    assert (answer.status_code, answer.content) == (206, expected)
    assert answer.headers["Content-Range"].endswith("/10")


def test_large_files_lie_at_another_host_and_behind_signed_addresses(loopback_hub):
    loopback_hub.add_repo(REPO, files={"w.safetensors": b"abc"})
    address = f"{loopback_hub.endpoint}/{REPO}/resolve/main/w.safetensors"
    head = get_session().head(address, follow_redirects=False)
    assert head.status_code == 302 and "X-Repo-Commit" in head.headers
    assert head.headers["X-Linked-Size"] == "3"
    location = head.headers["Location"]
    assert location.startswith("http://localhost:")
    assert get_session().get(location).content == b"abc"
    for wrong in (location.partition("?")[0], location.replace("localhost", "127.0.0.1"), location + "0"):
        assert get_session().get(wrong).status_code in (403, 501)
    past = get_session().get(location, headers={"Range": "bytes=3-"})
    assert (past.status_code, past.headers["Content-Range"]) == (416, "bytes */3")


def test_names_that_are_not_there(loopback_hub, hub_api):
    loopback_hub.add_repo(REPO, files={"config.json": b"{}"})
    with pytest.raises(RemoteEntryNotFoundError) as error:
        hub_api.hf_hub_download(REPO, "nope.json")
    assert error.value.response.headers["X-Repo-Commit"] == loopback_hub.repo(REPO).commits[-1].id
    for call in (lambda r: hub_api.model_info(REPO, revision=r), lambda r: hub_api.list_repo_commits(REPO, revision=r)):
        with pytest.raises(RevisionNotFoundError):
            call("nope")
    with pytest.raises(RepositoryNotFoundError):
        hub_api.model_info("alice/nope")
    # What the double cannot do must not look like something that is not there.
    assert get_session().get(f"{loopback_hub.endpoint}/api/models/{REPO}/nope").status_code == 501


# ---- commits


def test_a_commit_is_all_or_nothing(loopback_hub, hub_api):
    loopback_hub.add_repo(REPO, files={"a/1.txt": b"1", "a/2.txt": b"2", "b.txt": b"b"})
    before = loopback_hub.files(REPO)
    for bad in (CommitOperationDelete("nope.txt"), add("README.md", b"---\nbase_model_relation: squashed\n---\n")):
        with pytest.raises((HfHubHTTPError, ValueError)):
            hub_api.create_commit(REPO, [add("new.txt"), bad], commit_message="bad")
        assert loopback_hub.files(REPO) == before
    hub_api.create_commit(REPO, [add("new.txt"), CommitOperationDelete("a/")], commit_message="good")
    assert set(loopback_hub.files(REPO)) == {"b.txt", "new.txt"}
    titles = [c.title for c in hub_api.list_repo_commits(REPO)]
    assert titles == ["good", "files", "initial commit"]


def test_a_stale_parent_is_refused(loopback_hub, hub_api):
    old = loopback_hub.add_repo(REPO, files={"a": b"1"}).commits[-1].id
    hub_api.create_commit(REPO, [add("b")], commit_message="first", parent_commit=old)
    with refused(412):
        hub_api.create_commit(REPO, [add("c")], commit_message="second", parent_commit=old)


def test_branches_and_tags(loopback_hub, hub_api):
    loopback_hub.add_repo(REPO, files={"a": b"1"})
    hub_api.create_branch(REPO, branch="next")
    with refused(409):
        hub_api.create_branch(REPO, branch="next")
    hub_api.create_branch(REPO, branch="next", exist_ok=True)
    hub_api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=REPO, revision="next")
    hub_api.create_tag(REPO, tag="v1", revision="next")
    hub_api.upload_file(path_or_fileobj=b"3", path_in_repo="a", repo_id=REPO, revision="next")
    assert [loopback_hub.files(REPO, r)["a"] for r in ("main", "v1", "next")] == [b"1", b"2", b"3"]
    with refused(400):
        hub_api.upload_file(path_or_fileobj=b"4", path_in_repo="a", repo_id=REPO, revision="v1")
    refs = hub_api.list_repo_refs(REPO)
    assert ([b.name for b in refs.branches], [t.name for t in refs.tags]) == (["main", "next"], ["v1"])
    hub_api.delete_tag(REPO, tag="v1")
    hub_api.delete_branch(REPO, branch="next")
    with pytest.raises(HfHubHTTPError):
        hub_api.delete_branch(REPO, branch="main")
    assert loopback_hub.repo(REPO).branches.keys() == {"main"}


def test_pull_requests_of_strangers(loopback_hub, hub_api):
    loopback_hub.add_repo(REPO, files={"a": b"1"})
    bob = loopback_hub.api(loopback_hub.other_token)
    with refused(403):
        bob.create_commit(REPO, [add("a")], commit_message="no")
    weights = add("w.safetensors", b"abc")
    made = bob.create_commit(REPO, [weights], commit_message="please", create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    bob.create_commit(REPO, [add("more")], commit_message="and", revision="refs/pr/1")
    carol = loopback_hub.api(loopback_hub.new_token("carol", "write"))
    with refused(403):
        carol.create_commit(REPO, [add("mine")], commit_message="too", revision="refs/pr/1")
    assert set(loopback_hub.files(REPO, "refs/pr/1")) == {"a", "more", "w.safetensors"}
    assert set(loopback_hub.files(REPO)) == {"a"}
    refs = hub_api.list_repo_refs(REPO, include_pull_requests=True)
    assert [r.ref for r in refs.pull_requests] == ["refs/pr/1"]
    assert hub_api.hf_hub_download(REPO, "more", revision="refs/pr/1")


@pytest.mark.parametrize("path", ["../a", "/a", "a//b", ".git/config", "a/../b", "", "README.md"])
def test_files_that_the_client_would_not_send_are_refused_too(path, loopback_hub):
    loopback_hub.add_repo(REPO)
    bad_card = base64.b64encode(b"---\nlicense: apache\n---\n").decode()
    line = {"key": "file", "value": {"path": path, "content": bad_card, "encoding": "base64"}}
    answer = get_session().post(
        f"{loopback_hub.endpoint}/api/models/{REPO}/commit/main",
        content="\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "s"}}, line])),
        headers={"Authorization": f"Bearer {loopback_hub.token}"},
    )
    assert (answer.status_code, loopback_hub.files(REPO)) == (400, {})


def test_commits_at_the_same_time_are_not_lost(loopback_hub, hub_api):
    loopback_hub.add_repo(REPO)
    threads = [
        threading.Thread(target=hub_api.create_commit, args=(REPO, [add(f"{n}.txt")]), kwargs={"commit_message": "m"})
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(loopback_hub.files(REPO)) == {f"{n}.txt" for n in range(8)}


# ---- faults


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_a_fault_answers_with_a_status_as_often_as_it_was_told(status, loopback_hub, hub_api):
    fault = loopback_hub.fail("GET", "/whoami", status, times=2, headers={"Retry-After": "1"})
    for _ in range(2):
        with refused(status) as error:
            hub_api.whoami()
        assert error.value.response.headers["Retry-After"] == "1"
    assert hub_api.whoami()["name"] == "alice"
    assert fault.times == 0 and not loopback_hub.faults.pending
    assert [s for _, path, s in loopback_hub.log if path == "/api/whoami-v2"] == [status, status, 200]


@pytest.mark.parametrize(
    "kind, happens, error",
    [
        ("status", False, "HfHubHTTPError"),
        ("reset", False, "ReadError"),
        ("after", True, "ReadError"),
        ("truncate", True, "RemoteProtocolError"),
    ],
)
def test_a_commit_is_made_or_not_as_the_kind_of_fault_says(kind, happens, error, loopback_hub, hub_api):
    loopback_hub.add_repo(REPO)
    loopback_hub.fail("POST", "/commit/", kind=kind)
    with pytest.raises(Exception) as raised:
        hub_api.create_commit(REPO, [add("a.txt")], commit_message="m")
    assert type(raised.value).__name__ == error
    assert ("a.txt" in loopback_hub.files(REPO)) is happens
    hub_api.create_commit(REPO, [add("b.txt")], commit_message="m")
    assert "b.txt" in loopback_hub.files(REPO)


def test_a_download_goes_on_where_it_broke_off(loopback_hub, hub_api, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    data = bytes(range(256)) * 400
    loopback_hub.add_repo(REPO, files={"w.safetensors": data})
    loopback_hub.fail("GET", "^/content/", kind="truncate")
    assert Path(hub_api.hf_hub_download(REPO, "w.safetensors")).read_bytes() == data
    assert [status for _, path, status in loopback_hub.log if path.startswith("/content/")] == [200, 206]


@pytest.mark.parametrize("kind", ["status", "reset"])
def test_a_download_that_fails_leaves_no_file(kind, loopback_hub, hub_api):
    loopback_hub.add_repo(REPO, files={"w.safetensors": b"abc"})
    loopback_hub.fail("GET", "^/content/", kind=kind)
    with pytest.raises(Exception, match="503|reset"):
        hub_api.hf_hub_download(REPO, "w.safetensors")
    assert not list(loopback_hub.home.rglob("w.safetensors"))
    assert Path(hub_api.hf_hub_download(REPO, "w.safetensors")).read_bytes() == b"abc"


def test_uploads_go_on_after_a_fault_of_the_storage(loopback_hub, hub_api, folder):
    hub_api.create_repo(REPO)
    loopback_hub.fail("PUT", "^/upload/", kind="reset")
    loopback_hub.fail("*", "/lfs/", 503)
    hub_api.upload_folder(repo_id=REPO, folder_path=folder)
    assert loopback_hub.files(REPO) == content(folder)
    assert not loopback_hub.faults.pending


def test_damaged_uploads_are_refused(loopback_hub, hub_api):
    loopback_hub.add_repo(REPO)
    operation = add("w.safetensors", b"right")
    operation.upload_info.sha256 = b"\1" * 32
    with pytest.raises(RuntimeError, match="Error while uploading"):
        hub_api.create_commit(REPO, [operation], commit_message="m")
    assert loopback_hub.files(REPO) == {}


def test_an_unknown_kind_of_fault_is_a_mistake_of_the_test(loopback_hub):
    with pytest.raises(ValueError, match="unknown kind"):
        loopback_hub.fail("GET", "/", kind="explode")


# ---- tokens


def test_the_client_sends_no_token_to_the_storage_but_one_would_be_noticed(loopback_hub, hub_api, folder):
    hub_api.create_repo(REPO, private=True)
    hub_api.upload_folder(repo_id=REPO, folder_path=folder)
    hub_api.snapshot_download(REPO)
    assert {"PUT", "GET"} <= {m for m, path, _ in loopback_hub.log if path.startswith(("/upload/", "/content/"))}
    assert loopback_hub.leaks == []
    token = loopback_hub.token
    get_session().get(f"{loopback_hub.storage}/content/x", headers={"Authorization": f"Bearer {token}"})
    get_session().get(f"{loopback_hub.storage}/content/x?token={token}")
    get_session().put(f"{loopback_hub.storage}/upload/x", content=f"key: {token}".encode())
    assert loopback_hub.leaks == [token] * 3
    loopback_hub.leaks.clear()


# ---- the fixtures


def test_only_this_hub_is_reached_and_afterwards_everything_is_as_before(tmp_path):
    names = ("ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET", "HUGGINGFACE_CO_URL_TEMPLATE")
    before = {name: getattr(constants, name) for name in names}
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().whoami(token="hf_any")
    hub = LoopbackHub(tmp_path).start()
    try:
        with talking_to(hub):
            assert (HfApi().endpoint, HfApi().whoami()["name"]) == (hub.endpoint, "alice")
            hub.add_repo(REPO, files={"a.txt": b"1"})
            assert Path(HfApi().hf_hub_download(REPO, "a.txt")).is_relative_to(tmp_path)
    finally:
        hub.stop()
    assert {name: getattr(constants, name) for name in names} == before
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().whoami(token="hf_any")
    with pytest.raises(LocalEntryNotFoundError):
        HfApi().hf_hub_download(REPO, "a.txt")


def test_a_mistake_of_the_double_does_not_pass_as_an_answer(tmp_path, monkeypatch):
    hub = LoopbackHub(tmp_path).start()
    try:
        with talking_to(hub):
            monkeypatch.setattr(hub.state.accounts, "whoami", lambda token: 1 / 0)
            with pytest.raises(HfHubHTTPError):
                HfApi().whoami()
    finally:
        hub.stop()
    assert len(hub.crashes) == 1 and "ZeroDivisionError" in hub.crashes[0]


# ---- another process, and xet

PROCESS = """
import os
from huggingface_hub import HfApi, constants
api = HfApi()
assert not constants.HF_HUB_OFFLINE
api.create_repo("alice/model", private=True)
api.upload_folder(repo_id="alice/model", folder_path={folder!r})
print(api.snapshot_download("alice/model"))
"""


def test_another_process_works_with_the_same_hub(loopback_hub, folder):
    done = loopback_hub.run_python(PROCESS.format(folder=str(folder)))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(loopback_hub.home)
    assert loopback_hub.files(REPO) == content(folder)
    done = loopback_hub.run_python("import huggingface_hub; print(huggingface_hub.get_token())", token=None)
    assert done.stdout.split() == ["None"]


XET_PROBE = """
import hf_xet
access = dict(endpoint={store!r}, token="x", token_expiry_unix_secs=2**33)
with hf_xet.XetSession().new_upload_commit(**access) as commit:
    commit.start_upload_bytes(b"probe" * 100, sha256=hf_xet.COMPUTE_SHA256)
"""


def test_large_files_through_xet(tmp_path, folder):
    hub = LoopbackHub(tmp_path / "hub", xet=True).start()
    try:
        probe = hub.run_python(XET_PROBE.format(store=f"local://{tmp_path / 'probe'}"))
        if probe.returncode:
            pytest.skip(f"hf_xet does not offer a local store: {probe.stderr.strip().splitlines()[-1]}")
        done = hub.run_python(PROCESS.format(folder=str(folder)))
        assert done.returncode == 0, (done.stderr, hub.crashes)
        assert not any(path.startswith("/upload/") for _, path, _ in hub.log)
        assert hub.files(REPO) == content(folder)
        fetched = content(Path(done.stdout.strip()))
        assert {k: v for k, v in fetched.items() if k != ".gitattributes"} == content(folder)
        assert not hub.leaks and not hub.crashes
    finally:
        hub.stop()
