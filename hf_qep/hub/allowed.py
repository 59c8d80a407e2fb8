"""Which files of a checkpoint may be published: a list of names, not a list of exceptions."""

from __future__ import annotations

import re
import stat
from collections.abc import Collection
from pathlib import Path

from hf_qep.engine.headers import INDEX_FILE, MANIFEST

LOADER, STUDENT_CODE = "modeling_qep.py", "modeling_student.py"
"""The only Python files that are published, and only byte for byte as this package writes them."""
STUDENT, DISTILLATION = "student.json", "distillation.json"
"""What was cut from a teacher, and what a training has found; a folder with the latter and no manifest is a student."""

_ALLOWED = {
    "weights": r"model(-\d{5}-of-\d{5})?\.safetensors",
    "index": re.escape(INDEX_FILE),
    "manifest": re.escape(MANIFEST),
    "record": r"(hf_qep_(eval|samples)|student|distillation)\.json|vocab_map\.safetensors",
    "card": r"README\.md",
    "licence": r"(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.(md|txt))?",
    "config": r"(config|generation_config|(image_|video_|audio_)?(pre)?processor_config)\.json",
    "tokenizer": r"(tokenizer_config|special_tokens_map|chat_template)\.json"
    r"|(additional_chat_templates/\w[\w.-]*|chat_template)\.jinja",
    "vocabulary": r"(tokenizer|vocab|added_tokens)\.json|(vocab|merges)\.txt"
    r"|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)\.model",
    "loader": f"{re.escape(LOADER)}|{re.escape(STUDENT_CODE)}",
    "plot": r"((plots|images|assets|figures|media)/)?\w[\w-]*\.(png|svg)",
    "specialist": r"(specialist|records|examples|preparation)\.json|teacher_prompt\.txt|support\.safetensors",
    "gguf": r"\w[\w.-]*\.gguf",
    "result": r"\.eval_results/\w[\w.-]*\.ya?ml",
}
"""Kind -> regular expression of the whole relative name."""

MADE_LATER = {"card", "record", "licence", "plot", "result", "manifest", "specialist", "gguf"}
"""Kinds that the manifest does not list: they are made from the checkpoint, or beside it, after it was written.
`specialist` is what a student needs to be tried, in the Space `compare` beside its teacher or elsewhere; `gguf` is the
same model for llama.cpp."""
HOLD_TOKENS = ("vocabulary", "gguf")
"""Kinds with the tokens of a tokenizer, some of which look like places on a disk."""
REQUIRED = ("config.json", MANIFEST, "README.md")
REQUIRED_OF_STUDENT = ("config.json", DISTILLATION, "README.md")
"""Besides STUDENT, where it was cut from its teacher."""


def is_student(names: Collection[str]) -> bool:
    """Whether files of these names are a student that stayed float; quantised, it is a checkpoint like any other."""
    return MANIFEST not in names and (DISTILLATION in names or STUDENT in names)


def weight_bytes(folder: Path) -> int:
    """Bytes of the files of a folder that hold a model's weights, whatever else is stored as safetensors there."""
    return sum(path.stat().st_size for path in folder.iterdir() if kind_of(path.name) == "weights")


def kind_of(name: str) -> str | None:
    """Kind of an allowed file by its name relative to the checkpoint, None for any other name."""
    return next((kind for kind, pattern in _ALLOWED.items() if re.fullmatch(pattern, name, re.ASCII)), None)


def list_files(
    folder: Path, *, links_to: Path | None = None, ignored: tuple[str, ...] = ()
) -> tuple[list[str], list[str]]:
    """(names of the allowed files, what is wrong with all others), links and devices never being followed.

    links_to: links to files below this folder are as good as files. ignored: beginnings of names that are passed over.
    """
    names, problems = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if ignored and name.startswith(ignored):
            continue
        if stat.S_ISLNK(mode) and links_to is not None and path.is_file() and path.resolve().is_relative_to(links_to):
            mode = path.stat().st_mode
        if stat.S_ISLNK(mode):
            problems.append(f"{name!r} is a link; replace it by a copy of the file if you mean to publish that")
        elif stat.S_ISDIR(mode):
            continue
        elif not stat.S_ISREG(mode):
            problems.append(f"{name!r} is no regular file; remove it")
        elif kind_of(name) is None:
            why = " (code is never published)" if path.suffix in (".py", ".sh", ".bat", ".so", ".ps1") else ""
            problems.append(f"{name!r} is not on the list of files that belong to a checkpoint{why}; move it away")
        else:
            names.append(name)
    return names, problems
