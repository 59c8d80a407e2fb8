"""Weight files of a model whose blocks lie on the disk: the files that `save_pretrained` would write, tensor by tensor.

Which tensors belong into which file, in which order and under which names, is transformers' to say; it says it of
tensors on meta as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_qep.engine.headers import INDEX_FILE, SINGLE_FILE
from hf_qep.engine.tensor_files import Described, TensorFile, write_tensors
from hf_qep.errors import CheckpointError

SHARD_SIZE = "5GB"
"""Most bytes of tensors in one file, unless more or less is asked for."""


def save_assembled(
    model: PreTrainedModel, folder: Path, blocks: Sequence[Path], max_shard_size: str | int = SHARD_SIZE
) -> None:
    """Write config and weight files of a quantised model to `folder`.

    model: what is on meta in it is taken from `blocks`, files that hold tensors under their final names.
    Raises CheckpointError if a block lacks a tensor or holds one of another dtype or shape.
    """
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    state = tensors_in_files(model)
    like = {name: Described.of(tensor) for name, tensor in state.items()}
    split = split_into_files(like, max_shard_size)
    places = {name: file for file in map(TensorFile, blocks) for name in file.entries}
    for shard, names in split.filename_to_tensors.items():
        _write(folder / shard, {name: like[name] for name in names}, state, places)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_in_files(model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors that are saved of a model, which may be on meta, under their names in the files."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def split_into_files(tensors: Mapping[str, Described], max_shard_size: str | int = SHARD_SIZE) -> StateDictSplit:
    """Which file holds which tensors. tensors: by their names in the files, in the order of the state dict."""
    return split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern=SINGLE_FILE.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )


def _write(
    path: Path, like: Mapping[str, Described], state: Mapping[str, Tensor], places: Mapping[str, TensorFile]
) -> None:
    def read(name: str) -> Tensor:
        if not state[name].is_meta:
            return state[name]
        if name not in places:
            raise CheckpointError(f"{name!r} is in no file of a finished block; start again with --overwrite")
        return places[name].read(name)

    write_tensors(path, like, read)
