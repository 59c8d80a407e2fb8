"""Students in folders: ordinary checkpoints, with a note of what was done to the teacher."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_qep.errors import CheckpointError
from hf_qep.files import write_aside, write_text_aside
from hf_qep.students.modeling_student import register_configs, stock_model, student_class
from hf_qep.students.spec import SUB_BLOCKS, CandidateSpec, LayerSpec, TeacherShape
from hf_qep.students.vocabulary import VocabularyMap

FILE_NAME = "student.json"


def save_student(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    spec: CandidateSpec,
    teacher_name: str,
    shape: TeacherShape | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Any = None,
    vocabulary: VocabularyMap | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a student with everything that goes with it, whole or not at all, and return the folder.

    spec, teacher_name, shape: what it was cut from; they go to student.json, with `describe_changes` if the shape of
    the teacher is given. tokenizer, processor: saved beside it if given. vocabulary: saved as vocab_map.safetensors.
    A model whose class is not one of transformers carries its code, modeling_student.py. Raises OutputExistsError if
    the folder is not empty and `overwrite` is false.
    """
    note: dict[str, Any] = {"teacher": teacher_name, "spec": spec.to_dict(), "parameters": model.num_parameters()}
    if shape is not None:
        note["changes"] = describe_changes(spec, shape)
    with write_aside(Path(folder), overwrite=overwrite) as aside:
        model.save_pretrained(aside)
        for part in (tokenizer, processor):
            if part is not None:
                part.save_pretrained(aside)
        if vocabulary is not None:
            vocabulary.save(aside)
        write_text_aside(aside / FILE_NAME, json.dumps(note, indent=2, sort_keys=True) + "\n")
    return Path(folder)


def load_student(folder: str | Path) -> PreTrainedModel:
    """The model of a folder in the class that saved it, in eval mode, with no code of the folder run.

    Raises CheckpointError if there is no configuration or it names no known class.
    """
    register_configs()
    try:
        config = AutoConfig.from_pretrained(folder)
        (name,) = config.architectures
        stock = stock_model(name.removeprefix("Student"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(folder)!r} holds no student: {error}") from error
    return (student_class(stock) if name.startswith("Student") else stock).from_pretrained(folder, config=config).eval()


def describe_changes(spec: CandidateSpec, shape: TeacherShape) -> dict[str, Any]:
    """What was taken from the teacher and added to it, for people: name of the change -> words or [before, after].

    Layers are numbered from 0, as in the teacher. Only changes appear; a copy of the teacher gives {}.
    """
    changes: dict[str, Any] = {}
    theirs = dict(shape.identity().stacks())
    for stack, layers in spec.stacks():
        prefix = "decoder " if stack else ""
        changes |= {prefix + name: text for name, text in _layer_changes(layers, theirs[stack]).items()}
    sizes = {"hidden size": (shape.hidden_size, spec.hidden_size)}
    if spec.vocabulary is not None:
        sizes["vocabulary"] = (shape.vocab_size, len(spec.vocabulary))
    changes |= {name: list(pair) for name, pair in sizes.items() if pair[0] != pair[1]}
    if spec.head != "same":
        changes["head"] = "none" if spec.head == "none" else f"new, {spec.num_labels} classes"
    return changes


def _layer_changes(layers: tuple[LayerSpec, ...], theirs: tuple[LayerSpec, ...]) -> dict[str, Any]:
    kept = [layer for layer in layers if not layer.added]
    removed = sorted(set(range(len(theirs))) - {layer.source for layer in kept})
    added = Counter(f"{layer.kind.partition('_')[0]} of layer {layer.source}" for layer in layers if layer.added)
    changes: dict[str, Any] = {
        "layers removed": _numbers(removed),
        "layers added": ", ".join(f"{count} x {what}" if count > 1 else what for what, count in added.items()),
    }
    for part in SUB_BLOCKS:
        gone = [layer.source for layer in kept if part in layer.skip - theirs[layer.source].skip]
        changes[f"{part} removed in layers"] = _numbers(gone)
    totals = {"query heads": "heads", "key-value heads": "kv_heads", "feed-forward units": "intermediate_size"}
    for name, field in totals.items():
        pair = [_total(stack, field) for stack in (theirs, layers)]
        changes[name] = pair if pair[0] != pair[1] else ""
    return {name: change for name, change in changes.items() if change}


def _total(layers: Iterable[LayerSpec], field: str) -> int:
    """Units in all layers together, those of skipped sub-blocks left out."""
    part = "mlp" if field == "intermediate_size" else "attention"
    return sum(getattr(layer, field) for layer in layers if part not in layer.skip)


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
