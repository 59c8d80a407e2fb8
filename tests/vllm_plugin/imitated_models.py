"""`models/utils.py` of vLLM 0.33.0, imitated: names of a file -> names of a model, and the walk that loads them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn


@dataclass
class WeightsMapper:
    orig_to_new_stacked: dict[str, tuple[str, Any]] = field(default_factory=dict)
    orig_to_new_prefix: dict[str, str | None] = field(default_factory=dict)

    def map_name(self, key):
        found = self._map_name_with_shard(key)
        return None if found is None else found[0]

    def _map_name_with_shard(self, key):
        shard = None
        for old, (new, its_shard) in self.orig_to_new_stacked.items():
            if old in key:
                key, shard = key.replace(old, new, 1), its_shard
        for old, new in self.orig_to_new_prefix.items():
            if key.startswith(old):
                if new is None:
                    return None
                key = key.replace(old, new, 1)
        return key, shard

    def apply(self, weights):
        for name, data in weights:
            found = self._map_name_with_shard(name)
            if found is not None:
                name, shard = found
                if shard is not None:
                    data.shard_id = shard
                yield name, data

    def get_rename_mapper(self):
        kept = {old: new for old, new in self.orig_to_new_prefix.items() if new is not None}
        return replace(self, orig_to_new_stacked={}, orig_to_new_prefix=kept)


class AutoWeightsLoader:
    def __init__(self, module: nn.Module, **_: Any) -> None:
        self.module = module

    def load_weights(self, weights, *, mapper=None):
        return set(self._load_module("", self.module, weights if mapper is None else mapper.apply(weights)))

    def _load_module(self, base, module, weights):
        if module is not self.module and callable(load := getattr(module, "load_weights", None)):
            yield from (f"{base}.{name}" for name in load(weights))
        children, parameters = dict(module.named_children()), dict(module.named_parameters(recurse=False))
        parts = ((*name.partition(".")[::2], data) for name, data in weights)
        for first, group in itertools.groupby(parts, key=lambda item: item[0]):
            name = f"{base}.{first}" if base else first
            rest = [(rest, data) for _, rest, data in group]
            if first in children:
                yield from self._load_module(name, children[first], iter(rest))
            elif first in parameters:
                for _, data in rest:
                    parameters[first].weight_loader(parameters[first], data)
                    yield name
            else:
                raise ValueError(f"There is no module or parameter named {name!r} in {type(self.module).__name__}")
