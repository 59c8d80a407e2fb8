"""A packed checkpoint as one GGUF file for llama.cpp and all that is built on it.

Nothing is quantised here: signs become Q1_0, whole numbers Q8_0 or Q4_0, floats stay what they are, and the file is
read back and compared with the checkpoint before it gets its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_qep.engine.headers import MANIFEST, read_json
from hf_qep.errors import CheckpointError, ExportError
from hf_qep.export import vocabulary
from hf_qep.export.check import Comparison, compare, compare_facts, open_gguf
from hf_qep.export.families import Facts, add_facts, family_of
from hf_qep.export.tensors import Planned, Source, open_checkpoint, plan_tensors
from hf_qep.extras import require
from hf_qep.files import write_file_aside
from hf_qep.progress import SILENT, Progress

SHOWN = 4
"""Layers that an error names."""


@dataclass
class ExportReport:
    """What was written. Bits are stored bits, scales and padding included; bytes are those of the tensors' data.

    parts: type of ggml -> {tensors, weights, bytes}. lost: module -> relative squared error of its weight, where column
    scales could not be folded without loss; empty if the file holds the very weights of the checkpoint. folded: norms
    that took column scales in. notes: what llama.cpp does otherwise than transformers with the tokenizer.
    """

    file: str
    file_bytes: int
    architecture: str
    bits_linear: float
    bits_model: float
    parts: dict[str, dict[str, int]]
    lost: dict[str, float] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"lossless": not self.lost}


def export_gguf(
    folder: Path,
    out: Path,
    *,
    approximate: bool = False,
    pre: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> ExportReport:
    """Write the checkpoint in `folder` to the file `out`, and compare the two.

    approximate: accept layers whose column scales cannot be folded; the report says what each has lost. pre:
    llama.cpp's name of the pre-tokenizer, where it is not known here. One tensor is in memory at a time.
    Raises ExportError for what llama.cpp cannot hold, CheckpointError for a damaged or float checkpoint,
    OutputExistsError, ExtraMissingError without the extra `gguf`.
    """
    source, planned = _opened(folder)
    if source.folds.lost and not approximate:
        raise ExportError(_cannot_fold(source.folds.lost))
    tokens = vocabulary.vocabulary(folder, source.config["vocab_size"], pre=pre)
    with write_file_aside(out, overwrite=overwrite) as aside:
        _write(_writer(aside, folder, source, tokens), planned, progress)
        if wrong := compare(open_gguf(aside), source, planned, progress=progress).differs:
            raise CheckpointError(f"the file that was written is not the checkpoint: {wrong[0]}; nothing was kept")
        size = aside.stat().st_size
    return _report(out, size, source, planned, tokens.notes)


def check_gguf(path: Path, folder: Path, *, pre: str | None = None, progress: Progress = SILENT) -> Comparison:
    """Hold a GGUF file against the checkpoint in `folder` that it was made from; raises as `export_gguf` does."""
    source, planned = _opened(folder)
    opened = open_gguf(path)
    found = compare(opened, source, planned, progress=progress)
    tokens = vocabulary.vocabulary(folder, source.config["vocab_size"], pre=pre)
    facts = _writer(None, folder, source, tokens).kv_data[0]
    found.differs += compare_facts(opened, {key: stored.value for key, stored in facts.items()})
    return found


def _opened(folder: Path) -> tuple[Source, list[Planned]]:
    require("gguf", "gguf")
    config = Facts(read_json(folder / "config.json"))
    family = family_of(config)
    source = Source(open_checkpoint(folder), config, family)
    return source, plan_tensors(source)


def _writer(path: Path | None, folder: Path, source: Source, tokens: vocabulary.Vocabulary) -> Any:
    """A `gguf.GGUFWriter` that knows all but the tensors."""
    writer = require("gguf", "gguf").GGUFWriter(path, source.family.architecture)
    _add_origin(folder, source.config, writer)
    add_facts(source.config, source.family, writer)
    vocabulary.write(tokens, writer)
    return writer


def _cannot_fold(lost: dict[str, float]) -> str:
    worst = sorted(lost, key=lambda name: -lost[name])
    named = ", ".join(f"`{name}` {lost[name]:.2%}" for name in worst[:SHOWN])
    more = f" and {len(worst) - SHOWN} more" if len(worst) > SHOWN else ""
    return (
        f"{len(worst)} layers have column scales that llama.cpp cannot hold and that no neighbour can take in exactly; "
        f"without them their weights lose, squared and relative: {named}{more}. Quantise again with "
        'export="gguf" (--export gguf), which uses none, or pass --approximate to accept this loss'
    )


def _add_origin(folder: Path, config: dict[str, Any], writer: Any) -> None:
    """Where the model comes from, as far as the folder says."""
    gguf = require("gguf", "gguf")
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    base = manifest.get("base_model")
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_quantized_by("hf_qep")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q1_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if isinstance(base, str):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    recipe = config.get("quantization_config") or {}
    writer.add_string("hf_qep.method", str(recipe.get("method")))
    writer.add_uint32("hf_qep.format_version", int(recipe.get("format_version") or 0))


def _write(writer: Any, planned: Sequence[Planned], progress: Progress) -> None:
    gguf = require("gguf", "gguf")
    for tensor in planned:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        # Any dtype but uint8 says that the shape counts numbers, not bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, "<u2", tensor.stored_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        with progress.bar("write", len(planned), "tensor") as bar:
            for tensor in planned:
                writer.write_tensor_data(tensor.read())
                bar.advance(detail=tensor.name)
    finally:
        writer.close()


def _report(out: Path, size: int, source: Source, planned: Sequence[Planned], notes: Sequence[str]) -> ExportReport:
    parts: dict[str, dict[str, int]] = {}
    bits = {"linear": [0, 0], "model": [0, 0]}
    for tensor in planned:
        part = parts.setdefault(tensor.kind, {"tensors": 0, "weights": 0, "bytes": 0})
        part["tensors"] += 1
        part["weights"] += tensor.weights
        part["bytes"] += tensor.stored_bytes
        for name in ("model", "linear") if tensor.kind == "Q1_0" else ("model",):
            bits[name][0] += 8 * tensor.stored_bytes
            bits[name][1] += tensor.weights
    per_weight = {name: total / weights if weights else 0.0 for name, (total, weights) in bits.items()}
    return ExportReport(
        file=str(out),
        file_bytes=size,
        architecture=source.family.architecture,
        bits_linear=per_weight["linear"],
        bits_model=per_weight["model"],
        parts=parts,
        lost=source.folds.lost,
        folded=sorted(source.folds.norms),
        notes=list(notes),
    )
