"""Compile the kernel of `sdrt.runtime.device_kernel` to the PTX that is kept in ``runtime/device_ptx.py``.

``python -m bench.ptx`` needs NVRTC and no GPU: ``pip install cuda-bindings nvidia-cuda-nvrtc-cu12==12.0.140``. That
version of NVRTC writes PTX 8.0, which drivers from 525 on understand; a later one would ask for a later driver.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import os
from pathlib import Path
from typing import Any

from sdrt.runtime.device_kernel import SOURCE

TARGET = Path(__file__).parents[1] / "runtime" / "device_ptx.py"
ARCHITECTURE = b"--gpu-architecture=compute_75"


def compile_ptx(source: str, nvrtc: Any) -> str:
    """Compile CUDA C to PTX.

    Parameters
    ----------
    source
        Of one kernel.
    nvrtc
        The library, loaded with ctypes.

    Raises
    ------
    RuntimeError
        With the compiler's messages.

    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"step.cu", 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(ARCHITECTURE))
    read = nvrtc.nvrtcGetProgramLog if failed else nvrtc.nvrtcGetPTX
    measure = nvrtc.nvrtcGetProgramLogSize if failed else nvrtc.nvrtcGetPTXSize
    measure(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    read(program, text)
    if failed:
        raise RuntimeError(text.value.decode())
    return text.value.decode()


def module_of(source: str, ptx: str) -> str:
    """Write the Python module that keeps the PTX."""
    # NVRTC's own tables of architectures, which nothing uses; and its comments on itself but for the release.
    lines = [line.replace("\t", "  ").rstrip() for line in ptx.splitlines() if not line.startswith((".global", "//"))]
    release = next(line for line in ptx.splitlines() if "release" in line).removeprefix("// ").split(", ")[1]
    digest = hashlib.sha256(source.encode()).hexdigest()
    body = "\n".join(line for line in lines if line)
    return (
        f'"""Written by ``python -m bench.ptx`` with NVRTC, {release}: do not edit."""\n\n'
        f'SOURCE_SHA256 = "{digest}"\n"""Of the `device_kernel.SOURCE` that this is."""\n\nPTX = """{body}\n"""\n'
    )


def main() -> None:
    """Compile and write."""
    nvrtc = ctypes.CDLL(os.environ.get("NVRTC") or ctypes.util.find_library("nvrtc") or "libnvrtc.so.12")
    TARGET.write_text(module_of(SOURCE, compile_ptx(SOURCE, nvrtc)), encoding="ascii")


if __name__ == "__main__":
    main()
