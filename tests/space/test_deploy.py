"""`space deploy` against the loopback Hub: made, updated, waited for, read back; and everything that can go wrong."""

from __future__ import annotations

import json

import pytest

from hf_qep.errors import SpaceError, UnsafeContentError
from hf_qep.hub.remote import TRIES, HubRefusal, Remote
from hf_qep.hub.space import DeployOptions, deploy, plan_deploy, refuse
from hf_qep.hub.space_folder import SpaceSettings, write_space
from tests.cli.test_commands import refusal, run

SPACE_ID = "alice/compare"


@pytest.fixture
def hub(loopback_hub):
    """A Hub that has both models."""
    for name in ("acme/tiny-1bit", "acme/tiny"):
        loopback_hub.add_repo(name, files={"config.json": b"{}"})
    return loopback_hub


@pytest.fixture
def folder(tmp_path):
    """A small Space: the package comes as a requirement."""
    from hf_qep.hub.space_folder import SpaceReadme

    out = tmp_path / "space"
    write_space(out, SpaceSettings("acme/tiny-1bit", "", "acme/tiny"), SpaceReadme(requirement="hf-qep==0.1.0"))
    return out


@pytest.fixture
def remote(hub, hub_api):
    return Remote(hub_api, sleep=lambda seconds: None)


def deployed(folder, remote, **options):
    plan = plan_deploy(folder, SPACE_ID, DeployOptions(**options), remote=remote)
    return deploy(plan, remote=remote, sleep=lambda seconds: None)


def writes(hub) -> list[tuple[str, str]]:
    return [(method, path) for method, path, _ in hub.log if method in ("POST", "PUT", "DELETE")]


def local(folder) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_new_space_is_private_complete_and_pinned(hub, folder, remote):
    result = deployed(folder, remote, hardware="cpu-upgrade", secrets={"HF_TOKEN": hub.read_token})
    space = hub.repo(SPACE_ID, "space")
    assert (result.stage, result.visibility, result.hardware, result.changed) == (
        "RUNNING",
        "private",
        "cpu-upgrade",
        True,
    )
    assert space.private
    assert space.sdk == "gradio"
    assert hub.files(SPACE_ID, repo_type="space") == local(folder)
    heads = {name: remote.repo(name).head for name in ("acme/tiny-1bit", "acme/tiny")}
    assert space.variables == {
        "MODEL_ID": "acme/tiny-1bit",
        "MODEL_REVISION": heads["acme/tiny-1bit"],
        "BASE_ID": "acme/tiny",
        "BASE_REVISION": heads["acme/tiny"],
    }
    assert space.secrets == {"HF_TOKEN": hub.read_token}
    assert hub.read_token not in json.dumps(result.to_dict())
    assert all(hub.read_token.encode() not in content for content in hub.files(SPACE_ID, repo_type="space").values())


def test_again_changes_nothing(hub, folder, remote):
    first = deployed(folder, remote)
    before, commits = len(writes(hub)), len(hub.repo(SPACE_ID, "space").commits)
    second = deployed(folder, remote)
    assert (second.changed, second.commit, second.stage) == (False, first.commit, "RUNNING")
    assert len(writes(hub)) == before
    assert len(hub.repo(SPACE_ID, "space").commits) == commits


def test_an_update_sends_what_differs_and_removes_what_is_gone(hub, folder, remote):
    (folder / "extra.py").write_text("OLD = 1\n")
    deployed(folder, remote)
    (folder / "extra.py").unlink()
    (folder / "texts.py").write_text((folder / "texts.py").read_text() + "\n# changed\n")
    plan = plan_deploy(folder, SPACE_ID, DeployOptions(), remote=remote)
    assert (plan.sends, plan.deletes, plan.new_variables) == (["texts.py"], ["extra.py"], {})
    assert deploy(plan, remote=remote, sleep=lambda seconds: None).changed
    assert hub.files(SPACE_ID, repo_type="space") == local(folder)


def test_visibility_changes_only_when_asked(hub, folder, remote):
    deployed(folder, remote)
    assert deployed(folder, remote, public=True).visibility == "public"
    assert deployed(folder, remote).visibility == "public"
    assert deployed(folder, remote, public=False).visibility == "private"


@pytest.mark.parametrize("stage", ["BUILD_ERROR", "RUNTIME_ERROR"])
def test_a_failed_build_is_an_error_that_names_the_log(hub, folder, remote, stage):
    hub.state.space_goal = stage
    with pytest.raises(SpaceError, match=f"ended in {stage}.*logs="):
        deployed(folder, remote)
    hub.state.space_goal = "RUNNING"
    (folder / "texts.py").write_text((folder / "texts.py").read_text() + "\n# mended\n")
    assert deployed(folder, remote).stage == "RUNNING"


def test_a_space_that_takes_too_long_is_left_alone_and_said_so(hub, folder, remote):
    hub.state.space_polls = 10**6
    with pytest.raises(SpaceError, match="still BUILDING after 20 seconds.*--timeout"):
        deployed(folder, remote, timeout_s=20)
    assert deployed(folder, remote, wait=False).stage is None


def test_a_paused_space_is_woken(hub, folder, remote):
    deployed(folder, remote)
    hub.repo(SPACE_ID, "space").runtime.stage = "PAUSED"
    assert deployed(folder, remote).stage == "RUNNING"


@pytest.mark.parametrize("what", ["gradio", "l4x1"])
def test_a_plan_that_must_be_paid_for_is_explained(hub, folder, remote, what):
    hub.state.unpaid.add(what)
    with pytest.raises(SpaceError, match="402.*paid plan.*hf-qep space run"):
        deployed(folder, remote, hardware="l4x1")


@pytest.mark.parametrize("kind", ["status", "reset", "after"])
@pytest.mark.parametrize("step", ["repos/create", "variables", "secrets", "hardware", "commit", "runtime", "tree"])
def test_one_failure_at_any_step_changes_nothing_in_the_end(hub, folder, remote, step, kind):
    method = "GET" if step in ("runtime", "tree") else "POST"
    hub.fail(method, step, **({"status": 503} if kind == "status" else {"kind": kind}))
    result = deployed(folder, remote, hardware="cpu-upgrade", secrets={"HF_TOKEN": hub.read_token})
    assert result.stage == "RUNNING"
    assert hub.files(SPACE_ID, repo_type="space") == local(folder)
    assert len([c for c in hub.repo(SPACE_ID, "space").commits]) <= 2, "the files were committed twice"


def test_what_stops_half_way_is_finished_by_the_same_command(hub, folder, remote):
    hub.fail("POST", "/commit/", status=503, times=TRIES)
    with pytest.raises(HubRefusal, match="503"):
        deployed(folder, remote)
    assert "app.py" not in hub.files(SPACE_ID, repo_type="space")
    assert deployed(folder, remote).stage == "RUNNING"
    assert hub.files(SPACE_ID, repo_type="space") == local(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "weights.bin").write_bytes(b"x"), "weights.bin"),
        (lambda f: (f / ".env").write_text("A=1"), ".env"),
        (lambda f: (f / "app.py").unlink(), "app.py"),
        (lambda f: (f / "texts.py").write_text("KEY = '" + "hf_" + "aB3d" * 9 + "'"), "Hugging Face token"),
        (lambda f: (f / "more.py").symlink_to(f / "app.py"), "link"),
        (lambda f: (f / "README.md").write_text("---\nsdk: docker\n---\n"), "sdk: gradio"),
        (lambda f: (f / "README.md").write_text("no front matter"), "sdk"),
        (lambda f: (f / "settings.json").write_text("{}"), "MODEL_ID"),
        (lambda f: (f / "settings.json").write_text('{"MODEL_ID": "acme/absent"}'), "acme/absent is not on the Hub"),
        (
            lambda f: (f / "settings.json").write_text(json.dumps({"MODEL_ID": str(f)})),
            "absolute path|folder of this machine",
        ),
        (
            lambda f: (f / "settings.json").write_text('{"MODEL_ID": "acme/tiny", "MODEL_REVISION": "gone"}'),
            "no revision 'gone'",
        ),
    ],
)
def test_a_folder_that_must_not_go_out_is_refused_before_anything_is_made(hub, folder, remote, spoil, said):
    spoil(folder)
    plan = plan_deploy(folder, SPACE_ID, DeployOptions(), remote=remote)
    with pytest.raises((SpaceError, UnsafeContentError), match=said):
        refuse(plan)
    assert writes(hub) == []


def test_what_python_leaves_behind_stays_at_home(hub, folder, remote):
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "app.cpython-311.pyc").write_bytes(b"\0")
    deployed(folder, remote)
    assert not [name for name in hub.files(SPACE_ID, repo_type="space") if "pyc" in name]


def test_a_token_that_may_not_write_is_refused(hub, folder):
    from huggingface_hub import HfApi

    reader = Remote(HfApi(endpoint=hub.endpoint, token=hub.read_token), sleep=lambda seconds: None)
    plan = plan_deploy(folder, SPACE_ID, DeployOptions(), remote=reader)
    with pytest.raises(SpaceError, match="may not write"):
        refuse(plan)


def test_private_models_need_a_secret_and_the_own_token_is_warned_of(hub, folder, remote):
    hub.repo("acme/tiny-1bit").private = True
    warned = plan_deploy(folder, SPACE_ID, DeployOptions(), remote=remote).warnings
    assert any("acme/tiny-1bit is private" in sentence for sentence in warned)
    options = DeployOptions(public=True, secrets={"HF_TOKEN": hub.token})
    warned = " ".join(plan_deploy(folder, SPACE_ID, options, remote=remote).warnings)
    assert "is private: the Space needs" not in warned
    assert "everybody can use it" in warned
    assert "only read is safer" in warned


def test_specialists_are_looked_up_and_pinned_like_the_models(hub, tmp_path, remote):
    from hf_qep.hub.space_folder import SpaceReadme

    heads = {}
    for name in ("acme/deals", "acme/glyphs"):
        hub.add_repo(name, files={"specialist.json": b"{}"})
        heads[name] = hub.repo(name).branches["main"]
    settings = SpaceSettings("acme/tiny-1bit", specialists=f"acme/deals, acme/glyphs@{heads['acme/glyphs']}")
    write_space(tmp_path / "space", settings, SpaceReadme(requirement="hf-qep==0.1.0"))
    assert "acme/deals" in (tmp_path / "space" / "README.md").read_text()
    plan = plan_deploy(tmp_path / "space", SPACE_ID, remote=remote)
    assert plan.problems == []
    assert plan.variables["SPECIALISTS"] == ",".join(f"{name}@{head}" for name, head in heads.items())


@pytest.mark.parametrize(
    ("specialists", "said"),
    [
        ("acme/gone", "acme/gone is not on the Hub"),
        ("acme/tiny@no-such", "no revision 'no-such'; correct SPECIALISTS"),
        ("mine", "SPECIALISTS is a folder of this machine"),
    ],
)
def test_specialists_that_a_space_cannot_have_are_refused(hub, tmp_path, remote, monkeypatch, specialists, said):
    from hf_qep.hub.space_folder import SpaceReadme

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    settings = SpaceSettings("acme/tiny-1bit", specialists=specialists)
    write_space(tmp_path / "space", settings, SpaceReadme(requirement="hf-qep==0.1.0"))
    plan = plan_deploy(tmp_path / "space", SPACE_ID, remote=remote)
    assert [problem for problem in plan.problems if said in problem]


def test_the_command_line(hub, folder, monkeypatch):
    monkeypatch.setattr("hf_qep.hub.space.POLL_S", 0.01)
    monkeypatch.setenv("READ_TOKEN", hub.read_token)
    words = ("space", "deploy", folder, SPACE_ID, "--secret-from-env", "HF_TOKEN=READ_TOKEN")
    dry = run(*words, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["send"] == sorted(local(folder))
    assert not hub.has_repo(SPACE_ID, "space")
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["stage"], found["secrets"], found["visibility"]) == ("RUNNING", ["HF_TOKEN"], "private")
    assert hub.read_token not in dry.output + done.output
    table = run("space", "deploy", folder, SPACE_ID, "--quiet")
    assert "no commit was made" in table.stdout
    assert "NOT_SET" in refusal(run("space", "deploy", folder, SPACE_ID, "--secret-from-env", "NOT_SET"))
    assert "space init" in refusal(run("space", "deploy", folder / "none", SPACE_ID))
