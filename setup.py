"""Builds ``ssdtrain._C``, the engine in C++. Everything else about the package is in ``pyproject.toml``.

``SSDTRAIN_NO_CPP=1`` at build time leaves the extension out; the package then uses its Python engine.
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

NOT_IN_THE_MODULE = {"stress_test.cpp"}
HINT = "set SSDTRAIN_NO_CPP=1 to install without it (the Python engine is slower)"


class BuildExt(build_ext):  # type: ignore[misc]
    """Says what to do when the extension cannot be built."""

    def run(self) -> None:
        """Builds, or raises with the way out."""
        if sys.platform != "linux":
            raise RuntimeError(f"Expected Linux to build ssdtrain._C, got {sys.platform}; {HINT}")
        try:
            super().run()
        except Exception as error:
            raise RuntimeError(f"Expected ssdtrain._C to build, got: {error}; {HINT}") from error


def extensions() -> list[Pybind11Extension]:
    """The extension, or nothing when the user opts out."""
    if os.environ.get("SSDTRAIN_NO_CPP", "0") not in ("", "0"):
        line = "=" * 88
        print(
            f"{line}\nSSDTRAIN_NO_CPP is set: ssdtrain is built WITHOUT its C++ engine. Offloading will run on the"
            f"\nslower Python engine. Unset SSDTRAIN_NO_CPP and reinstall to get it.\n{line}",
            file=sys.stderr,
        )
        return []
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp") if path.name not in NOT_IN_THE_MODULE)
    headers = sorted(str(path) for path in Path("csrc").glob("*.h"))
    extension = Pybind11Extension("ssdtrain._C", sources, cxx_std=17, include_dirs=["csrc"], depends=headers)
    extension.extra_compile_args += ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
    extension.extra_link_args += ["-pthread"]
    return [extension]


ParallelCompile("SSDTRAIN_BUILD_JOBS", default=os.cpu_count() or 1).install()
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
