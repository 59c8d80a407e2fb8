"""What strangers and slips must not be able to do, from end to end through the loopback Hub.

Elsewhere: files and configs that lie before they are loaded (tests/hostile, tests/plugin/test_damaged_checkpoints.py),
each rule of a folder by itself (test_preflight.py, test_allowed.py, test_secrets.py), code that is not run by a check
(test_verify.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hf_qep.errors import PublishError
from hf_qep.hub.allowed import LOADER
from hf_qep.hub.verify import verify
from tests.cli.test_commands import refusal, run
from tests.hub.checkpoints import BASE, edit_json
from tests.hub.pushing import REPO, add_base, client, content, plan, push, writes

SMALL = ("--num-samples", 2, "--seq-len", 16, "--method", "rtn", "--dtype", "float32")


def all_text(folder: Path) -> str:
    """Every byte below a folder, as text."""
    return "\n".join(p.read_bytes().decode("latin-1") for p in sorted(folder.rglob("*")) if p.is_file())


# --- code


@pytest.fixture
def trap(loopback_hub, float_checkpoint, tmp_path):
    """(id, marker) of an original on the Hub that brings its own code and asks for it to be run."""
    marker, folder = tmp_path / "ran", tmp_path / "trap"
    shutil.copytree(float_checkpoint, folder)
    code = f"open({str(marker)!r}, 'w')\nclass Model: pass\n"
    for name in ("modeling_trap.py", LOADER, "setup.py"):
        (folder / name).write_text(code)
    auto = {"AutoConfig": "modeling_trap.Model", "AutoModelForCausalLM": "modeling_trap.Model"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=auto, trust_remote_code=True))
    edit_json(
        folder / "tokenizer_config.json",
        lambda config: config.update(auto_map={"AutoTokenizer": ["modeling_trap.Model", None]}),
    )
    loopback_hub.add_repo("acme/trap", files=content(folder), card={"license": "mit"})
    return "acme/trap", marker


def test_code_of_an_original_is_not_fetched_not_run_and_not_published(loopback_hub, trap, tmp_path):
    name, marker = trap
    out, text = tmp_path / "out", tmp_path / "t.txt"
    text.write_text("He walked down to the river in the morning. " * 20)
    done = run("quantize", name, "--out", out, "--dataset", text, *SMALL)
    assert done.exit_code == 0, (done.output, done.exception)
    assert not marker.exists()
    assert not any(path.endswith(".py") for _, path, _ in loopback_hub.log)
    assert list(out.glob("*.py")) == []
    done = run("eval", out, "--max-tokens", 200, "--window", 64)
    assert done.exit_code == 0, (done.output, done.exception)
    card = "---\nlicense: mit\nlibrary_name: transformers\ntags: [hf-qep]\n---\n# x\n"
    (out / "README.md").write_text(card)
    push(loopback_hub, out)
    published = loopback_hub.files(REPO)
    assert not any(name.endswith(".py") for name in published)
    for word in (b"modeling_trap", b"auto_map", b"trust_remote_code"):
        assert word not in b"".join(published.values())
    assert not marker.exists()


def test_pickles_and_scripts_beside_the_weights_stay_at_home(loopback_hub, checkpoint, tmp_path):
    add_base(loopback_hub)
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR."
    for name in ("pytorch_model.bin", "optimizer.pt", "start.bat"):
        (checkpoint / name).write_bytes(bomb)
    said = refusal(run("push", checkpoint, REPO))
    for name in ("pytorch_model.bin", "optimizer.pt", "start.bat"):
        assert name in said
    assert not loopback_hub.has_repo(REPO)
    assert not (tmp_path / "opened").exists()


# --- paths


def test_an_index_of_an_original_on_the_hub_reads_nothing_outside(loopback_hub, float_checkpoint, tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((float_checkpoint / "model.safetensors").read_bytes())
    files = content(float_checkpoint)
    weights = files.pop("model.safetensors")
    for name in (str(secret), "../../../../secret.safetensors"):
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        files |= {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "model-00001-of-00001.safetensors": weights,
        }
        loopback_hub.add_repo("acme/reads-out", files=files)
        said = refusal(run("quantize", "acme/reads-out", "--out", tmp_path / "out", *SMALL))
        assert "only plain file names inside the folder" in said
        assert not (tmp_path / "out").exists()
        shutil.rmtree(loopback_hub.home / "hf" / "hub")


@pytest.mark.parametrize("name", ["../../evil.json", "plots/../../evil.png", "/evil.json", "sub/../../config.json"])
def test_names_on_the_hub_that_lead_out_are_neither_fetched_nor_written(loopback_hub, finished, name, tmp_path):
    loopback_hub.add_repo(REPO, files=content(finished) | {name: b"x"})
    before = set(tmp_path.parent.rglob("*evil*"))
    report = verify(REPO, remote=client(loopback_hub))
    assert any(repr(name) in sentence for sentence in report.differs)
    assert set(tmp_path.parent.rglob("*evil*")) == before
    assert not list(loopback_hub.home.rglob("*evil*"))


@pytest.mark.parametrize("base", ["../api", "..", "alice/..", "a/b/../c", "alice/x?y=1", "alice/x#y", "alice/%2e%2e"])
def test_an_original_named_in_a_card_cannot_lead_the_client_elsewhere(loopback_hub, checkpoint, base):
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace(f"base_model: {BASE}", f"base_model: {json.dumps(base)}"))
    checked = plan(loopback_hub, checkpoint)
    assert any("`base_model` names" in problem for problem in checked.problems)
    asked = {path for _, path, _ in loopback_hub.log}
    assert asked <= {"/api/whoami-v2", f"/api/models/{REPO}", "/api/validate-yaml"}


def test_a_link_is_not_followed_whatever_it_is_called(loopback_hub, checkpoint, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("words that are nobody's business")
    (checkpoint / "LICENSE").symlink_to(secret)
    with pytest.raises(PublishError, match="'LICENSE' is a link"):
        push(loopback_hub, checkpoint)
    assert writes(loopback_hub) == []


# --- tokens


def test_the_token_goes_to_the_hub_only_and_into_no_file(loopback_hub, checkpoint, float_checkpoint, tmp_path, caplog):
    add_base(loopback_hub)
    caplog.set_level("DEBUG")
    loopback_hub.state.part_size = 16384
    words = []
    for command in (
        ("push", checkpoint, REPO, "--dry-run"),
        ("push", checkpoint, REPO, "--json"),
        ("push", checkpoint, REPO),
        ("verify", REPO, "--baseline", float_checkpoint),
        ("verify", REPO, "--json"),
        ("env",),
        ("env", "--json"),
    ):
        result = run(*command)
        assert result.exit_code == 0, (command, result.output, result.exception)
        words.append(result.output)
    assert loopback_hub.leaks == []
    assert sum("/upload/" in path for _, path, _ in loopback_hub.log) > 0
    assert sum("/content/" in path for _, path, _ in loopback_hub.log) > 0
    places = [*words, caplog.text, all_text(checkpoint), all_text(loopback_hub.home), repr(loopback_hub.log)]
    places += [data.decode("latin-1") for data in loopback_hub.files(REPO).values()]
    assert not any(loopback_hub.token in place for place in places)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_an_answer_that_repeats_the_token_is_not_repeated(loopback_hub, finished, status, as_json, monkeypatch):
    add_base(loopback_hub)
    echo = {"X-Error-Message": f"the token {loopback_hub.token} in Authorization: Bearer {loopback_hub.token} is bad"}
    for path in ("/commit/", "/whoami"):
        loopback_hub.fail("*", path, status, times=1, headers=echo)
        result = run("push", finished, REPO, *(["--json"] if as_json else []))
        assert result.exit_code == 2
        assert f"answered {status}" in " ".join(result.output.split())
        assert loopback_hub.token not in result.output
        assert loopback_hub.token not in str(result.exception)


def test_a_traceback_for_developers_does_not_show_the_request(loopback_hub, finished, monkeypatch):
    import traceback

    add_base(loopback_hub)
    monkeypatch.setenv("HF_QEP_DEBUG", "1")
    loopback_hub.fail("*", "/commit/", 403, headers={"X-Error-Message": loopback_hub.token})
    result = run("push", finished, REPO)
    shown = "".join(traceback.format_exception(result.exception))
    assert "cannot commit" in shown
    assert loopback_hub.token not in shown
    assert "Bearer" not in shown


def test_addresses_of_storage_that_act_as_keys_are_not_shown(loopback_hub, finished):
    add_base(loopback_hub)
    loopback_hub.fail("PUT", "/upload/", 403)
    with pytest.raises(PublishError) as caught:
        push(loopback_hub, finished)
    assert "cannot upload model.safetensors" in str(caught.value)
    assert not any(ticket in str(caught.value) for ticket in loopback_hub.state.tickets)


def test_the_token_in_use_blocks_a_push_that_would_publish_it(loopback_hub, checkpoint, monkeypatch):
    add_base(loopback_hub)
    monkeypatch.delenv("HF_TOKEN")
    token = loopback_hub.token
    (checkpoint / "LICENSE").write_text(f"made with {token}")
    found = plan(loopback_hub, checkpoint).unsafe
    assert found
    assert not any(token in sentence for sentence in found)


@pytest.mark.parametrize("target", ["loopback", "folder"])
def test_what_a_stranger_wrote_is_shown_as_text(loopback_hub, checkpoint, target):
    """Names and errors from files reach a terminal through tables that print, not interpret, them."""
    name = "[bold red]x\x1b[31m.txt"
    (checkpoint / name).write_text("x")
    if target == "loopback":
        loopback_hub.add_repo(REPO, files=content(checkpoint))
    result = run("verify", REPO if target == "loopback" else checkpoint)
    assert result.exit_code == 3
    assert "\x1b[31m" not in result.output
    assert "[bold red]" in result.output
