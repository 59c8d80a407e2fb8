"""A small file for a model's folder, so that `trust_remote_code=True` replaces `import hf_qep`.

`from_pretrained` of a packed checkpoint needs this package imported first. With `modeling_qep.py` in the folder and an
`auto_map` in its config.json, transformers imports it by itself, or says which package to install. Without
`trust_remote_code` nothing changes.

The classes of a student with layers of several sizes are taken from this package, which its packed weights need anyway;
the copy that such a model carries, `modeling_student.py`, goes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_qep.errors import CheckpointError
from hf_qep.files import write_text_aside

FILE_NAME = "modeling_qep.py"
STUDENT_CODE, STUDENT, STUDENT_TYPE = "modeling_student.py", "Student", "student_"
"""Code that a student carries; how the names of its classes and its model_type begin."""

_HEADER = '''"""Loads this checkpoint with trust_remote_code=True. Written by hf-qep; do not edit."""

import transformers

try:
    import hf_qep  # makes quantisation method "qep" known to transformers{imports}
except ImportError as error:
    raise ImportError("this checkpoint is quantised with hf-qep; run: pip install hf-qep") from error
'''

# The class keeps its native name, so that everything that goes by class names (pipelines, weight renamings) works, and
# is no custom code in transformers' sense, so that the family's weight conversions apply.
_CLASS = """

class {name}(transformers.{name}):
    @classmethod
    def is_custom_code(cls):
        return False
"""

_STUDENT_IMPORT = "\n    from hf_qep.students import modeling_student"
_STUDENT_CLASS = """
{name} = modeling_student.{name}
"""


def add_remote_code(folder: str | Path) -> Path:
    """Write `modeling_qep.py` and `auto_map` into a saved checkpoint and return the path of the file.

    It serves the class that saved the checkpoint and the family's AutoModel class. Calling it again gives the same
    files. Raises CheckpointError if config.json is missing, is not that of a qep checkpoint, or names a class that is
    not a model class of transformers.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    is_student = str(config.get("model_type")).startswith(STUDENT_TYPE)
    classes = _student_classes(config) if is_student else _auto_classes(config)
    config["auto_map"] = {auto: f"{Path(FILE_NAME).stem}.{name}" for auto, name in classes.items()}
    template, imports = (_STUDENT_CLASS, _STUDENT_IMPORT) if is_student else (_CLASS, "")
    body = "".join(template.format(name=name) for name in dict.fromkeys(classes.values()))
    write_text_aside(folder / FILE_NAME, _HEADER.format(imports=imports) + body)
    write_text_aside(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / STUDENT_CODE).unlink(missing_ok=True)
    return folder / FILE_NAME


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "qep":
        raise CheckpointError(f"{str(path)!r} does not belong to a checkpoint of method qep")
    return config


def _student_classes(config: dict[str, Any]) -> dict[str, str]:
    """Auto class -> class of a student, by those of the family that it was cut from."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    family = config["model_type"].removeprefix(STUDENT_TYPE)
    stock = {"model_type": family, "architectures": [architecture.removeprefix(STUDENT)]}
    if not architecture.startswith(STUDENT) or family not in CONFIG_MAPPING_NAMES:
        raise CheckpointError(f"config.json names the class {architecture!r}, which is no student of {family!r}")
    classes = {"AutoConfig": CONFIG_MAPPING_NAMES[family], **_auto_classes(stock)}
    return {auto: STUDENT + name for auto, name in classes.items()}


def _auto_classes(config: dict[str, Any]) -> dict[str, str]:
    """Auto class -> native class, for the architecture in config.json and the family's body."""
    from transformers.models.auto import modeling_auto

    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    model_type = config.get("model_type")
    found: dict[str, str] = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        native = mapping._model_mapping.get(model_type) if mapping is not None else None
        for candidate in native if isinstance(native, tuple | list) else [native]:
            # `architecture` comes from a file and goes into source text: only names that transformers lists pass.
            if candidate is not None and (candidate == architecture or name == "AutoModel"):
                found[name] = candidate
    if architecture not in found.values():
        raise CheckpointError(f"config.json names the class {architecture!r}, which is no {model_type!r} model class")
    return found
