"""`hf-qep inspect`: what a checkpoint folder holds, from its config and file headers; no weight is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_qep.cli import output
from hf_qep.engine.headers import MANIFEST, TensorEntry, read_headers, read_json
from hf_qep.errors import CheckpointError

SCALE = ".weight_scale"  # every format of linears has this tensor
TABLE_FORMAT = "integer"  # its rows hold their scales
WORD_BITS = 32  # signs per int32 word of a packed tensor


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, quantised or not.")],
    as_json: output.JsonOption = False,
) -> None:
    """Show bits, bytes and layers of a checkpoint without loading its weights."""
    found = describe_checkpoint(folder)
    if as_json:
        output.print_json(found)
        return
    calibration = found["calibration"] or {}
    facts = {
        "architecture": ", ".join(found["architectures"]) or None,
        "made from": found["base_model"],
        "method": found["method"],
        "bits per weight, quantised linears": found["bits_linear"],
        "bits per weight, embeddings and head": found["bits_tables"],
        "bits per weight, whole model": found["bits_model"],
        "weights": f"{found['model_weights']:,}",
        "weight files": output.human_bytes(found["file_bytes"]),
        "calibration": ", ".join(s["name"] for s in calibration.get("sources", [])) or None,
    }
    output.print_facts(str(folder), facts)
    if found["layers"]:
        columns = ["layer", "shape", "format", "stored bits", "bytes", "error"]
        keys = ("format", "stored_bits", "bytes", "error")
        rows = [[x["name"], _shape(x["shape"]), *(x[k] for k in keys)] for x in found["layers"]]
        output.print_table("quantised layers", columns, rows)
    if found["tables"]:
        rows = [[x["name"], _shape(x["shape"]), *(x[k] for k in keys)] for x in found["tables"]]
        output.print_table("embeddings and head in whole numbers", columns, rows)
    if found["skipped"]:
        rows = [[x["name"], _shape(x["shape"]), x["dtype"], x["bytes"], x["reason"] or "-"] for x in found["skipped"]]
        output.print_table("matrices that stay float", ["tensor", "shape", "dtype", "bytes", "why"], rows)


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Bits three ways, method, layers and float matrices of a checkpoint folder.

    Of a float checkpoint `bits_linear` is that of its matrices, and `layers` is empty.
    Raises CheckpointError if config.json or the safetensors files are missing, damaged or contradict each other.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is not a folder; give the folder of a checkpoint")
    config = read_json(folder / "config.json")
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    report = manifest.get("report") or {}
    tensors = read_headers(folder)
    recipe = config.get("quantization_config") or {}
    recipe = recipe if recipe.get("quant_method") == "qep" else {}
    layers = _packed_layers(tensors, recipe, report)
    tables = _packed_tables(tensors, recipe, report)
    packed = {name for found in (*layers, *tables) for name in found.pop("tensors")}
    others = {name: t for name, t in tensors.items() if name not in packed}
    matrices = {name: t for name, t in others.items() if len(t.shape) >= 2}
    linear_weights, table_weights = (sum(math.prod(x["shape"]) for x in found) for found in (layers, tables))
    packed_sizes = [(x["bytes"], math.prod(x["shape"])) for x in (*layers, *tables)]
    counted = [(x["bytes"], math.prod(x["shape"])) for x in layers] or _sizes(matrices)
    return {
        "folder": str(folder),
        "architectures": config.get("architectures") or [],
        "base_model": manifest.get("base_model"),
        "method": recipe.get("method"),
        "format": sorted({x["format"] for x in layers if x["format"]}),
        "bits_linear": _bits_per_weight(counted),
        "bits_tables": _bits_per_weight([(x["bytes"], math.prod(x["shape"])) for x in tables]),
        "bits_model": _bits_per_weight(_sizes(others) + packed_sizes),
        "linear_weights": linear_weights,
        "table_weights": table_weights,
        "model_weights": linear_weights + table_weights + sum(math.prod(t.shape) for t in others.values()),
        "file_bytes": sum((folder / name).stat().st_size for name in {t.file for t in tensors.values()}),
        "calibration": manifest.get("calibration"),
        "layers": layers,
        "tables": tables,
        "skipped": _float_matrices(matrices, report) if layers else [],
    }


def _packed_layers(
    tensors: dict[str, TensorEntry], recipe: dict[str, Any], report: dict[str, Any]
) -> list[dict[str, Any]]:
    """One entry per packed module, in the order of the files, under the name it has there.

    A family may store its tensors under other names than its modules have, so the layers are found by their scales and
    the config only says how many there must be. The signs of stacked experts have the bare name of the float parameter.
    """
    formats = {name: entry.get("format") for name, entry in _listed(recipe, table=False)}
    modules = [name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)] if formats else []
    if len(modules) != len(formats):
        raise CheckpointError(
            f"config.json lists {len(formats)} quantised modules, but the files hold {len(modules)}; they do not "
            "belong together"
        )
    only = next(iter(set(formats.values()))) if len(set(formats.values())) == 1 else None
    return [_packed_layer(name, formats.get(name, only), tensors, report) for name in modules]


def _packed_layer(
    module: str, format_name: str | None, tensors: dict[str, TensorEntry], report: dict[str, Any]
) -> dict[str, Any]:
    """The width follows from the manifest or the column scale; without both, the last word counts as full."""
    own = {n: t for n, t in tensors.items() if n == module or n.rpartition(".")[0] == module}
    own.pop(f"{module}.bias", None)
    signs = own.get(module) or own.get(f"{module}.weight")
    if signs is None or len(signs.shape) < 2:
        raise CheckpointError(
            f"the files hold scales of {module!r}, but no packed signs; download the checkpoint again"
        )
    *stack, _, words = signs.shape
    known = [x for x in report.get("layers") or [] if x["name"] == module]
    column = own.get(f"{module}.column_scale")
    width = known[0]["in_features"] if known else column.shape[-1] if column else words * WORD_BITS
    shape = [*stack, own[module + SCALE].shape[len(stack)], width]
    stored = sum(t.bytes for t in own.values())
    return {
        "name": module,
        "shape": shape,
        "format": format_name,
        "stored_bits": _bits_per_weight([(stored, math.prod(shape))]),
        "bytes": stored,
        "error": sum(x["error"] for x in known) / len(known) if known else None,
        "tensors": list(own),
    }


def _packed_tables(
    tensors: dict[str, TensorEntry], recipe: dict[str, Any], report: dict[str, Any]
) -> list[dict[str, Any]]:
    """One entry per embedding or head in whole numbers; one that is tied to another is not in the files.

    They are found by their words without scales. Their width follows from the manifest, or from bits and group.
    """
    listed = dict(_listed(recipe, table=True))
    end = ".weight"
    found = [
        n.removesuffix(end) for n, t in tensors.items() if t.dtype == "I32" and n.endswith(end) and len(t.shape) == 2
    ]
    names = [name for name in found if name + SCALE not in tensors] if listed else []
    if len(names) != len(listed):
        raise CheckpointError(
            f"config.json lists {len(listed)} tables of whole numbers, but the files hold {len(names)}; they do not "
            "belong together"
        )
    return [_packed_table(name, listed.get(name), list(listed.values()), tensors, report) for name in names]


def _packed_table(
    name: str,
    entry: dict[str, Any] | None,
    entries: list[dict[str, Any]],
    tensors: dict[str, TensorEntry],
    report: dict[str, Any],
) -> dict[str, Any]:
    own = {n: t for n, t in tensors.items() if n.rpartition(".")[0] == name and not n.endswith(".bias")}
    rows, words = own[f"{name}.weight"].shape
    known = next((x for x in report.get("tables") or [] if name in x["names"]), None)
    entry = entry or (entries[0] if all(e == entries[0] for e in entries) else {})
    width = known["columns"] if known else _table_width(words, entry)
    stored = sum(t.bytes for t in own.values())
    return {
        "name": name,
        "shape": [rows, width],
        "format": TABLE_FORMAT,
        "stored_bits": _bits_per_weight([(stored, rows * width)]),
        "bytes": stored,
        "error": known["error"] if known else None,
        "tensors": list(own),
    }


def _table_width(words: int, entry: dict[str, Any]) -> int:
    """Columns of a row of so many words; the last word counts as full. A group takes half a word for its scale."""
    bits, group = entry.get("bits") or WORD_BITS, entry.get("group_size")
    if not group:
        return (words - 1) * WORD_BITS // bits
    return group * int(words / (0.5 + group * bits / WORD_BITS))


def _listed(recipe: dict[str, Any], *, table: bool) -> list[tuple[str, dict[str, Any]]]:
    """Names of the packed modules in the config with their options, tables or linears."""
    entries = [e for e in recipe.get("layers") or [] if (e.get("format") == TABLE_FORMAT) is table]
    return [(name, {k: v for k, v in e.items() if k != "modules"}) for e in entries for name in e.get("modules") or []]


def _float_matrices(matrices: dict[str, TensorEntry], report: dict[str, Any]) -> list[dict[str, Any]]:
    reasons = report.get("skipped") or {}
    return [
        {
            "name": name,
            "shape": list(t.shape),
            "dtype": t.dtype,
            "bytes": t.bytes,
            "reason": reasons.get(name.removesuffix(".weight")),
        }
        for name, t in matrices.items()
    ]


def _sizes(tensors: dict[str, TensorEntry]) -> list[tuple[int, int]]:
    return [(t.bytes, math.prod(t.shape)) for t in tensors.values()]


def _bits_per_weight(sizes: list[tuple[int, int]]) -> float | None:
    """Bits per weight of (bytes, weights) pairs."""
    weights = sum(count for _, count in sizes)
    return 8 * sum(size for size, _ in sizes) / weights if weights else None


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))
