"""The folder of a quantised student may be published: its code is ours byte for byte, and nothing else is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_qep.hub.preflight import check_folder, config_problems
from hf_qep.students.family import teacher_shape
from hf_qep.students.materialize import materialize
from hf_qep.students.saving import save_student
from hf_qep.students.spec import CandidateSpec
from hf_qep.students.vocabulary import VocabularyMap
from tests.students.specs import mixed_spec
from tests.students.teachers import teacher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student with its code, whose configuration says that it is quantised."""
    model = teacher("llama")
    spec: CandidateSpec = mixed_spec(teacher_shape(model))
    student = materialize(model, spec)
    vocabulary = VocabularyMap((0, 1, 2), 128)
    saved = save_student(student, tmp_path / "s", spec=spec, teacher_name="tiny", vocabulary=vocabulary)
    change(saved, quantization_config={"quant_method": "qep"})
    return saved


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_the_files_of_a_student_are_on_the_list(folder):
    assert config_problems(folder, None) == []
    assert check_folder(folder).unsafe == []


@pytest.mark.parametrize("added", ["\nimport os\n", "# a comment\n"])
def test_code_that_is_not_ours_is_refused(folder, added):
    with (folder / "modeling_student.py").open("a") as file:
        file.write(added)
    assert "'modeling_student.py' is not the file that hf_qep writes" in config_problems(folder, None)[0]
    change(folder, model_type="llama", architectures=["LlamaForCausalLM"])  # a loader beside it does not vouch for it
    assert "'modeling_student.py' is not the file that hf_qep writes" in config_problems(folder, b"")[0]


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoConfig": "somebody/repo--evil.C"},
        {"AutoConfig": "modeling_student.os"},
        {"AutoConfig": ["modeling_student.StudentLlamaConfig"]},
        "modeling_student",
    ],
)
def test_the_code_cannot_be_pointed_elsewhere(folder, auto_map):
    change(folder, auto_map=auto_map)
    assert "names more than the classes of a student" in config_problems(folder, None)[0]


def test_without_the_code_nothing_may_name_it(folder):
    (folder / "modeling_student.py").unlink()
    assert "'config.json' has 'auto_map'" in config_problems(folder, None)[0]
