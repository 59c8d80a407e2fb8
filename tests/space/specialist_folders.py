"""Tiny specialists beside their teachers: one judges deals, one finds glyphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file

from hf_qep.distill.records import RecordText
from hf_qep.students.family import teacher_shape
from hf_qep.students.materialize import materialize
from hf_qep.students.saving import save_student
from hf_qep.students.spec import CandidateSpec
from hf_qep.students.vocabulary import VocabularyMap, trim_tokenizer
from tests.students.specs import mixed_spec
from tests.students.teachers import teacher
from tests.tiny_models import build_tokenizer

PROMPT = "won ?\nsize p0 ; kind old ->no\n"
KEPT = 99
"""Tokens of the student: all but the last sign of the tokenizer and the free ones."""
ROWS = [
    {"size": 10.0 * n, "kind": ("New", "Old")[n % 2], "note": "call" if n % 3 else None, "won": n % 2 == 0}
    for n in range(6)
]
SIDE = 16


def deals_folder(work: Path, **changes: Any) -> Path:
    """`work/deals` beside `work/teacher`. changes: of specialist.json; None leaves the key out."""
    model, tokenizer = teacher("llama"), build_tokenizer()
    if not (work / "teacher").exists():
        model.save_pretrained(work / "teacher")
        tokenizer.save_pretrained(work / "teacher")
    shape, folder = teacher_shape(model), work / "deals"
    kept = VocabularyMap(tuple(range(KEPT)), shape.vocab_size)
    spec: CandidateSpec = mixed_spec(shape)
    spec = type(spec)(spec.layers, spec.hidden_size, spec.decoder_layers, kept.kept)
    student = materialize(model, spec)
    options = {"spec": spec, "teacher_name": "teacher", "shape": shape, "vocabulary": kept}
    save_student(student, folder, tokenizer=trim_tokenizer(tokenizer, kept.kept), **options)
    columns = ["size", "kind", "note"]
    records = RecordText.fit(ROWS, columns, notes=["note"], special={"size": {0.0: "none"}}, levels=4)
    records.save(folder / "records.json")
    examples = [{"row": {name: row[name] for name in columns}, "outcome": row["won"]} for row in ROWS]
    (folder / "examples.json").write_text(json.dumps(examples))
    (folder / "teacher_prompt.txt").write_text(PROMPT)
    facts = {"kind": "deals", "question": "Is it <b>won</b>?", "teacher": "teacher", "answers": ["no", "yes"]}
    return described(folder, facts | {"teacher_prompt": "teacher_prompt.txt"} | changes)


def glyphs_folder(work: Path, **changes: Any) -> Path:
    """`work/glyphs` beside `work/seer`: a teacher of three channels and a student of one, and another size."""
    if not (work / "seer").exists():
        teacher("clip_vision_model").save_pretrained(work / "seer")
    folder = work / "glyphs"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    config = tf.ViTConfig(**sizes, image_size=12, patch_size=4, num_channels=1, pooler_output_size=8)
    tf.ViTModel(config).save_pretrained(folder)
    images = (torch.rand(5, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) > 0.7).float()
    save_file({"images": images}, folder / "support.safetensors")
    facts = {"kind": "glyphs", "teacher": "seer", "image_size": SIDE, "support": "support.safetensors"}
    return described(folder, facts | {"names": ["a", "b", "c", "<i>d</i>", "e"]} | changes)


def described(folder: Path, facts: dict[str, Any]) -> Path:
    """Write specialist.json, without what is None."""
    (folder / "specialist.json").write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))
    return folder
