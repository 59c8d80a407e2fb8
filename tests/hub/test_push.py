"""`hf-qep push` against the loopback Hub: who may, who sees it, what a dry run promises, what is never done."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from hf_qep.errors import PublishError, UnsafeContentError
from hf_qep.hub import preflight
from hf_qep.hub.publish import PushOptions
from hf_qep.hub.remote import RepoState
from tests.cli.test_commands import refusal, run
from tests.hub.pushing import REPO, add_base, client, content, plan, push, writes
from tests.hub.test_loopback import XET_PROBE
from tests.loopback_hub.server import LoopbackHub

NC, ND = "cc-by-nc-4.0", "cc-by-nd-4.0"


@pytest.fixture
def hub(loopback_hub):
    """The Hub with the original on it, open to everybody."""
    add_base(loopback_hub)
    return loopback_hub


def dry_run(*words: object) -> dict:
    """What `push --dry-run --json` says."""
    result = run("push", *words, "--dry-run", "--json")
    assert result.exit_code in (0, 2), result.exception
    return json.loads(result.stdout)


# --- the plain case


def test_a_push_is_private_identical_and_one_commit(hub, finished):
    result = run("push", finished, REPO, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    said, repo = json.loads(result.stdout), hub.repo(REPO)
    assert repo.private
    assert hub.files(REPO) == content(finished)
    assert [c.title for c in repo.commits] == [
        "initial commit",
        "Upload tiny-llama-1bit: packed weights, card and record",
    ]
    assert said["visibility"] == "private"
    assert said["commit"] == repo.commit("main").id
    assert said["url"] == f"{hub.endpoint}/{REPO}"
    assert {f["path"] for f in said["files"]} == set(content(finished))
    assert hub.leaks == []


def test_shards_are_pushed_too(hub, checkpoint):
    from tests.hub.checkpoints import make_shards

    push(hub, make_shards(checkpoint))
    assert hub.files(REPO) == content(checkpoint)


def test_large_files_go_in_parts_where_the_hub_wants_that(hub, finished):
    hub.state.part_size = 16384
    push(hub, finished)
    assert hub.files(REPO) == content(finished)
    assert sum(method == "PUT" for method, _, _ in hub.log) == 5


COMMAND = "import sys; sys.argv[1:] = {words!r}; from hf_qep.cli import main; main()"


def test_a_process_pushes_and_verifies_through_xet(tmp_path, finished):
    """The transfer that the Hub itself prefers; it retries and resumes on its own terms."""
    hub = LoopbackHub(tmp_path / "hub", xet=True).start()
    try:
        if hub.run_python(XET_PROBE.format(store=f"local://{tmp_path / 'probe'}")).returncode:
            pytest.skip("this hf_xet does not offer a local store")
        add_base(hub)
        for words in (["push", str(finished), REPO, "--json"], ["verify", REPO, "--json", "--sample-tokens", "0"]):
            done = hub.run_python(COMMAND.format(words=words))
            assert done.returncode == 0, done.stdout + done.stderr
        assert not any(method == "PUT" for method, _, _ in hub.log)
        assert any("xet-write-token" in path for _, path, _ in hub.log)
        assert hub.files(REPO) == content(finished)
        assert hub.leaks == []
    finally:
        hub.stop()


def test_tables_for_people_name_address_and_commit(hub, finished):
    result = run("push", finished, REPO)
    assert result.exit_code == 0
    assert f"{hub.endpoint}/{REPO}" in result.stdout
    assert hub.repo(REPO).commit("main").id in result.stdout
    assert "private" in result.stdout


def test_a_second_push_makes_no_commit(hub, finished):
    first = push(hub, finished)
    hub.log.clear()
    second = push(hub, finished)
    assert (first.changed, second.changed) == (True, False)
    assert first.commit == second.commit
    assert writes(hub) == []


def test_a_name_without_an_owner_is_one_of_the_account(hub, finished):
    assert push(hub, finished, "small").repo_id == "alice/small"


def test_an_update_sends_only_what_changed(hub, checkpoint):
    push(hub, checkpoint)
    with (checkpoint / "README.md").open("a") as card:
        card.write("\nMore words.\n")
    hub.log.clear()
    assert push(hub, checkpoint).changed
    assert hub.files(REPO) == content(checkpoint)
    assert not any(method == "PUT" for method, _, _ in hub.log)


def test_files_of_an_older_push_go_and_files_of_the_user_stay(hub, finished):
    older = dict(content(finished)) | {"vocab.txt": b"old", "model-00001-of-00002.safetensors": b"old", "a.png": b"old"}
    hub.add_repo(REPO, files=older | {"notes/mine.dat": b"keep", "LICENSE": b"text"}, private=True)
    push(hub, finished)
    assert hub.files(REPO) == content(finished) | {"notes/mine.dat": b"keep", "LICENSE": b"text"}


def test_a_branch_is_made_from_main(hub, finished):
    hub.add_repo(REPO, files={"LICENSE": b"text"}, private=True)
    result = push(hub, finished, revision="two-bits")
    assert hub.files(REPO, "two-bits") == content(finished) | {"LICENSE": b"text"}
    assert hub.files(REPO) == {"LICENSE": b"text"}
    assert result.url.endswith("/tree/two-bits")


def test_a_pull_request_needs_no_right_to_write_and_changes_no_setting(hub, finished):
    hub.add_repo(REPO, files={"LICENSE": b"text"})
    result = push(hub, finished, remote=client(hub, token=hub.other_token), create_pr=True)
    assert result.pull_request == "refs/pr/1"
    assert hub.files(REPO) == {"LICENSE": b"text"}
    assert hub.files(REPO, "refs/pr/1") == content(finished) | {"LICENSE": b"text"}
    again = push(hub, finished, remote=client(hub, token=hub.other_token), create_pr=True)
    assert (again.pull_request, again.changed) == ("refs/pr/1", False)
    assert len(hub.repo(REPO).pulls) == 1


# --- the dry run


def test_a_dry_run_changes_nothing_and_says_what_the_push_then_does(hub, checkpoint):
    older = dict(content(checkpoint)) | {"vocab.txt": b"old", "config.json": b"{}", "mine.dat": b"keep"}
    older.pop("tokenizer_config.json")
    hub.add_repo(REPO, files=older, private=True)
    before, commits = hub.files(REPO), len(hub.repo(REPO).commits)
    hub.log.clear()
    said = dry_run(checkpoint, REPO)
    assert writes(hub) == []
    assert hub.files(REPO) == before
    assert len(hub.repo(REPO).commits) == commits

    result = push(hub, checkpoint)
    after = hub.files(REPO)
    assert said["repo_exists"] is True
    assert said["problems"] == []
    assert said["visibility"] == result.visibility
    assert said["gate"] == result.gate
    assert said["commit_message"] == hub.repo(REPO).commit("main").title
    actions = {f["path"]: f["action"] for f in said["files"]}
    assert {n for n, a in actions.items() if a == "add"} == set(after) - set(before) == {"tokenizer_config.json"}
    assert {n for n, a in actions.items() if a == "replace"} == {
        n for n in after if after[n] != before.get(n, after[n])
    }
    assert said["delete"] == sorted(set(before) - set(after)) == ["vocab.txt"]
    assert said["left_alone"] == [".gitattributes", "mine.dat"]
    assert {f["path"]: (f["size"], f["sha256"]) for f in said["files"]} == {
        f.path: (f.size, f.sha256) for f in result.files
    }


def test_a_dry_run_makes_no_repository(hub, finished):
    result = run("push", finished, REPO, "--public", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not hub.has_repo(REPO)
    assert writes(hub) == []
    for part in ("nothing was changed", "would be created", "public", "apache-2.0", "model.safetensors", "add"):
        assert part in result.stdout


def test_a_dry_run_names_every_problem_and_exits_with_two(hub, checkpoint):
    (checkpoint / "README.md").unlink()
    result = run("push", checkpoint, "bob/x", "--gated", "perhaps", "--dry-run")
    assert result.exit_code == 2
    for part in ("'README.md' is missing", "may not write to 'bob'", "--gated 'perhaps'"):
        assert part in " ".join(result.stdout.split())
    assert writes(hub) == []


def test_without_the_hub_the_dry_run_says_that_nothing_was_compared(hub, finished):
    hub.fail("*", "", 404, times=1000)
    said = dry_run(finished, REPO)
    assert {f["action"] for f in said["files"]} == {None}
    assert any("404" in problem for problem in said["problems"])


# --- who may


@pytest.mark.parametrize("owner", ["alice", "acme"])
def test_the_owner_and_members_of_an_organisation_may(hub, finished, owner):
    assert push(hub, finished, f"{owner}/x").changed
    assert hub.files(f"{owner}/x") == content(finished)


@pytest.mark.parametrize(
    ("who", "repo_id", "message"),
    [
        ("read", REPO, "the token may not write to alice/tiny-llama-1bit"),
        ("bob", REPO, "'bob' may not write to 'alice', only to: bob"),
        ("bob", "acme/x", "'bob' may not write to 'acme'"),
        ("one other", REPO, "the token may not write to alice/tiny-llama-1bit"),
    ],
)
def test_others_are_refused_before_anything_is_sent(hub, finished, who, repo_id, message):
    other = hub.new_token(scopes={"alice/other": ["repo.write"]})
    token = {"read": hub.read_token, "bob": hub.other_token, "one other": other}[who]
    with pytest.raises(PublishError, match=message):
        push(hub, finished, repo_id, remote=client(hub, token=token))
    assert writes(hub) == []


@pytest.mark.parametrize("scope", [REPO, "alice"])
def test_a_token_for_one_repository_or_owner_is_enough(hub, finished, scope):
    hub.add_repo(REPO, private=True)
    token = hub.new_token(scopes={scope: ["repo.write", "repo.content.read"]})
    assert push(hub, finished, remote=client(hub, token=token)).changed


def test_without_a_login_the_sentence_says_how_to_log_in(hub, finished, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "you are not logged in; run: hf auth login" in refusal(run("push", finished, REPO))
    assert writes(hub) == []


def test_an_invalid_token_is_refused_and_not_shown(hub, finished, monkeypatch):
    bad = "hf_" + "notvalid" * 5
    monkeypatch.setenv("HF_TOKEN", bad)
    result = run("push", finished, REPO)
    assert "log in again" in refusal(result)
    assert bad not in result.output
    assert writes(hub) == []


# --- where to


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-q4.gguf"])
def test_another_model_is_replaced_only_if_asked(hub, finished, name):
    hub.add_repo(REPO, files={name: b"weights of somebody"}, private=True)
    with pytest.raises(PublishError, match=f"holds a model that hf_qep did not push .'{name}'.*--overwrite"):
        push(hub, finished)
    assert hub.files(REPO) == {name: b"weights of somebody"}
    assert push(hub, finished, overwrite=True).changed


def test_code_and_weights_that_stay_on_the_hub_are_pointed_out(hub, finished):
    hub.add_repo(REPO, files=content(finished) | {"evil.py": b"x", "model.onnx": b"x"}, private=True)
    said = " ".join(plan(hub, finished).warnings)
    assert "'evil.py' on the Hub is code" in said
    assert "'model.onnx' on the Hub holds other weights" in said


@pytest.mark.parametrize("repo_id", ["a/b/c", "../x", "a b", "alice/x..y", "alice/-x", "alice/x.git", ""])
def test_a_name_that_is_none_is_refused(hub, finished, repo_id):
    with pytest.raises(PublishError, match="is no name for a repository"):
        push(hub, finished, repo_id)
    assert writes(hub) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "0" * 40}, "--revision is a commit"),
        ({"revision": "a..b"}, "is no name of a branch"),
        ({"revision": "-x"}, "is no name of a branch"),
        ({"revision": "x y"}, "is no name of a branch"),
        ({"create_pr": True, "revision": "x"}, "leave out --revision"),
        ({"create_pr": True, "public": True}, "leave out --public"),
        ({"create_pr": True}, "does not exist, so there is nothing to open a pull request against"),
        ({"gated": "yes"}, "--gated 'yes' is not known"),
        ({"commit_message": "by hf_" + "aB3" * 12}, "the commit message' line 1 holds a Hugging Face token"),
        ({"commit_message": "from /" + "home/alice/x"}, "the commit message' line 1 holds an absolute path"),
    ],
)
def test_options_that_cannot_work_are_refused(hub, finished, options, message):
    with pytest.raises(PublishError, match=message):
        push(hub, finished, **options)
    assert writes(hub) == []


def test_a_repository_that_was_renamed_is_named_by_its_new_name(hub, finished, monkeypatch):
    remote = client(hub)
    monkeypatch.setattr(remote, "repo", lambda repo_id, revision=None: RepoState("alice/new-name", True, None, None))
    monkeypatch.setattr(remote, "files", lambda repo_id, revision: {})
    assert (
        f"{REPO} is called alice/new-name on the Hub; push to that name" in plan(hub, finished, remote=remote).problems
    )


# --- the folder


def test_a_card_that_the_hub_dislikes_is_refused_before_anything_is_sent(hub, checkpoint):
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace("tags: [", "datasets: [not an id]\ntags: ["))
    with pytest.raises(PublishError, match="the Hub refuses the card: .*datasets"):
        push(hub, checkpoint)
    assert writes(hub) == []


def test_an_unsafe_folder_is_refused_as_such(hub, checkpoint):
    (checkpoint / ".env").write_text("x")
    result = run("push", checkpoint, REPO, "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == UnsafeContentError.__name__
    assert "'.env'" in error["message"]
    assert writes(hub) == []


def test_a_full_disk_is_noticed(hub, finished, monkeypatch):
    usage = shutil.disk_usage(finished)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(PublishError, match="MB of disk for its cache, and 0 MB are free"):
        push(hub, finished)


def test_offline_is_said(finished, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "a token of nobody")
    assert "HF_HUB_OFFLINE is set" in refusal(run("push", finished, REPO))


def test_problems_of_several_kinds_come_in_one_message(hub, checkpoint):
    (checkpoint / "hf_qep_eval.json").unlink()
    with pytest.raises(PublishError) as caught:
        push(hub, checkpoint, "bob/x", public=True, gated="no")
    for part in ("hf_qep_eval.json", "'bob'", "--gated"):
        assert part in str(caught.value)
    assert re.search(r"\. Also: ", str(caught.value))


def test_options_have_safe_defaults():
    options = PushOptions()
    assert not (options.public or options.accept_license or options.overwrite or options.create_pr)
