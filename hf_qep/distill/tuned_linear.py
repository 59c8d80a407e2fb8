"""A packed linear while it is trained: float32 latents for its signs, logarithms for its scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_qep.algorithms.straight_through import start_latents, trained_sign
from hf_qep.modules import QepLinear


def latents_of(parts: dict[str, Tensor], assemble: Any, target: Tensor) -> dict[str, Tensor]:
    """Latents of every sign matrix of a solved linear.

    A method may give them itself, as `<name>_latent` among its parts; a single matrix called `signs` gets them from the
    weight (out, in) that was solved for.
    """
    given = {name: parts[f"{name}_latent"] for name in parts if f"{name}_latent" in parts}
    if given:
        return given
    floats = {name: torch.ones(p.shape) if p.dtype == torch.bool else p for name, p in parts.items()}
    size = assemble({name: p.to(target.device) for name, p in floats.items()})
    ratio = target / size.clamp_min(torch.finfo(size.dtype).tiny)
    return {"signs": start_latents(parts["signs"].to(target.device), ratio)}


class TunedLinear(nn.Module):
    """A packed linear while it is trained: float32 latents and logarithms of scales; x (..., in) -> (..., out)."""

    def __init__(self, packed: QepLinear, latents: dict[str, Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self._packed = [packed]  # in a list: its tensors are not parameters of this module
        parts = packed.format.unpack(packed.packed_state(), packed.spec, packed.out_features, packed.in_features)
        scales = {name: part for name, part in parts.items() if part.dtype != torch.bool}
        tiny = torch.finfo(torch.float16).tiny
        self.latents = nn.ParameterDict({name: latents[name].float().clone() for name in parts if name not in scales})
        self.scales = nn.ParameterDict({name: s.clamp_min(tiny).log() for name, s in scales.items()})
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Product in the dtype of x; the weight is put together in float32."""
        signs = {name: trained_sign(latent) for name, latent in self.latents.items()}
        weight = self._packed[0].format.assemble(signs | {name: s.exp() for name, s in self.scales.items()})
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def packed(self) -> QepLinear:
        """The packed linear with what was trained."""
        packed = self._packed[0]
        parts = {name: latent >= 0 for name, latent in self.latents.items()}
        parts |= {name: s.exp() for name, s in self.scales.items()}
        packed.load_packed(packed.format.pack(parts, packed.spec))
        if self.bias is not None:
            packed.bias.data.copy_(self.bias)
        return packed


def share_of_flips(linears: Mapping[str, TunedLinear], before: Mapping[str, Mapping[str, Tensor]]) -> float:
    """Share of the signs that are not those of the latents `before`, by linear and matrix; 0 if there are none."""
    pairs = [(u >= 0, before[name][key] >= 0) for name, linear in linears.items() for key, u in linear.latents.items()]
    return sum((now != then).sum().item() for now, then in pairs) / max(1, sum(now.numel() for now, _ in pairs))
