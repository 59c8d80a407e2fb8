"""What the processor is called."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str | None:
    """The name that the processor gives itself; None if the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None
