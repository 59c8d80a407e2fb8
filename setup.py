"""Builds the processor kernels while the package is installed; everything else is in pyproject.toml.

Without a compiler the package installs as well, and the torch reference computes. The torch operator is built only
where torch is already installed; without it the library is called through ctypes.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def load_recipe():
    """hf_qep/kernels/build.py by its path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("kernel_build", ROOT / "hf_qep" / "kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_folder():
    """The package torch of the environment that is installed into; builds run in an isolated one that lacks it."""
    places = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    return next((p / "torch" for p in places if (p / "torch/include/torch/csrc/stable/library.h").is_file()), None)


class BuildKernels(build_ext):
    """Compiles with a plain compiler; a failure costs speed, not the installation."""

    def run(self):
        in_place = self.inplace or self.editable_mode
        folder = (ROOT if in_place else Path(self.build_lib)) / "hf_qep" / "kernels"
        recipe = load_recipe()
        for old in folder.glob("libhfqep-*.so"):
            if old.name not in (recipe.library_name(), recipe.operator_name()):
                old.unlink()
        try:
            recipe.build_library(folder)
            if torch_folder() is not None:
                recipe.build_operator(folder, torch_folder())
        except recipe.BuildError as error:
            print(f"hf_qep: kernels not built, the torch reference will compute: {error}", file=sys.stderr)

    def get_outputs(self):
        """The files are found by their names at run time; none is a Python module."""
        return [str(p) for p in (Path(self.build_lib) / "hf_qep" / "kernels").glob("libhfqep-*.so")]


class PlatformWheel(bdist_wheel):
    """For one platform, but any Python: the libraries use no symbol of Python."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("hf_qep.kernels._built", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
