"""`hf-qep inspect`: what a checkpoint folder holds, from its config and file headers; no weight is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.errors import CheckpointError
from hf_qep.files import safe_join

MANIFEST = "hf_qep_manifest.json"
WORD_BITS = 32  # signs per int32 word of a packed tensor
_DTYPE_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}  # all others have 8


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file header."""

    name: str
    dtype: str
    """As safetensors writes it: "F16", "I32"..."""
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Size of the tensor's data."""
        return _DTYPE_BITS.get(self.dtype, 8) * math.prod(self.shape)


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, quantised or not.")],
    as_json: output.JsonOption = False,
) -> None:
    """Show bits, bytes and layers of a checkpoint without loading its weights."""
    found = describe_checkpoint(folder)
    if as_json:
        output.print_json(found)
        return
    facts = [
        ("architecture", ", ".join(found["architectures"]) or None),
        ("method", found["method"]),
        ("bits per weight, quantised linears", found["bits_linear"]),
        ("bits per weight, whole model", found["bits_model"]),
        ("weights", f"{found['model_weights']:,}"),
        ("weight files", output.human_bytes(found["file_bytes"])),
        ("calibration", (found["calibration"] or {}).get("description")),
    ]
    output.print_table(str(folder), ["", "value"], [(name, output.cell_text(value)) for name, value in facts])
    if found["layers"]:
        columns = ["layer", "shape", "format", "stored bits", "bytes", "error"]
        keys = ("format", "stored_bits", "bytes", "error")
        rows = [[x["name"], _shape(x["shape"]), *(x[k] for k in keys)] for x in found["layers"]]
        output.print_table("quantised layers", columns, rows)
    if found["skipped"]:
        rows = [[x["name"], _shape(x["shape"]), x["dtype"], x["bytes"], x["reason"] or "-"] for x in found["skipped"]]
        output.print_table("matrices that stay float", ["tensor", "shape", "dtype", "bytes", "why"], rows)


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Bits three ways, method, layers and float matrices of a checkpoint folder.

    Raises CheckpointError if the folder has no readable config.json or safetensors files.
    """
    config = _read_json(folder / "config.json", required=True)
    manifest = _read_json(folder / MANIFEST, required=False)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{str(folder)!r} has no *.safetensors file, the only kind that can be inspected")
    tensors = {t.name: t for file in files for t in read_header(file)}
    recipe = config.get("quantization_config") or {}
    recipe = recipe if recipe.get("quant_method") == "qep" else {}
    layers = _packed_layers(tensors, recipe, manifest)
    packed = {name for layer in layers for name in layer.pop("tensors")}
    others = [t for name, t in tensors.items() if name not in packed]
    linear_bits, linear_weights = sum(8 * x["bytes"] for x in layers), sum(math.prod(x["shape"]) for x in layers)
    model_weights = linear_weights + sum(math.prod(t.shape) for t in others)
    matrices = [t for t in others if len(t.shape) >= 2]
    matrix_weights = sum(math.prod(t.shape) for t in matrices)
    if layers:
        bits_linear = linear_bits / linear_weights
    else:
        bits_linear = sum(t.bits for t in matrices) / matrix_weights if matrix_weights else None
    return {
        "folder": str(folder),
        "architectures": config.get("architectures") or [],
        "method": recipe.get("method"),
        "format": sorted({x["format"] for x in layers}),
        "bits_linear": bits_linear,
        "bits_model": (linear_bits + sum(t.bits for t in others)) / max(1, model_weights),
        "linear_weights": linear_weights,
        "model_weights": model_weights,
        "file_bytes": sum(f.stat().st_size for f in files),
        "calibration": manifest.get("calibration"),
        "layers": layers,
        "skipped": _float_matrices(matrices, manifest) if layers else [],
    }


def read_header(file: Path) -> list[StoredTensor]:
    """Names, dtypes and shapes of a safetensors file. Raises CheckpointError if the header is not sound."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - not a dict
            return [StoredTensor(n, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()]
    except SafetensorError as error:
        raise CheckpointError(f"{file.name!r} is damaged or not a safetensors file: {error}") from error


def _packed_layers(
    tensors: dict[str, StoredTensor], recipe: dict[str, Any], manifest: dict[str, Any]
) -> list[dict[str, Any]]:
    """One entry per packed module, in the order of the config.

    `in_features` follows from the column scale or the manifest; without both, the last word counts as full.
    """
    known = {x["name"]: x for x in _layer_reports(manifest)}
    formats = {name: entry.get("format") for entry in recipe.get("layers") or [] for name in entry.get("modules") or []}
    layers = []
    for module, format_name in formats.items():
        prefix = _stored_prefix(module, tensors)
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.rpartition(".")[0] + "." == prefix}
        own.pop("bias", None)
        if not {"weight", "weight_scale"} <= own.keys():
            raise CheckpointError(f"config.json lists {module!r} as quantised, but no file holds its packed tensors")
        *stack, _, words = own["weight"].shape
        out_features = own["weight_scale"].shape[len(stack)]
        report = known.get(module, {})
        column = own["column_scale"].shape[-1] if "column_scale" in own else words * WORD_BITS
        shape = [*stack, out_features, report.get("in_features", column)]
        bits = sum(t.bits for t in own.values())
        layers.append(
            {
                "name": module,
                "shape": shape,
                "format": format_name,
                "stored_bits": bits / math.prod(shape),
                "bytes": bits // 8,
                "error": report.get("error"),
                "tensors": [prefix + n for n in own],
            }
        )
    return layers


def _stored_prefix(module: str, tensors: dict[str, StoredTensor]) -> str:
    """Prefix of a module's tensors; a file saved from a bare backbone lacks the first part of the name."""
    if f"{module}.weight" in tensors:
        return f"{module}."
    suffix = f".{module}.weight"
    longer = next((name.removesuffix("weight") for name in tensors if name.endswith(suffix)), None)
    return longer or module.partition(".")[2] + "."


def _float_matrices(matrices: list[StoredTensor], manifest: dict[str, Any]) -> list[dict[str, Any]]:
    reasons = (manifest.get("report") or manifest).get("skipped") or {}
    return [
        {
            "name": t.name,
            "shape": list(t.shape),
            "dtype": t.dtype,
            "bytes": t.bits // 8,
            "reason": reasons.get(t.name.removesuffix(".weight")),
        }
        for t in matrices
    ]


def _layer_reports(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return (manifest.get("report") or manifest).get("layers") or []


def _read_json(file: Path, *, required: bool) -> dict[str, Any]:
    if not safe_join(file.parent, file.name).is_file():
        if required:
            raise CheckpointError(f"{str(file.parent)!r} is no checkpoint folder: it has no {file.name}")
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(file)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{str(file)!r} must hold a JSON object, not {type(value).__name__}")
    return value


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))
