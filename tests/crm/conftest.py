"""`crm` is a folder of scripts, found as `python scripts/demo_crm.py` finds it; last, so that it hides nothing."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
