"""Students go to disk and come back the same, in this process and in others, with this package and without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from hf_qep.config import QepConfig
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.job import quantize_model
from hf_qep.errors import CheckpointError, OutputExistsError
from hf_qep.modules import packed_modules
from hf_qep.students import modeling_student
from hf_qep.students.family import layers_of, teacher_shape
from hf_qep.students.materialize import count_parameters, materialize
from hf_qep.students.saving import describe_changes, load_student, save_student
from hf_qep.students.spec import COPY_ZERO, NEW_ZERO, CandidateSpec, LayerSpec
from hf_qep.students.vocabulary import VocabularyMap
from tests.plugin.processes import BLOCKED, QUIET, run_python
from tests.students.specs import mixed_spec, uniform_spec
from tests.students.teachers import FAMILIES, batch, outputs, teacher
from tests.tiny_models import build_tokenizer

AUTO = {
    "llama": "AutoModelForCausalLM",
    "qwen3": "AutoModelForCausalLM",
    "cohere2": "AutoModelForCausalLM",
    "bert": "AutoModelForMaskedLM",
    "bert_classifier": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "clip_vision_model": "AutoModel",
    "detr": "AutoModelForObjectDetection",
    "cohere2_classifier": "AutoModelForSequenceClassification",
}
LOAD = """
for auto, folder in {loads!r}:
    inputs, expected, name = torch.load(folder + "/expected.pt")
    for again in ("", "/again"):
        options = {{"trust_remote_code": True}} if {trust} else {{}}
        model = getattr(transformers, auto).from_pretrained(folder + again, **options).eval()
        assert type(model).__name__ == name, type(model)
        with torch.no_grad():
            print((model(**inputs)[0] - expected).abs().max().item())
        model.save_pretrained(folder + "/again")
"""


def mixed_with_added(family: str) -> tuple[PreTrainedModel, CandidateSpec]:
    """A teacher, and a student with layers of all kinds, one of them added."""
    model = teacher(family)
    spec = mixed_spec(teacher_shape(model))
    layers = (*spec.layers, replace(spec.layers[-1], kind=COPY_ZERO, skip=()))
    return model, replace(spec, layers=layers, head="none" if family == "clip_vision_model" else "same")


def save_expected(student: PreTrainedModel, family: str, folder: Path) -> None:
    with torch.no_grad():
        expected = student(**batch(family))[0]
    torch.save((batch(family), expected, type(student).__name__), folder / "expected.pt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved heterogeneous students of all families, each with inputs and outputs."""
    root, threads = tmp_path_factory.mktemp("students"), torch.get_num_threads()
    torch.set_num_threads(1)
    for family in AUTO:
        model, spec = mixed_with_added(family.removesuffix("_classifier") if family.startswith("cohere2") else family)
        if family == "cohere2_classifier":
            spec = replace(spec, head="classifier", num_labels=3)
        student = materialize(model, spec)
        shape = teacher_shape(model)
        save_student(student, root / family, spec=spec, teacher_name="tiny", shape=shape)
        save_expected(student, family.replace("cohere2_classifier", "cohere2"), root / family)
    torch.set_num_threads(threads)
    return {family: root / family for family in AUTO}


@pytest.mark.parametrize("family", AUTO)
def test_folders_load_in_the_class_that_saved_them(family, folders):
    loaded = load_student(folders[family])
    inputs, expected, name = torch.load(folders[family] / "expected.pt")
    assert type(loaded).__name__ == name
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], expected)


@pytest.mark.parametrize("trust", [False, True], ids=["with hf_qep", "without hf_qep"])
def test_another_process_gives_the_same_outputs(trust, folders, tmp_path):
    loads = [(AUTO[family], str(folder)) for family, folder in folders.items()]
    start = BLOCKED + QUIET if trust else QUIET + "import hf_qep\n"
    result = run_python(start + LOAD.format(loads=loads, trust=trust), HF_MODULES_CACHE=str(tmp_path))
    assert [float(line) for line in result.stdout.split()] == [0.0] * 2 * len(loads), result.stderr
    assert "newly initialized" not in result.stderr


def test_without_the_package_and_without_trust_transformers_says_what_is_needed(folders):
    result = run_python(
        BLOCKED + QUIET + f"transformers.AutoModelForCausalLM.from_pretrained({str(folders['llama'])!r})"
    )
    assert "trust_remote_code=True" in result.stderr.strip().splitlines()[-1]


def test_the_code_in_the_folder_is_ours(folders):
    for folder in folders.values():
        code = Path(modeling_student.__file__).read_bytes()
        assert (folder / "modeling_student.py").read_bytes() == code
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"]["AutoConfig"].startswith("modeling_student.Student")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_gone_is_gone_from_the_file(family, tmp_path):
    model = teacher(family)
    spec = mixed_spec(teacher_shape(model))
    student = materialize(model, spec)
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = file.keys()
        sizes = {name: file.get_tensor(name).numel() for name in names}
    running = sum(b.numel() for n, b in student.named_buffers() if n in student.state_dict())
    assert sum(sizes.values()) - running == sum(count_parameters(model, spec).values())
    assert len([n for n in sizes if "gate" in n]) == len([n for n in student.state_dict() if "gate" in n])
    first = [name for name in sizes if "layer.0." in name or "layers.0." in name]
    first = [name for name in first if not name.startswith(("model.decoder", "model.backbone"))]
    assert first
    assert not [name for name in first if "q_proj" in name or "query" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_student_is_a_plain_checkpoint(family, tmp_path):
    model = teacher(family)
    spec = uniform_spec(teacher_shape(model)) if family in ("llama", "qwen3", "cohere2", "vit") else None
    spec = spec or replace(teacher_shape(model).identity(), layers=teacher_shape(model).layers[1:])
    student = materialize(model, spec)
    save_student(student, tmp_path / "s", spec=spec, teacher_name="tiny")
    assert not (tmp_path / "s" / "modeling_student.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "s" / "config.json").read_text())
    loaded = type(model).from_pretrained(tmp_path / "s").eval()
    assert torch.equal(outputs(loaded, batch(family)), outputs(student, batch(family)))
    assert torch.equal(outputs(load_student(tmp_path / "s"), batch(family)), outputs(student, batch(family)))


def test_auto_classes_know_students(folders):
    config = AutoConfig.from_pretrained(folders["llama"])
    assert config.model_type == "student_llama"
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == "StudentLlamaForCausalLM"
    assert type(AutoModel.from_pretrained(folders["llama"])).__name__ == "StudentLlamaModel"
    classifier = AutoModelForSequenceClassification.from_pretrained(folders["llama"], num_labels=2)
    assert type(classifier).__name__ == "StudentLlamaForSequenceClassification"
    assert type(classifier.model).__name__ == "StudentLlamaModel"


def test_a_note_says_what_was_done(tmp_path):
    model = teacher("llama")
    shape = teacher_shape(model)
    spec = CandidateSpec(
        (LayerSpec(1, 1, 2, 32), LayerSpec(1, 1, 2, 32, NEW_ZERO), LayerSpec(1, 1, 2, 32, COPY_ZERO)),
        48,
        vocabulary=tuple(range(64)),
        head="classifier",
        num_labels=2,
    )
    vocabulary = VocabularyMap(spec.vocabulary, 128)
    student = materialize(model, spec)
    options = {"spec": spec, "teacher_name": "org/big", "shape": shape, "vocabulary": vocabulary}
    folder = save_student(student, tmp_path / "s", tokenizer=build_tokenizer(), **options)
    note = json.loads((folder / "student.json").read_text())
    assert CandidateSpec.from_dict(note["spec"]) == spec
    assert (note["teacher"], note["parameters"]) == ("org/big", student.num_parameters())
    assert note["changes"] == {
        "layers removed": "0",
        "layers added": "new of layer 1, copy of layer 1",
        "query heads": [8, 6],
        "key-value heads": [4, 3],
        "feed-forward units": [192, 96],
        "hidden size": [64, 48],
        "vocabulary": [128, 64],
        "head": "new, 2 classes",
    }
    assert VocabularyMap.load(folder) == vocabulary
    assert (folder / "tokenizer.json").is_file()
    assert describe_changes(shape.identity(), shape) == {}
    with pytest.raises(OutputExistsError):
        save_student(student, folder, **options)
    save_student(student, folder, overwrite=True, **options)
    assert not (folder / "tokenizer.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_skipped_sub_blocks_are_described():
    shape = teacher_shape(teacher("detr"))
    changes = describe_changes(mixed_spec(shape), shape)
    assert changes["attention removed in layers"] == "0"
    assert changes["decoder mlp removed in layers"] == "2"
    assert changes["decoder query heads"] == [12, 3 + 4]


def test_a_folder_that_holds_no_student_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no student"):
        load_student(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["Nothing"]}))
    with pytest.raises(CheckpointError, match="Nothing"):
        load_student(tmp_path)


def test_a_student_can_be_quantised(tmp_path):
    model, spec = mixed_with_added("llama")
    student = materialize(model, spec)
    with torch.no_grad():  # rows of zeros would have no signs to speak of
        for parameter in layers_of(student)[-1][1].parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    ids = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))
    calibration = load_calibration(ids, None, num_samples=8, seq_len=16, seed=0)
    quantize_model(student, QepConfig(batch_size=4, num_samples=8, seq_len=16), calibration)
    inside = [n for n, _ in student.named_modules() if n.startswith("model.layers.") and n.endswith("_proj")]
    assert set(packed_modules(student)) == set(inside)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    assert torch.equal(outputs(loaded, batch("llama")), outputs(student, batch("llama")))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_low_rank_adapters_wrap_a_student(family, tmp_path):
    model, spec = mixed_with_added(family)
    student = materialize(model, spec)
    before = outputs(student, batch(family))
    targets = ["q_proj", "down_proj"] if family == "llama" else ["query", "dense"]
    wrapped = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=targets))
    wrapped(**batch(family)).logits.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.parameters() if p.requires_grad)
    assert torch.equal(outputs(wrapped.eval(), batch(family)), before)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(materialize(model, spec), tmp_path).eval()
    assert torch.equal(outputs(again, batch(family)), before)


def test_recomputed_activations_give_the_same_gradients():
    model, spec = mixed_with_added("bert")
    gradients = []
    for recompute in (False, True):
        student = materialize(model, spec).train()
        if recompute:
            student.activation_checkpointing_enable()
        torch.manual_seed(0)  # dropout
        student(**batch("bert")).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0]["bert.encoder.layer.2.gate"].abs() > 0
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])
