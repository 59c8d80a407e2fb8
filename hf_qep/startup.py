"""One line that Python runs when it starts, so that programs of others know the method "qep" without importing it.

transformers has no entry points for quantizers, and `transformers serve MODEL` imports nothing that a user could name.
Python itself runs lines of `*.pth` files that lie beside the installed packages (see the documentation of `site`). The
line loads neither torch nor transformers, and does nothing once this package is gone.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from hf_qep.errors import ConfigError
from hf_qep.files import write_text_aside

FILE_NAME = "hf_qep_startup.pth"
LINE = "import importlib.util; importlib.util.find_spec('hf_qep') and __import__('hf_qep')\n"


def startup_file() -> Path:
    """Where the line lies, or would lie: beside the packages of the running Python."""
    return Path(sysconfig.get_path("purelib")) / FILE_NAME


def add_startup() -> Path:
    """Write the line and return its file; harmless if it is there. Raises ConfigError where that cannot be written."""
    file = startup_file()
    try:
        write_text_aside(file, LINE)
    except OSError as error:
        raise ConfigError(
            f"{FILE_NAME!r} cannot be written beside the packages of this Python ({error.strerror}); use a virtual "
            "environment, or `hf-qep serve`, which needs no such file"
        ) from error
    return file


def remove_startup() -> Path | None:
    """Remove the file that `add_startup` wrote and return where it was; None if there is none."""
    file = startup_file()
    if not file.exists():
        return None
    file.unlink()
    return file
