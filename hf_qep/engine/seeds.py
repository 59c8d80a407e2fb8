"""Seeds of parts of a job, from its seed and their names: the order of work cannot change them."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: object) -> int:
    """A seed below 2^63 that depends on all `parts`, as they are printed."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
