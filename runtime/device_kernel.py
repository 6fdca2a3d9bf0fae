"""The kernel that turns a prediction into the next latents: guidance, the table's row, and on to the next row.

`SOURCE` is what it does; `device_ptx.PTX` is the same for the driver, compiled by ``python -m bench.ptx`` for compute
capability 7.5. The driver makes it into code for its GPU and keeps that in its own cache, so that no compiler has to be
installed where sdrt runs: NVRTC is no part of cuda-bindings. Drivers from 525 on understand PTX 8.0.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from .cuda import Kernel
from .device_ptx import PTX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .cuda import Device, Stream
    from .solvers import SamplerTable

NAME = "sdrt_step"
DEPTH = 5
"""How many model outputs are remembered: as many as PLMS looks at."""

SOURCE = r"""
// One step of any sampler of runtime/solvers.py, with classifier-free guidance, for every element of the latents.
// Each product and sum is rounded by itself, in the order of runtime/loop.py, so that both give the same bits.
#define DEPTH 5

struct Row {
  float timestep, guidance, p, q, a, a_prev, c;
  int noise;  // which of the drawn noises this row adds
  float b[DEPTH];
};

struct Control {
  int index, count;    // the row that is next, and how many there are
  unsigned arrived;    // blocks that have read `index` in this launch
  unsigned stride;     // from one step's latents in `trajectory` to the next's; 0 keeps the last alone
  const Row* rows;
  const float* noise;  // as many latents as the table draws
  float* trajectory;   // the latents after each step
};

extern "C" __global__ void sdrt_step(Control* control, const float* prediction, float* latents, float* previous,
                                     float* history, float* timestep, unsigned size, unsigned other) {
  const int index = control->index;
  if (index >= control->count) return;
  const Row row = control->rows[index];
  const float* noise = control->noise + (size_t)row.noise * size;
  float* trajectory = control->trajectory + (size_t)index * control->stride;
#pragma unroll 1
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const float x = latents[i];
    float f = prediction[i];
    f = __fadd_rn(__fmul_rn(__fsub_rn(prediction[i + other], f), row.guidance), f);
    float m = __fmul_rn(f, row.q);
    if (row.p != 0) m = __fadd_rn(m, __fmul_rn(x, row.p));
    history[(size_t)(index % DEPTH) * size + i] = m;
    float next = __fmul_rn(x, row.a);
    if (row.a_prev != 0) next = __fadd_rn(next, __fmul_rn(previous[i], row.a_prev));
#pragma unroll
    for (int back = 0; back < DEPTH; ++back)
      if (row.b[back] != 0)
        next = __fadd_rn(next, __fmul_rn(history[(size_t)((index + DEPTH - back) % DEPTH) * size + i], row.b[back]));
    if (row.c != 0) next = __fadd_rn(next, __fmul_rn(noise[i], row.c));
    previous[i] = x;
    latents[i] = next;
    latents[i + other] = next;
    trajectory[i] = next;
  }
  // The last block to come here moves on to the next row: by then all have read this one.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&control->arrived, 1u) == gridDim.x - 1) {
      control->arrived = 0;
      control->index = index + 1;
      if (index + 1 < control->count) *timestep = control->rows[index + 1].timestep;
    }
  }
}
"""

_floats = ("timestep", "guidance", "p", "q", "a", "a_prev", "c")
ROW = np.dtype([*((name, "<f4") for name in _floats), ("noise", "<i4"), ("b", "<f4", (DEPTH,))])
"""``Row`` of `SOURCE`."""

CONTROL = np.dtype(
    [
        *((name, "<i4") for name in ("index", "count")),
        *((name, "<u4") for name in ("arrived", "stride")),
        *((name, "<u8") for name in ("rows", "noise", "trajectory")),
    ]
)
"""``Control`` of `SOURCE`."""

_THREADS = 256
_MOST_BLOCKS = 2048  # beyond it each thread takes several elements


def pack(table: SamplerTable, guidance_scale: float) -> tuple[NDArray[Any], list[bool]]:
    """Lay out a sampler's table for the kernel, with a row before it that needs no prediction.

    That row turns the unit gaussian into the first x, puts it where the network reads it, and the first timestep too.

    Parameters
    ----------
    table
        From `samplers.sampler_table`.
    guidance_scale
        Of classifier-free guidance; without meaning where the network runs once a step.

    Returns
    -------
    tuple
        `ROW` of shape (1 + S,), and for each noise that the table draws, in order, whether any row adds it.

    """
    rows = np.zeros(1 + len(table), ROW)
    rows["a"][0] = table.initial_scale
    steps = rows[1:]
    steps["guidance"] = guidance_scale
    steps["timestep"] = table.timesteps
    for name in ("p", "q", "a", "a_prev"):
        steps[name] = getattr(table, name)
    steps["b"][:, : table.b.shape[1]] = table.b
    added = table.draws_noise & (table.c != 0)
    steps["c"] = np.where(added, table.c, 0.0)
    steps["noise"] = np.where(added, np.cumsum(added) - 1, 0)
    return rows, added[table.draws_noise].tolist()


class StepKernel:
    """The kernel, loaded for a GPU."""

    def __init__(self, device: Device) -> None:
        self._kernel = Kernel(device, PTX, NAME)

    def launch(
        self,
        stream: Stream,
        *,
        control: int,
        prediction: int,
        latents: int,
        previous: int,
        history: int,
        timestep: int,
        size: int,
        guided: bool,
    ) -> None:
        """Enqueue one step.

        Parameters
        ----------
        stream
            Where.
        control
            Address of a `CONTROL`. It and all others are in the GPU's memory.
        prediction, latents
            Addresses of the network's output and input: `size` float32 each, or twice as many where `guided`, the
            unconditional ones first.
        previous, history, timestep
            Addresses of `size`, ``DEPTH * size`` and one float32.
        size
            Elements of the latents of all images.
        guided
            Whether the network ran twice.

        """
        blocks = min(-(-size // _THREADS), _MOST_BLOCKS)
        pointers = (control, prediction, latents, previous, history, timestep)
        numbers = (size, size if guided else 0)
        types = (ctypes.c_void_p,) * len(pointers) + (ctypes.c_uint,) * len(numbers)
        self._kernel.launch(stream, blocks, _THREADS, (*pointers, *numbers), types)

    def close(self) -> None:
        """Unload it."""
        self._kernel.close()
