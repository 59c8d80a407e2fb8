"""How far a student's hidden states and embeddings are from its teacher's, whatever the widths of both.

Hidden states are compared by direction: through a projection where the widths differ, which belongs to the training
and never to the student. Relations need none: what is compared is how tokens, or rows, lie to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_qep.distill.losses import DistillLoss
from hf_qep.distill.said import Said, normalised
from hf_qep.distill.samples import DETECTION
from hf_qep.errors import ConfigError

SHARPNESS = 10.0
"""What cosines between tokens are multiplied by before they become a distribution; ours, so that the nearest tokens
of a tiny and of a wide model count alike."""


def layer_pairs(ours: int, theirs: int, layer_map: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Hidden states to compare, (student's, teacher's); number 0 is what goes into the first layer.

    ours, theirs: layers. layer_map: the teacher's for each layer of the student; None: at equal depth, so that the last
    is compared to the last. Raises ConfigError for a map of another length, or out of range.
    """
    if layer_map is None:
        return [(n, max(1, round(n * theirs / ours))) for n in range(1, ours + 1)]
    if len(layer_map) != ours or not all(0 <= n <= theirs for n in layer_map):
        raise ConfigError(f"layer_map needs {ours} numbers of 0 to {theirs}, one per layer, not {list(layer_map)}")
    return list(enumerate(layer_map, 1))


class Projections(nn.Module):
    """Linear maps from the student's width to the teacher's, one per compared layer; none where they are equal.

    seed: of their first values.
    """

    def __init__(self, pairs: list[tuple[int, int]], ours: int, theirs: int, seed: int = 0) -> None:
        super().__init__()
        self.pairs, self.maps = pairs, nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed)
        for number, _ in pairs if ours != theirs else []:
            linear = nn.Linear(ours, theirs, bias=False)
            with torch.no_grad():
                linear.weight.copy_(torch.randn(theirs, ours, generator=generator) / ours**0.5)
            self.maps[str(number)] = linear

    def forward(self, layers: Sequence[Tensor], said: Said, mask: Tensor | None) -> Tensor:
        """1 - cos of the hidden states, mean over tokens and layers, (rows,) float32.

        layers: hidden states of the student (rows, tokens, width). mask: bool (rows, tokens), tokens that count.
        """
        terms = []
        for number, theirs in self.pairs:
            wanted = said.hidden if said.layers is None else said.layers[theirs]
            found = layers[number].float()
            if str(number) in self.maps:
                found = self.maps[str(number)](found)
            terms.append(token_mean(1 - F.cosine_similarity(found, wanted.float(), dim=-1), mask))
        return torch.stack(terms).mean(0)


def token_relation(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """KL between how each token of a row is near to the others, mean over the tokens, (rows,) nats.

    After MiniLM (arXiv 2002.10957, equation 3), with cosines of hidden states (rows, tokens, width), so that widths and
    numbers of heads may differ. mask: bool (rows, tokens).
    """
    others = ~torch.eye(ours.shape[1], dtype=torch.bool, device=ours.device)  # every token is nearest to itself
    seen = others if mask is None else others & mask.unsqueeze(1)
    near = []
    for hidden in (theirs, ours):
        unit = F.normalize(hidden.float(), dim=-1)
        near.append((SHARPNESS * unit @ unit.transpose(1, 2)).masked_fill(~seen, -1e4).log_softmax(-1))
    return token_mean((near[0].exp() * (near[0] - near[1])).sum(-1), mask)


def row_relation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Huber loss of the distances between the rows of a batch, in units of their mean, (rows,) float32.

    The distance part of RKD (arXiv 1904.05068, equations 5 and 6), for embeddings (rows, width); 0 for a single row.
    """
    if len(ours) < 2:
        return ours.new_zeros(len(ours), dtype=torch.float32)
    apart = ~torch.eye(len(ours), dtype=torch.bool, device=ours.device)
    found, wanted = (_distances(x.float(), apart) for x in (ours, theirs))
    return F.smooth_l1_loss(found, wanted, reduction="none").mean(1)


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (rows, tokens) over the tokens that the mask keeps, (rows,)."""
    if mask is None:
        return values.mean(1)
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)


def last_hidden(said: Said) -> Tensor:
    """The teacher's last hidden state, each token with mean square 1."""
    return said.hidden if said.layers is None else normalised(said.layers[-1])


def _distances(rows: Tensor, apart: Tensor) -> Tensor:
    """Distances (rows, rows - 1) between different rows, over their mean."""
    gaps = (rows.unsqueeze(1) - rows.unsqueeze(0))[apart].unflatten(0, (len(rows), -1))
    lengths = (gaps.square().sum(-1) + 1e-12).sqrt()
    return lengths / lengths.mean().clamp_min(1e-6)


def projections_for(student: Any, teacher: Any, task: str, loss: DistillLoss, seed: int) -> Projections | None:
    """Projections from a student to its teacher, a model or what one said; None where the loss has no need of them."""
    if not loss.hidden:
        return None
    layers, width = _depth(student.config, task), student.config.get_text_config().hidden_size
    if isinstance(teacher, Said):
        return Projections([(layers, 0)], width, teacher.hidden.shape[-1], seed)
    pairs = layer_pairs(layers, _depth(teacher.config, task), loss.layer_map)
    return Projections(pairs, width, teacher.config.get_text_config().hidden_size, seed)


def _depth(config: Any, task: str) -> int:
    text = config.get_text_config()
    return (getattr(text, "decoder_layers", None) if task == DETECTION else None) or text.num_hidden_layers
