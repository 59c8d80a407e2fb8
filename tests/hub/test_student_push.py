"""`hf-qep push` and `hf-qep verify` of a float student, against the loopback Hub and in fresh processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hf_qep.engine.headers import MANIFEST, SINGLE_FILE
from hf_qep.errors import PublishError
from hf_qep.hub import remote
from hf_qep.hub.allowed import DISTILLATION, LOADER, STUDENT_CODE
from hf_qep.hub.cards.card import sealed
from hf_qep.hub.cards.distilled import unsealed
from hf_qep.hub.preflight import check_folder
from hf_qep.hub.verify import verify
from hf_qep.remote_code import add_remote_code
from tests.cli.test_commands import refusal, run
from tests.hub.checkpoints import TEXT, edit_json
from tests.hub.pushing import Nth, client, content, plan, push, writes
from tests.hub.students import AUTO, STUDENT_REPO, TEACHER, make_student, save_expected
from tests.hub.test_student_folder import shift_weights, written_again
from tests.loopback_hub.faults import Faults
from tests.plugin.processes import BLOCKED, QUIET, run_python

LOAD = QUIET + (
    "inputs, expected = torch.load({expected!r})\n"
    "model = transformers.{auto}.from_pretrained({repo!r}, **{options!r}).eval()\n"
    "with torch.no_grad():\n    print(type(model).__name__, torch.equal(model(**inputs).logits, expected))\n"
)


@pytest.fixture(scope="module", params=[True, False], ids=["its own class", "a stock class"])
def trained(request, tmp_path_factory) -> Path:
    return make_student(tmp_path_factory.mktemp("trained") / "tiny-sorter", mixed=request.param)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    return make_student(tmp_path_factory.mktemp("mixed") / "tiny-sorter")


@pytest.fixture
def student(mixed, tmp_path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(mixed, tmp_path / mixed.name))


def add_teacher(hub, licence: str | None = "apache-2.0", name: str = TEACHER, **more) -> None:
    hub.add_repo(name, card={"library_name": "transformers"} | ({"license": licence} if licence else {}), **more)


@pytest.fixture
def hub(loopback_hub):
    add_teacher(loopback_hub)
    return loopback_hub


# --- the plain case


def test_a_student_is_pushed_loaded_in_fresh_processes_and_verified(hub, trained, tmp_path):
    result = run("push", trained, STUDENT_REPO, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    said = json.loads(result.stdout)
    assert hub.files(STUDENT_REPO) == content(trained)
    assert hub.repo(STUDENT_REPO).private
    assert hub.repo(STUDENT_REPO).commit("main").title == "Upload tiny-sorter: weights, card and record"
    assert said["warnings"] == []
    save_expected(trained, tmp_path / "expected.pt")
    own = (trained / STUDENT_CODE).is_file()
    name = "StudentBertForSequenceClassification" if own else "BertForSequenceClassification"
    ways = [("import hf_qep\n", {}), (BLOCKED, {"trust_remote_code": True} if own else {})]
    for start, options in ways:
        code = LOAD.format(expected=str(tmp_path / "expected.pt"), auto=AUTO, repo=STUDENT_REPO, options=options)
        done = hub.run_python(start + code)
        assert done.stdout.split() == [name, "True"], done.stderr
    checked = run("verify", STUDENT_REPO, "--json")
    assert checked.exit_code == 0, checked.output
    report = json.loads(checked.stdout)
    assert report["ok"]
    assert {f"checksums of {DISTILLATION}", f"it loads as {name}, and its weights are finite"} <= set(report["agrees"])
    assert f"the card is what hf-qep writes from {DISTILLATION}" in report["agrees"]
    assert any("scores of the task (accuracy, auc, nll)" in line for line in report["not_checked"])
    assert hub.leaks == []


def test_a_dry_run_changes_nothing_and_says_what_the_push_then_does(hub, trained):
    result = run("push", trained, STUDENT_REPO, "--dry-run", "--json", "--public")
    said = json.loads(result.stdout)
    assert (result.exit_code, said["problems"], said["warnings"]) == (0, [], [])
    assert writes(hub) == [] and not hub.has_repo(STUDENT_REPO)
    pushed = push(hub, trained, STUDENT_REPO, public=True)
    assert (said["visibility"], said["gate"], said["licence"]) == (pushed.visibility, pushed.gate, "apache-2.0")
    assert {f["path"] for f in said["files"]} == set(hub.files(STUDENT_REPO)) == set(content(trained))
    assert not hub.repo(STUDENT_REPO).private
    assert push(hub, trained, STUDENT_REPO, public=True).changed is False


def test_the_card_must_name_the_repository(hub, trained):
    with pytest.raises(PublishError, match="--card --repo-id alice/other"):
        push(hub, trained, "alice/other")
    assert writes(hub) == []


def test_another_card_than_that_of_the_file_is_not_pushed(hub, student):
    edit_json(student / DISTILLATION, lambda f: f["models"]["teacher"]["score"].update(accuracy=0.5))
    assert "the card is not what hf-qep writes" in refusal(run("push", student, STUDENT_REPO))
    assert writes(hub) == []


# --- faults


@pytest.mark.parametrize("kind", ["reset", "after"])
def test_a_push_outlives_each_of_its_requests_failing_once(hub, student, kind):
    push(hub, student, STUDENT_REPO, public=True)
    for number in range(len(hub.log)):
        start_again(hub)
        hub.faults = Nth(number, kind)
        push(hub, student, STUDENT_REPO, public=True)
        hub.faults = Faults()
        assert hub.files(STUDENT_REPO) == content(student)
        assert not hub.repo(STUDENT_REPO).private


def test_a_push_that_dies_shows_nothing_half_and_goes_on(hub, student, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    push(hub, student, STUDENT_REPO, public=True)
    for number in range(len(hub.log)):
        start_again(hub)
        hub.faults = Nth(number, "after", dead=True)
        with pytest.raises(PublishError):
            push(hub, student, STUDENT_REPO, public=True)
        hub.faults = Faults()
        if hub.has_repo(STUDENT_REPO):
            files = hub.files(STUDENT_REPO)
            assert files in ({}, content(student))
            assert files or hub.repo(STUDENT_REPO).private
        push(hub, student, STUDENT_REPO, public=True)
        assert hub.files(STUDENT_REPO) == content(student)


def start_again(hub) -> None:
    """The Hub as it was before the push."""
    hub.state.repos.clear()
    hub.state.store.clear()
    hub.faults = Faults()
    add_teacher(hub)
    hub.log.clear()


# --- where to


def test_a_student_and_a_packed_model_replace_each_other_only_if_asked(hub, student, checkpoint):
    hub.add_repo(STUDENT_REPO, files=content(checkpoint), private=True)
    with pytest.raises(PublishError, match="holds a quantised model"):
        push(hub, student, STUDENT_REPO)
    push(hub, student, STUDENT_REPO, overwrite=True)
    assert hub.files(STUDENT_REPO) == content(student)
    assert any("holds a float student" in said for said in plan(hub, checkpoint, STUDENT_REPO).problems)


# --- licence, gate, teacher


@pytest.mark.parametrize(
    ("licence", "options", "message"),
    [
        (
            "cc-by-nd-4.0",
            {"accept_license": True, "gated": "auto"},
            "may not be published: .*weights made from it",
        ),
        ("cc-by-nc-4.0", {}, "pass --accept-license"),
        ("cc-by-nc-4.0", {"accept_license": True, "gated": "none"}, "must stand behind a gate"),
        ("nobody-knows", {}, "this may not be published"),
        (None, {}, "the licence|this may not be published: no licence is known"),
    ],
)
def test_the_terms_of_the_teacher_are_kept(loopback_hub, student, licence, options, message):
    add_teacher(loopback_hub, licence)
    written_again(student, lambda facts: facts["made_of"].update(licence=licence))
    with pytest.raises(PublishError, match=message):
        push(loopback_hub, student, STUDENT_REPO, public=True, **options)
    assert writes(loopback_hub) == []


def test_a_noncommercial_student_stands_behind_a_gate(loopback_hub, student):
    add_teacher(loopback_hub, "cc-by-nc-4.0")
    written_again(student, lambda facts: facts["made_of"].update(licence="cc-by-nc-4.0"))
    assert push(loopback_hub, student, STUDENT_REPO, public=True, accept_license=True).gate == "auto"
    assert "extra_gated_prompt" in loopback_hub.files(STUDENT_REPO)["README.md"].decode()


def test_the_gate_of_the_teacher_is_inherited(loopback_hub, student):
    add_teacher(loopback_hub, gated="manual")
    assert push(loopback_hub, student, STUDENT_REPO, public=True).gate == "manual"


def test_a_licence_that_the_hub_says_otherwise_is_a_problem(loopback_hub, student):
    add_teacher(loopback_hub, "mit")
    with pytest.raises(PublishError, match="the licences differ: card 'apache-2.0', 'distillation.json' .*'mit'"):
        push(loopback_hub, student, STUDENT_REPO, public=True)


def test_a_teacher_that_is_not_there_is_shown_to_nobody(loopback_hub, student):
    with pytest.raises(PublishError, match="the original acme/tiny-bert could not be looked up"):
        push(loopback_hub, student, STUDENT_REPO, public=True)
    assert any("could not be looked up" in said for said in plan(loopback_hub, student, STUDENT_REPO).warnings)


def test_teacher_and_first_weights_must_both_allow_it(hub, student):
    def other(facts):
        facts["start"] = "acme/small"
        facts["made_of"]["start_licence"] = "mit"

    add_teacher(hub, "mit", "acme/small")
    written_again(student, other)
    found = plan(hub, student, STUDENT_REPO, public=True)
    assert (found.problems, found.licence) == ([], "mit")
    hub.state.repos.clear()
    add_teacher(hub, "mit", "acme/small")
    add_teacher(hub, "apache-2.0", gated="auto")
    assert plan(hub, student, STUDENT_REPO, public=True).gate == "auto"
    written_again(student, lambda facts: facts["made_of"].update(licence="cc-by-nd-4.0"))
    assert any("may not be published" in said for said in plan(hub, student, STUDENT_REPO, public=True).problems)


def test_a_student_of_a_folder_names_no_original(hub, tmp_path):
    folder = make_student(tmp_path / "s", mixed=False, teacher_name="tiny-bert")
    found = plan(hub, folder, STUDENT_REPO)
    assert found.problems == [] and any("no original is named" in said for said in found.warnings)


# --- verify


def test_what_was_changed_is_found_in_a_folder(student):
    assert verify(str(student)).differs == []
    shift_weights(student)
    (said,) = verify(str(student)).differs
    assert SINGLE_FILE in said


def test_results_of_a_card_that_are_not_those_of_the_file_differ(student):
    path = student / "README.md"
    path.write_text(sealed(unsealed(path.read_text()).replace("value: 0.82", "value: 0.92")))
    (said,) = verify(str(student)).differs
    assert "0.92" in said and "0.82" in said


def test_words_of_another_version_are_not_checked_and_that_is_said(student):
    path = student / "README.md"
    path.write_text(sealed(unsealed(path.read_text()).replace("Safety, bias", "Bias, safety")))
    report = verify(str(student))
    assert report.differs == []
    assert any("the text of the card" in line for line in report.unchecked)


def test_a_student_without_digests_is_not_called_checked(student):
    edit_json(student / DISTILLATION, lambda facts: facts.pop("files"))
    report = verify(str(student))
    assert report.differs == []
    assert f"checksums: {DISTILLATION!r} has none" in report.unchecked


def test_code_on_the_hub_is_compared_and_never_downloaded(hub, student):
    push(hub, student, STUDENT_REPO)
    assert verify(STUDENT_REPO, remote=client(hub)).differs == []
    assert not list(Path(hub.home).rglob(STUDENT_CODE))
    evil = content(student) | {STUDENT_CODE: (student / STUDENT_CODE).read_bytes() + b"import os\n"}
    hub.state.repos.clear()
    hub.add_repo(STUDENT_REPO, files=evil, private=True)
    report = verify(STUDENT_REPO, remote=client(hub))
    assert any("is not the file that hf_qep writes" in said for said in report.differs)
    assert any("loading and measuring" in said for said in report.unchecked)


def test_weights_that_are_not_finite_differ(student):
    from safetensors.torch import load_file, save_file

    tensors = load_file(student / SINGLE_FILE)
    name = next(name for name in tensors if name.endswith("weight"))
    save_file(tensors | {name: tensors[name] * torch.nan}, student / SINGLE_FILE, metadata={"format": "pt"})
    written_again(student, lambda facts: None)
    assert any("NaN" in said for said in verify(str(student)).differs)


# --- quantised afterwards


@pytest.fixture(scope="module")
def packed(mixed, tmp_path_factory) -> Path:
    """The student of its own class, quantised with the loader."""
    work = tmp_path_factory.mktemp("packed")
    (work / "river.txt").write_text(TEXT)
    small = ("--dataset", work / "river.txt", "--num-samples", 4, "--seq-len", 16, "--method", "rtn")
    done = run("quantize", mixed, "--out", work / "q", *small, "--dtype", "float32")
    assert done.exit_code == 0, (done.output, done.exception)
    return work / "q"


def test_a_quantised_student_is_a_checkpoint_that_carries_its_code(packed, mixed):
    assert (packed / STUDENT_CODE).read_bytes() == (mixed / STUDENT_CODE).read_bytes()
    assert STUDENT_CODE in json.loads((packed / MANIFEST).read_text())["files"]
    assert not (packed / DISTILLATION).exists()
    (said,) = check_folder(packed).warnings
    assert "hf-qep quantize --remote-code" in said
    loaded = run("inspect", packed, "--json")
    assert loaded.exit_code == 0, loaded.output


def test_with_the_loader_it_needs_the_package_and_says_so(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "q"))
    add_remote_code(folder)
    first = content(folder)
    add_remote_code(folder)
    assert content(folder) == first and STUDENT_CODE not in first and LOADER in first
    code = (
        QUIET
        + f"m = transformers.{AUTO}.from_pretrained({str(folder)!r}, trust_remote_code=True)\nprint(type(m).__name__)"
    )
    done = run_python(code, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.stdout.split() == ["StudentBertForSequenceClassification"], done.stderr
    done = run_python(BLOCKED + code, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode and "this checkpoint is quantised with hf-qep; run: pip install hf-qep" in done.stderr


# --- from the first command to the last


def test_what_the_commands_write_is_what_a_push_accepts(loopback_hub, tmp_path, monkeypatch):
    from hf_qep.students.family import teacher_shape
    from tests.students.specs import mixed_spec
    from tests.students.teachers import teacher
    from tests.tiny_models import build_tokenizer

    model = teacher("llama")
    model.save_pretrained(tmp_path / "float")
    build_tokenizer().save_pretrained(tmp_path / "float")
    loopback_hub.add_repo("acme/tiny-llama", files=content(tmp_path / "float"), card={"license": "mit"})
    rows = [{"prompt": f"is {n % 7} > {n % 5}?", "completion": "yes" if n % 7 > n % 5 else "no"} for n in range(40)]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "spec.json").write_text(json.dumps(mixed_spec(teacher_shape(model)).to_dict()))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    work, out = tmp_path / "work", tmp_path / "tiny-digits"
    task = ("--task", "causal-lm", "--answer", "yes", "--answer", "no", "--data", tmp_path / "digits.jsonl")
    commands = [
        ("distill", "analyze", "acme/tiny-llama", *task, "--out", work),
        ("distill", "train", work, "--spec", tmp_path / "spec.json", "--epochs", 1, "--baselines", "--out", out),
        ("distill", "report", out, "--card", "--repo-id", "alice/tiny-digits", "--specialised-for", "comparing digits"),
        ("push", out, "alice/tiny-digits", "--public"),
        ("verify", "alice/tiny-digits"),
    ]
    for words in commands:
        done = run(*words)
        assert done.exit_code == 0, (words, done.output, done.exception)
    assert "everything that was checked agrees" in done.stdout
    assert loopback_hub.files("alice/tiny-digits") == content(out)
    assert "base_model: acme/tiny-llama" in (out / "README.md").read_text()
