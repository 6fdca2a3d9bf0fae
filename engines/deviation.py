"""How far the output of a graph strays from its reference: the three figures of a manifest's parity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def deviation(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float, float]:
    """Give the largest absolute error, the relative L2 error and the PSNR in dB; NaN where the output has one."""
    difference = found.astype(np.float64) - expected
    square = float(np.mean(difference**2))
    peak = float(np.ptp(expected))
    relative = math.sqrt(square / float(np.mean(expected.astype(np.float64) ** 2)))
    psnr = 10 * math.log10(peak**2 / square) if square else math.inf
    return float(np.abs(difference).max()), relative, psnr
