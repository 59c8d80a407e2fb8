"""Programs of the folder `scripts`, imported as they import each other: by their names alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@contextmanager
def imported(*names: str) -> Iterator[SimpleNamespace]:
    """The modules by name while the body runs. Those of the folder that are not named here are forgotten as well."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(SCRIPTS):
                del sys.modules[name]
