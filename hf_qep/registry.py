"""Names that users type, one file each.

A registry is a package: every module in it whose name does not start with an underscore and that defines the marker
attribute is a member, and its file name (underscores read as hyphens or not, both work) is the name.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from hf_qep.errors import UnknownNameError


class Registry:
    """Members of one family (methods, formats), found by file name.

    kind: word for messages, such as "method".
    package: dotted package that holds one file per member.
    marker: attribute that makes a module of the package a member.
    """

    def __init__(self, kind: str, package: str, marker: str) -> None:
        self.kind, self.package, self.marker = kind, package, marker

    def names(self) -> list[str]:
        """All member names, sorted."""
        found = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return sorted(m.name for m in found if hasattr(self._load(m.name), self.marker))

    def get(self, name: str) -> ModuleType:
        """The module of `name`. Raises UnknownNameError with the known names and the nearest one."""
        key = str(name).replace("-", "_")
        names = self.names()
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UnknownNameError(f"unknown {self.kind} `{name}`; known: {', '.join(names)}{hint}")
        return self._load(key)

    def _load(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


METHODS = Registry("method", "hf_qep.methods", "solve")
FORMATS = Registry("format", "hf_qep.formats", "pack")
