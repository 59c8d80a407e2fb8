"""One progress bar with an estimate; silent when asked, or when standard error is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """Handle given to the code that works; does nothing when silent."""

    def __init__(self, inner: Any = None) -> None:
        self._inner = inner

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """`steps` more are done; `detail` is shown at the end of the line."""
        if self._inner is not None:
            self._inner.set_postfix_str(detail, refresh=False)
            self._inner.update(steps)


class Progress:
    """Factory of bars. quiet: never show anything."""

    def __init__(self, quiet: bool = False) -> None:
        self.visible = not quiet and sys.stderr.isatty()

    @contextmanager
    def bar(self, title: str, total: int, unit: str = "step") -> Iterator[Bar]:
        """A bar of `total` steps; tqdm estimates the remaining time. unit: "B" is shown in kB, MB and so on."""
        if not self.visible:
            yield Bar()
            return
        from tqdm import tqdm

        look = {"file": sys.stderr, "dynamic_ncols": True, "unit_scale": unit == "B"}
        with tqdm(total=total, desc=title, unit=unit, **look) as inner:
            yield Bar(inner)


SILENT = Progress(quiet=True)
