"""What pyproject.toml has no words for: the kernels in C, which are compiled where that can be done."""

from __future__ import annotations

import platform
import sys
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class SharedLibrary(build_ext):
    """Compiles a library that is no module of Python's: a name that ends in ``.so`` would make it one."""

    def get_ext_filename(self, fullname: str) -> str:
        """Give the file's path below the packages' folder."""
        *packages, name = fullname.split(".")
        return "/".join((*packages, f"lib{name}.so.1"))


class PlatformWheel(bdist_wheel):
    """A wheel for every Python of a platform: what is compiled does not know of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Give the tags of the file's name."""
        *_, name = super().get_tag()
        return "py3", "none", name


KERNELS = Extension(
    "sdrt.runtime.sdrt_kernels",
    [
        f"src/sdrt/runtime/{name}.c"
        for name in ("kernels", "attention", "group_norm", "layer_norm", "pack", "product", "program")
    ],
    depends=["src/sdrt/runtime/kernels.h"],
    # Without its own paths in it, it is the same wherever it is compiled.
    extra_compile_args=["-std=gnu11", "-O2", "-g0"],
    extra_link_args=["-s", "-pthread", "-lm", "-Wl,--build-id=none"],
    optional=True,  # without a compiler sdrt is as good, and slower on some machines
)

may_have_amx = sys.platform == "linux" and platform.machine() == "x86_64"
commands = {"bdist_wheel": PlatformWheel, "build_ext": SharedLibrary}
settings: dict[str, Any] = {"ext_modules": [KERNELS], "cmdclass": commands} if may_have_amx else {}
setup(**settings)
