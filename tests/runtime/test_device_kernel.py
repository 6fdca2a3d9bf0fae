"""The step's kernel: the real CUDA C, compiled for the host, against the formula; and the PTX that is made of it."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.runtime.device_kernel import CONTROL, DEPTH, NAME, ROW, SOURCE, pack
from sdrt.runtime.device_ptx import PTX, SOURCE_SHA256
from sdrt.runtime.loop import denoise
from sdrt.runtime.noise import batch_noise
from sdrt.runtime.samplers import SAMPLERS, sampler_table
from sdrt.runtime.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (2, 4, 3, 5)
SIZE = 2 * 4 * 3 * 5
BLOCKS, THREADS = 3, 16

# What CUDA gives a kernel, one thread after the other: enough, as this one's threads share nothing within a block.
PRELUDE = """
#include <cstddef>
#define __global__
struct Dim { unsigned x; };
static Dim threadIdx, blockIdx, blockDim, gridDim;
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static void __syncthreads() {}
static void __threadfence() {}
static unsigned atomicAdd(unsigned* where, unsigned what) { unsigned was = *where; *where += what; return was; }
"""
EPILOGUE = """
extern "C" unsigned long sizes() { return sizeof(Row) * 1000 + sizeof(Control); }
extern "C" void launch(unsigned blocks, unsigned threads, Control* control, const float* prediction, float* latents,
                       float* previous, float* history, float* timestep, unsigned size, unsigned other) {
  gridDim.x = blocks; blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    // Thread 0 comes last: it is the one that speaks for its block at the end.
    for (unsigned t = threads; t-- > 0;) {
      threadIdx.x = t;
      sdrt_step(control, prediction, latents, previous, history, timestep, size, other);
    }
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "step.cpp").write_text(PRELUDE + SOURCE + EPILOGUE)
    library = folder / "step.so"
    command = [compiler, "-O2", "-ffp-contract=off", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", library, folder / "step.cpp"], check=True)
    return ctypes.CDLL(str(library))


def test_structures_are_laid_out_alike(kernel: ctypes.CDLL) -> None:
    kernel.sizes.restype = ctypes.c_ulong
    assert kernel.sizes() == ROW.itemsize * 1000 + CONTROL.itemsize
    assert f"#define DEPTH {DEPTH}\n" in SOURCE


def predict(x: Any, timestep: float) -> Any:
    return np.tanh(x + np.float32(timestep / 700), dtype=np.float32)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_the_source_takes_the_steps_of_the_host_to_the_last_bit(
    kernel: ctypes.CDLL, sampler: str, steps: int, *, guided: bool
) -> None:
    table = sampler_table(sampler, Schedule(), steps, eta=0.4 if sampler == "ddim" else 0.0)
    scale = np.float32(5.5)

    def unconditional(x: Any, t: float) -> Any:
        return predict(x, t / 2)

    def guided_prediction(x: Any, t: float) -> Any:
        return (predict(x, t) - unconditional(x, t)) * scale + unconditional(x, t)

    draw = batch_noise([1, 2], SHAPE[1:])
    expected = [step.latents for step in denoise(table, draw(), guided_prediction if guided else predict, draw)]

    draw = batch_noise([1, 2], SHAPE[1:])
    latents = np.full(2 * SIZE, np.nan, np.float32)
    latents[:SIZE] = draw().reshape(-1)
    rows, added = pack(table, float(scale))
    drawn = [(draw().reshape(-1), used) for used in added]
    noise = np.concatenate([np.zeros(0, np.float32), *(part for part, used in drawn if used)])
    trajectory = np.zeros((len(rows), SIZE), np.float32)
    control = np.zeros(1, CONTROL)
    control["count"], control["stride"] = len(rows), SIZE
    control["rows"], control["noise"] = rows.ctypes.data, noise.ctypes.data
    control["trajectory"] = trajectory.ctypes.data
    prediction, previous = np.full(2 * SIZE, np.nan, np.float32), np.full(SIZE, np.nan, np.float32)
    history, timestep = np.full(DEPTH * SIZE, np.nan, np.float32), np.zeros(1, np.float32)

    def launch() -> None:
        arrays = (control, prediction, latents, previous, history, timestep)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        numbers = [ctypes.c_uint(number) for number in (SIZE, SIZE if guided else 0)]
        kernel.launch(ctypes.c_uint(BLOCKS), ctypes.c_uint(THREADS), *pointers, *numbers)

    launch()
    for index, wanted in enumerate(expected):
        assert control["index"][0] == index + 1
        assert timestep[0] == np.float32(table.timesteps[index])
        x = latents[:SIZE].reshape(SHAPE)
        if guided:
            assert np.array_equal(latents[SIZE:], latents[:SIZE])
            prediction[:SIZE] = unconditional(x, float(timestep[0])).reshape(-1)
            prediction[SIZE:] = predict(x, float(timestep[0])).reshape(-1)
        else:
            prediction[:SIZE] = predict(x, float(timestep[0])).reshape(-1)
        launch()
        np.testing.assert_array_equal(trajectory[1 + index].reshape(SHAPE), wanted)
    assert control["arrived"][0] == 0
    kept = latents.copy()
    launch()  # past the end it does nothing
    np.testing.assert_array_equal(latents, kept)


def test_noise_that_no_row_adds_is_drawn_and_not_uploaded() -> None:
    table = sampler_table("euler_a", Schedule(), 4)
    rows, added = pack(table, 1.0)
    assert added == [True, True, True, False]  # the last step leads to no noise at all
    assert rows["noise"].tolist() == [0, 0, 1, 2, 0]
    assert rows["c"][-1] == 0


def test_the_ptx_is_that_of_the_source() -> None:
    assert hashlib.sha256(SOURCE.encode()).hexdigest() == SOURCE_SHA256, "run python -m bench.ptx"
    assert f".entry {NAME}(" in PTX
    assert len(re.findall(r"\.param \.u64 \w+,", PTX)) == 6
    assert len(re.findall(r"\.param \.u32 \w+", PTX.partition(")")[0])) == 2
    assert PTX.isascii()
    assert ".target sm_75" in PTX
    # Products and sums are rounded one by one: fused ones would give other bits than the host's.
    assert "fma" not in PTX


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_nvidias_assembler_takes_the_ptx(tmp_path: Path, architecture: str) -> None:
    assembler = shutil.which("ptxas")
    if assembler is None:
        pytest.skip("there is no ptxas")
    (tmp_path / "step.ptx").write_text(PTX)
    command = [assembler, f"-arch={architecture}", "-o", str(tmp_path / "step.cubin"), str(tmp_path / "step.ptx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
