"""Builds the project's packages for pip (PEP 517), as setuptools does, and puts compiled libraries into wheels.

The libraries of the kernels and of the TensorRT plugin are compiled by zig against an old glibc, so that a wheel serves
where that or a newer one is; with CXX set, by that compiler against what is here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 - what pip asks for besides
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

GLIBC = (2, 28)
"""The oldest that a wheel is for, of Debian 10 and RHEL 8: that of NumPy's and ONNX Runtime's."""
COMPILERS = ("nvidia-cuda-nvrtc-cu12==12.9.86", "numpy>=1.26", "ziglang>=0.14,<0.18")
_COMPILE = "import pathlib, sys; from pascalvl.plugins.tensorrt.build import build_packaged; "
_COMPILE += "build_packaged(pathlib.Path(sys.argv[1]))"


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """The packages that pip installs before it asks for a wheel."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *COMPILERS]


class BuildPy(build_py):
    """Copies the packages, then compiles the libraries of what was copied among them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        zig = f"{sys.executable} -m ziglang c++ -target x86_64-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
        environment = {"CXX": zig} | os.environ | {"PYTHONPATH": self.build_lib}
        folder = Path(self.build_lib) / "pascalvl/plugins/native"
        subprocess.run([sys.executable, "-c", _COMPILE, str(folder)], env=environment, check=True)


class BdistWheel(bdist_wheel):
    """A wheel for every Python 3 on one kind of machine."""

    def finalize_options(self) -> None:
        self.distribution.has_ext_modules = lambda: True  # for it holds libraries
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if "CXX" in os.environ else "manylinux_{}_{}_x86_64".format(*GLIBC)
