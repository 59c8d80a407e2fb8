"""The folder of a float student before it is pushed: complete, its own, and what `distillation.json` says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf_qep.engine.headers import SINGLE_FILE
from hf_qep.hub.allowed import DISTILLATION, LOADER, REQUIRED_OF_STUDENT, STUDENT, STUDENT_CODE, kind_of, weight_bytes
from hf_qep.hub.cards.card import sealed
from hf_qep.hub.cards.distilled import unsealed, write_student_card
from hf_qep.hub.preflight import check_folder
from tests.hub.checkpoints import edit_json
from tests.hub.students import STUDENT_REPO, TEACHER, make_student, write_distillation


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    return make_student(tmp_path_factory.mktemp("mixed") / "tiny-sorter")


@pytest.fixture
def student(mixed, tmp_path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(mixed, tmp_path / mixed.name))


def facts_of(folder: Path) -> dict:
    return json.loads((folder / DISTILLATION).read_text())


def written_again(folder: Path, change: Callable[[dict], None]) -> Path:
    """distillation.json with a change and digests that fit, and a new card from it."""
    facts = facts_of(folder)
    facts.pop("files", None)
    change(facts)
    write_distillation(folder, facts)
    write_student_card(folder, repo_id=STUDENT_REPO, overwrite=True)
    return folder


def problems(folder: Path) -> str:
    return "\n".join(check_folder(folder).problems)


@pytest.mark.parametrize("kind", [True, False], ids=["its own class", "a stock class"])
def test_a_student_as_it_was_trained_has_no_problems(kind, mixed, tmp_path):
    folder = mixed if kind else make_student(tmp_path / "s", mixed=False)
    report = check_folder(folder)
    assert report.problems == report.warnings == []
    assert report.is_student
    assert (folder / STUDENT_CODE).is_file() == kind
    assert [(o.name, o.licence) for o in report.origins] == [(TEACHER, "apache-2.0")]
    assert kind_of(DISTILLATION) == "record"


def test_weights_are_counted_without_what_else_is_a_safetensors_file(mixed):
    assert (mixed / "vocab_map.safetensors").is_file()
    assert weight_bytes(mixed) == (mixed / SINGLE_FILE).stat().st_size


@pytest.mark.parametrize("name", [*REQUIRED_OF_STUDENT, STUDENT, SINGLE_FILE])
def test_what_is_missing_is_named_with_the_command_that_makes_it(student, name):
    (student / name).unlink()
    said = problems(student)
    assert name in said
    assert "hf-qep card" not in said and "hf-qep quantize" not in said
    if name != SINGLE_FILE:
        command = "hf-qep distill report" if name == "README.md" else "hf-qep distill train"
        assert f"{name!r} is missing" in said and command in said


def test_a_model_that_was_not_cut_needs_no_note_of_cuts(student):
    (student / STUDENT).unlink()
    written_again(student, lambda facts: facts.update(spec=None, changes={}))
    assert problems(student) == ""


def test_a_student_that_was_only_cut_is_told_to_learn(student):
    (student / DISTILLATION).unlink()
    assert f"{DISTILLATION!r} is missing; run: hf-qep distill train" in problems(student)


def test_a_folder_that_is_neither_is_told_as_before(student):
    for name in (STUDENT, DISTILLATION):
        (student / name).unlink()
    report = check_folder(student)
    assert not report.is_student
    assert "make one with: hf-qep quantize" in "\n".join(report.problems)


# --- the weights


def shift_weights(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    name = next(name for name in tensors if name.endswith("weight"))
    save_file(tensors | {name: tensors[name] + 1}, folder / SINGLE_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json", STUDENT, "vocab_map.safetensors", "tokenizer.json"])
def test_a_file_of_other_content_is_found_by_its_digest(student, name):
    if name == SINGLE_FILE:
        shift_weights(student)
    elif name.endswith(".json"):
        edit_json(student / name, lambda value: value.update(note="x"))
    else:
        save_file({k: v + 1 for k, v in load_file(student / name).items()}, student / name)
    assert f"{name!r} has" in problems(student) and "changed after the student was trained" in problems(student)


def test_without_digests_other_weights_of_the_same_size_pass(student):
    edit_json(student / DISTILLATION, lambda facts: facts.pop("files"))
    shift_weights(student)
    assert problems(student) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f["made_of"].update(student_bytes=f["made_of"]["student_bytes"] - 1), "bytes of weight files"),
        (lambda f: f["models"]["student"].update(parameters=1000), "says 1000 parameters, and the student has"),
        (lambda f: f.update(teacher="acme/other", start="acme/other"), "'student.json' names the teacher"),
    ],
)
def test_sizes_that_are_not_those_of_the_files_are_refused(student, change, said):
    assert said in problems(written_again(student, change))


def test_a_configuration_of_another_model_is_refused(student):
    edit_json(student / "config.json", lambda c: c.update(intermediate_size=17, student_layers=None))
    assert "describes no model that can be built" in problems(student)


def test_a_file_that_is_not_listed_is_refused(student):
    shutil.copy(student / "config.json", student / "generation_config.json")
    assert f"'generation_config.json' is not listed in '{DISTILLATION}'" in problems(student)


# --- the card


@pytest.mark.parametrize("who", ["teacher", "student, before", "student, labels only", "student"])
def test_a_card_of_other_scores_is_refused(student, who):
    edit_json(student / DISTILLATION, lambda f: f["models"][who]["score"].update(accuracy=0.123))
    (said,) = check_folder(student).problems
    assert "the card is not what hf-qep writes from 'distillation.json' (see line" in said
    assert "hf-qep distill report" in said


@pytest.mark.parametrize(
    ("old", "new"),
    [("82.5 ± 6.1", "92.5 ± 6.1"), ("value: 0.82", "value: 0.92"), ("311", "9999"), ("| 3.25 |", "| 0.25 |")],
)
def test_a_number_that_was_changed_and_sealed_again_is_found(student, old, new):
    path = student / "README.md"
    card = unsealed(path.read_text())
    changed = card.replace(old, new)
    assert changed != card
    path.write_text(sealed(changed))
    (said,) = check_folder(student).problems
    assert "see line" in said


@pytest.mark.parametrize("added", ["\nMore words of mine.\n", "\n| score | 99.9 |\n"])
def test_a_card_that_was_changed_by_hand_is_refused(student, added):
    with (student / "README.md").open("a") as card:
        card.write(added)
    (said,) = check_folder(student).problems
    assert "the card is not what hf-qep writes" in said


def test_a_card_of_another_student_is_refused(student, tmp_path):
    other = make_student(tmp_path / "o", mixed=False)
    shutil.copy(other / "README.md", student / "README.md")
    assert "the card is not what hf-qep writes" in problems(student)


def test_a_card_that_is_none_is_refused(student):
    (student / "README.md").write_text("# mine\n")
    assert "it has no metadata" in problems(student)
    (student / "README.md").write_text("---\n- a\n---\n# mine\n")
    assert "hf-qep card" not in problems(student)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"models": 1}', '{"models": {"student": {"score": 3}}}'])
def test_a_broken_distillation_is_a_problem_and_no_crash(student, content):
    (student / DISTILLATION).write_text(content)
    assert DISTILLATION in problems(student)


# --- code, secrets, names


@pytest.mark.parametrize("added", ["\nimport os\n", "# a comment\n"])
def test_code_that_is_not_ours_is_unsafe(student, added):
    with (student / STUDENT_CODE).open("a") as file:
        file.write(added)
    assert any("is not the file that hf_qep writes" in said for said in check_folder(student).unsafe)


@pytest.mark.parametrize(
    "auto_map", [{"AutoModel": "evil.M"}, {"AutoModel": "a/b--modeling_student.StudentX"}, "modeling_student", ["x"]]
)
def test_the_code_cannot_be_pointed_elsewhere(student, auto_map):
    edit_json(student / "config.json", lambda config: config.update(auto_map=auto_map))
    assert any("names more than the classes of a student" in said for said in check_folder(student).unsafe)


def test_code_is_named_only_where_it_is(student):
    (student / STUDENT_CODE).unlink()
    assert any("'config.json' has 'auto_map'" in said for said in check_folder(student).unsafe)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_other_keys_that_lead_to_code_are_unsafe(student, name):
    edit_json(student / name, lambda config: config.update(trust_remote_code=True))
    assert any("trust_remote_code" in said for said in check_folder(student).unsafe)


def test_a_loader_of_packed_weights_does_not_belong_to_a_float_student(student):
    (student / LOADER).write_text("import os")
    assert any("belongs to packed weights" in said for said in check_folder(student).unsafe)


def test_a_folder_of_the_machine_is_found_in_what_a_training_wrote(student):
    edit_json(student / DISTILLATION, lambda facts: facts.update(data="/" + "home/alice/letters.jsonl"))
    assert any("an absolute path of a machine" in said for said in check_folder(student).unsafe)


def test_a_link_is_unsafe(student):
    (student / "LICENSE").symlink_to("/etc/hostname")
    assert any("'LICENSE' is a link" in said for said in check_folder(student).unsafe)


def test_packed_weights_need_their_own_record(student):
    edit_json(student / "config.json", lambda config: config.update(quantization_config={"quant_method": "qep"}))
    assert "only a float student is published with its card" in problems(student)
    edit_json(student / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    assert "not that of a checkpoint of hf_qep" in problems(student)


def test_first_weights_and_teacher_are_both_named(student):
    def other(facts):
        facts["start"] = "acme/small"
        facts["made_of"]["start_licence"] = "mit"

    report = check_folder(written_again(student, other))
    assert report.problems == []
    assert [(o.name, o.licence) for o in report.origins] == [("acme/small", "mit"), (TEACHER, "apache-2.0")]
