"""`unseen` is found as `python scripts/demo_unseen.py` finds it; its folder comes last, so that it hides nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.loopback_hub.fixtures import loopback_hub

__all__ = ["loopback_hub"]

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
