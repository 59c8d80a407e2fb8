"""Layers that hold one format's tensors and call its product.

Scales stay float16 whatever dtype the model is cast to, because they are what was stored; while scales are trained they
are float32 (`train_scales`), and `packed_state` gives the tensors as they are stored.

A linear that only computes may hold its tensors in the order of the native kernels (`tile`), in place of the stored one
and with another number of dimensions. State dicts, `tensors` and `packed_state` always have the stored order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_qep.errors import ConfigError
from hf_qep.kernels.dispatch import EXACT, has_kernels
from hf_qep.kernels.tiling import drop_pages
from hf_qep.registry import FORMATS


class PackedTensors(nn.Module):
    """Parameters of one format, for one matrix or for a stack of them.

    spec: a format's Spec. out_features, in_features: of one matrix. stack: leading dimensions, () for one matrix.
    """

    spec: Any
    out_features: int
    in_features: int
    tiled = False
    """Whether the tensors lie in the order of the native kernels."""

    def _allocate(self, spec: Any, shape: tuple[int, int], stack: tuple[int, ...], device: Any) -> None:
        self.spec = spec
        self.out_features, self.in_features = shape
        self.format = FORMATS.get(spec.format)
        self.tensor_names = []
        # Loaders initialise what they believe is missing; normal_() on int32 raises.
        self._is_hf_initialized = True
        for name, (size, dtype) in self.format.layout(spec, *shape).items():
            value = torch.zeros(*stack, *size, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
            getattr(self, name)._is_hf_initialized = True  # GPT2 initialises its layers' parameters from outside
            self.tensor_names.append(name)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "format"}  # modules can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.format = FORMATS.get(self.spec.format)

    def tensors(self) -> dict[str, Tensor]:
        """The format's tensors, by name, in the stored order: parameters, or copies if the module is tiled."""
        held = self.held()
        return self.format.untile(held, self.spec, self.out_features) if self.tiled else held

    def held(self) -> dict[str, Tensor]:
        """The parameters that hold the format's tensors, by name."""
        return {name: self._parameters[name] for name in self.tensor_names}

    def tile(self) -> None:
        """Hold the tensors in the order of the native kernels; without effect where those do not serve."""

    @torch.no_grad()
    def untile(self) -> None:
        """Back to the stored order."""
        if self.tiled:
            self._hold(self.tensors())
            self.tiled = False

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        for name, held in self.held().items():
            if tensors[name] is not held:
                self._parameters[name] = nn.Parameter(tensors[name], requires_grad=False)
                self._parameters[name]._is_hf_initialized = True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiled:
            destination.update({prefix + name: tensor.detach() for name, tensor in self.tensors().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        tiled = self.tiled and any(prefix + name in state_dict for name in self.tensor_names)
        if tiled:
            self.untile()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if tiled:
            self.tile()

    def packed_state(self) -> dict[str, Tensor]:
        """The tensors in their stored dtypes."""
        layout = self.format.layout(self.spec, self.out_features, self.in_features)
        return {name: t.detach().to(layout[name][1]) for name, t in self.tensors().items()}

    @torch.no_grad()
    def load_packed(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of one matrix as `format.pack` gives them."""
        self.untile()
        for name in self.tensor_names:
            current = getattr(self, name)
            if tensors[name].shape != current.shape or tensors[name].dtype != current.dtype:
                raise ValueError(f"`{name}` must be {current.dtype} {tuple(current.shape)}")
            setattr(self, name, nn.Parameter(tensors[name].to(current.device), requires_grad=False))

    def train_scales(self) -> None:
        """Make the scales float32 parameters that train; float16 would swallow small updates."""
        self.untile()
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point():
                setattr(self, name, nn.Parameter(tensor.detach().float(), requires_grad=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        device = self._parameters["weight"].device
        moved = self.tiled and fn(torch.empty(0, device=device)).device != device
        if moved:
            self.untile()
        kept = {name: t.data for name, t in self.held().items() if t.is_floating_point()}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            new = getattr(self, name)
            if new.dtype != value.dtype:  # a cast of the model: keep the stored value, follow only the device
                setattr(self, name, nn.Parameter(value.to(new.device), requires_grad=new.requires_grad))
        if moved:
            self.tile()
        return self


class QepLinear(PackedTensors, nn.Linear):
    """Packed replacement of nn.Linear: y = x W^T + bias with W as the format defines it.

    It is an nn.Linear so that peft and others find it, but never allocates a float weight; `weight` is the packed
    tensor. bias: dtype of the model, shape (out,).
    """

    activation = EXACT
    """Or "int8": the native kernels round the inputs to whole numbers, one scale per token and 128 inputs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: Any,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self._allocate(spec, (out_features, in_features), (), device)
        value = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", value if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), dtype of x."""
        held = self._parameters  # attributes of a module are looked up far more slowly than a dictionary's keys
        if self.tiled:
            return self.format.tiled_linear(x, held, self.spec, held["bias"], self.out_features, self.activation)
        return self.format.linear(x, held, self.spec, held["bias"], self.activation)

    @torch.no_grad()
    def tile(self) -> None:
        """Hold the tensors in the order of the native kernels, if there are some for this format, spec and device.

        Layers whose scales train keep the stored order.
        """
        held = self.held()
        if self.tiled or not hasattr(self.format, "tile") or any(t.requires_grad for t in held.values()):
            return
        if not all(has_kernels(t.device) for t in held.values()):
            return
        tiles = self.format.tile(held, self.spec)
        if tiles is not None:
            self._hold(tiles)
            self.tiled = True
            for name in tiles.keys() & held.keys():
                if tiles[name] is not held[name]:
                    drop_pages(held[name])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Dense weight (out, in)."""
        return self.format.dequantize(self.tensors(), self.spec, self.out_features, self.in_features, dtype)

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, {self.spec}"


class QepConv1D(QepLinear):
    """Packed replacement of transformers' Conv1D, whose float weight is (in, out)."""


class QepEmbedding(PackedTensors, nn.Embedding):
    """Packed replacement of nn.Embedding in a format that has `rows`: only the rows that are asked for are unpacked.

    embed_scale: factor of the output, for the families that scale their word embeddings; a tensor factor is rounded to
    the model's dtype first, as theirs is. float_class: class that it stands for. dtype_like: an empty parameter of the
    dtype of the output. It follows every cast, and it is the first floating parameter of most models, by which
    transformers knows the dtype of a model: without it that would be the float16 of some scales.
    """

    def __init__(self, rows: int, columns: int, spec: Any, dtype: torch.dtype, device: Any = None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = rows, columns
        self.padding_idx = self.max_norm = self.embed_scale = None
        self.rounds_scale = False
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.float_class: type[nn.Embedding] = nn.Embedding
        self._allocate(spec, (rows, columns), (), device)
        self.dtype_like = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.dtype_like._is_hf_initialized = True

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) int64 -> (..., embedding_dim) of the model's dtype. Raises IndexError for an id out of range."""
        rows = self.format.rows(ids, self.tensors(), self.spec, self.embedding_dim, self.dtype_like.dtype)
        if self.embed_scale is None:
            return rows
        return rows * (rows.new_tensor(self.embed_scale) if self.rounds_scale else self.embed_scale)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Dense weight (num_embeddings, embedding_dim)."""
        return self.format.dequantize(self.tensors(), self.spec, self.out_features, self.in_features, dtype)

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec}"


class QepExpertWeight(PackedTensors):
    """Packed stack of expert matrices in the place of one 3-D parameter (experts, out, in).

    Indexing gives one dense matrix, so a family's own loop over experts works unchanged.
    """

    def __init__(
        self, experts: int, in_features: int, out_features: int, spec: Any, dtype: torch.dtype, device: Any = None
    ) -> None:
        nn.Module.__init__(self)
        self.experts, self.compute_dtype = experts, dtype
        self._allocate(spec, (out_features, in_features), (experts,), device)

    @property
    def shape(self) -> torch.Size:
        """Shape of the float parameter this stands for."""
        return torch.Size((self.experts, self.out_features, self.in_features))

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        return self(expert)  # a call, because accelerate brings offloaded tensors back in a hook on calls

    def forward(self, expert: int | Tensor) -> Tensor:
        """Dense (out, in) matrix of one expert, in the model's dtype."""
        tensors = {name: t[expert] for name, t in self.tensors().items()}
        return self.format.dequantize(tensors, self.spec, self.out_features, self.in_features, self.compute_dtype)

    @torch.no_grad()
    def load_packed_expert(self, expert: int, tensors: dict[str, Tensor]) -> None:
        """Take over the packed tensors of one expert."""
        for name in self.tensor_names:
            getattr(self, name).data[expert] = tensors[name]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Dense (experts, out, in)."""
        return torch.stack([self[e] for e in range(self.experts)]).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.tensors()["weight"].device))
        self.compute_dtype = probe.dtype
        return super()._apply(fn, recurse)


def packed_modules(model: nn.Module) -> dict[str, PackedTensors]:
    """Name -> packed module, in model order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedTensors)}


def packed_tables(model: nn.Module) -> dict[str, PackedTensors]:
    """Name -> packed module that holds a row per token (or output class): embeddings and heads, in model order."""
    return {name: m for name, m in packed_modules(model).items() if hasattr(m.format, "rows")}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Module -> module whose weight it shares by the model's own rule: the head and the embedding."""
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    end = ".weight"
    return {t.removesuffix(end): s.removesuffix(end) for t, s in pairs.items() if t.endswith(end) and s.endswith(end)}


def packed_like(model: nn.Module, name: str, spec: Any, device: Any = None) -> PackedTensors:
    """Packed, zero-filled replacement of the float linear, Conv1D, embedding or 3-D expert parameter called `name`.

    device: default is the device of the float weight. Raises ConfigError if the spec does not fit the shape or an
    embedding does more than to look up rows and to scale them.
    """
    parent, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(parent), leaf)
    weight = found.weight if isinstance(found, nn.Module) else found
    device = weight.device if device is None else device
    if not isinstance(found, nn.Module):
        experts, out_features, in_features = weight.shape
        return QepExpertWeight(experts, in_features, out_features, spec, weight.dtype, device)
    if isinstance(found, nn.Embedding):
        return _embedding_like(name, found, spec, device)
    transposed = isinstance(found, Conv1D)
    out_features, in_features = weight.shape[::-1] if transposed else weight.shape
    kind = QepConv1D if transposed else QepLinear
    return kind(in_features, out_features, found.bias is not None, spec, weight.dtype, device)


def _embedding_like(name: str, found: nn.Embedding, spec: Any, device: Any) -> QepEmbedding:
    kind = type(found)
    rounds = hasattr(found, "scalar_embed_scale")
    scale = found.scalar_embed_scale if rounds else getattr(found, "embed_scale", None)
    if found.max_norm is not None:
        raise ConfigError(f"`{name}` limits its rows to norm {found.max_norm:g} as it runs; leave it float")
    if kind is not nn.Embedding and not (
        kind.__name__.endswith("ScaledWordEmbedding") and isinstance(scale, float | int)
    ):
        raise ConfigError(f"`{name}` is a {kind.__name__}, which is no plain table of rows; leave it float")
    new = QepEmbedding(*found.weight.shape, spec, found.weight.dtype, device)
    new.padding_idx, new.float_class = found.padding_idx, kind
    new.embed_scale, new.rounds_scale = None if kind is nn.Embedding else float(scale), rounds
    return new


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module or parameter called `name` is."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner._parameters.pop(leaf, None)
    setattr(owner, leaf, new)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is stored; buffers that are not, such as rotary frequencies, stay as precise as loading makes them."""
    kept = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer
