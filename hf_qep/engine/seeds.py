"""Seeds of parts of a job, from its seed and their names: the order of work cannot change them."""

from __future__ import annotations

import hashlib

from hf_qep.architectures.parts import LinearRef


def derived_seed(*parts: object) -> int:
    """A seed below 2^63 that depends on all `parts`, as they are printed."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def layer_seed(seed: int, ref: LinearRef) -> int:
    """Seed of one linear, from its name: order and number of devices cannot change it."""
    return derived_seed(seed, ref.name, ref.expert)
