"""The floor: how fast this machine multiplies large matrices, which no U-Net can beat that computes all of itself."""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..runtime.openvino import default_precision
from .contender import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .settings import Settings

    #: Multiplies once and tells the seconds.
    Multiply = Callable[[], float]

_SIZES: Final = (512, 1024, 2048, 4096)
_BURST_S: Final = 0.5
_TRIES: Final = 3
_SLOW_S: Final = 0.5


class Floor:
    """A contender that does nothing but multiply, with the library and the size of matrices that are fastest here.

    Parameters
    ----------
    settings
        Of what else is measured: matrices are no larger than a step of the U-Net has work for.

    """

    def __init__(self, settings: Settings) -> None:
        most = settings.step_flops or 0
        sizes = [size for size in _SIZES if 2 * size**3 <= most] or [_SIZES[0]]
        self._best: dict[str, tuple[float, str, int, Multiply]] = {}
        slow = set()
        for size in sizes:
            for precision, library, multiply in _multipliers(size):
                if (precision, library) in slow:
                    continue
                seconds = min(multiply() for _ in range(_TRIES))
                if seconds > _SLOW_S:  # bf16 on a CPU without instructions for it
                    slow.add((precision, library))
                rate = 2 * size**3 / seconds
                if precision not in self._best or rate > self._best[precision][0]:
                    self._best[precision] = rate, library, size, multiply

    @property
    def about(self) -> dict[str, Any]:
        """Tell for each precision which library multiplies what."""
        return {name: f"{library}, {size} x {size}" for name, (_, library, size, _) in self._best.items()}

    def step(self, _turn: int) -> Turn:
        """Multiply for half a second in each precision; ``rates`` has the operations per second."""
        began = time.perf_counter()
        rates = {}
        for precision, (_, _, size, multiply) in self._best.items():
            times = [multiply()]
            while sum(times) < _BURST_S:
                times.append(multiply())
            rates[precision] = 2 * size**3 * len(times) / sum(times)
        return Turn(time.perf_counter() - began, {"rates": rates})


def _multipliers(size: int) -> Iterator[tuple[str, str, Multiply]]:
    yield "fp32", "numpy", _numpy(size)
    if importlib.util.find_spec("torch") is not None:
        from ..export.peers import multiplier  # noqa: PLC0415 - torch, where it is installed

        for precision in ("fp32", "bf16"):
            yield precision, "torch", multiplier(size, precision)
    if importlib.util.find_spec("openvino") is not None:
        yield "fp32", "openvino", _openvino(size, "f32")
        if default_precision() == "bf16":
            yield "bf16", "openvino", _openvino(size, "bf16")


def _numpy(size: int) -> Multiply:
    a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    out = np.empty_like(a)

    def multiply() -> float:
        began = time.perf_counter()
        np.matmul(a, b, out=out)
        return time.perf_counter() - began

    return multiply


def _openvino(size: int, precision: str) -> Multiply:
    """Multiply by a constant, which is laid out for it beforehand as weights are."""
    import openvino  # noqa: PLC0415 - where it is installed
    from openvino import opset13 as ops  # noqa: PLC0415

    a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    given = ops.parameter([size, size], np.float32)
    model = openvino.Model([ops.matmul(given, ops.constant(b), transpose_a=False, transpose_b=False)], [given])
    request = (
        openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision}).create_infer_request()
    )
    request.set_input_tensor(openvino.Tensor(a))

    def multiply() -> float:
        began = time.perf_counter()
        request.infer()
        return time.perf_counter() - began

    return multiply
