"""Unit gaussians that follow torch's CPU generator, so that a seed gives the picture it gives in PyTorch programs.

torch seeds a Mersenne Twister (Matsumoto & Nishimura 1998) with the low 32 bits of the seed and turns its integers
into gaussians by Box & Muller (1958), in one of two ways. Tensors of 16 elements or more are filled in blocks of 16
from 24-bit uniforms; smaller ones take a scalar path with 53-bit uniforms, two gaussians a pair, the second of which
waits in the generator for the next small tensor.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

_BLOCK = 16
_HALF = _BLOCK // 2


def check_seed(seed: int) -> int:
    """Return `seed` as a plain int.

    Raises
    ------
    InputError
        For anything but an integer in torch's range, -2**63 to 2**64 - 1.

    """
    try:
        value = operator.index(seed)
    except TypeError:
        raise InputError(f"seed is {seed!r}: expected an integer from -2**63 to 2**64 - 1") from None
    if isinstance(seed, bool) or not -(2**63) <= value < 2**64:
        raise InputError(f"seed is {seed!r}: expected an integer from -2**63 to 2**64 - 1")
    return value


class TorchGenerator:
    """The stream of gaussians of ``torch.Generator("cpu").manual_seed(seed)``.

    The integers behind the stream are torch's exactly; the gaussians agree to 1e-6, the rest being the last bits of
    logarithm, sine and cosine.

    Parameters
    ----------
    seed
        Any seed that ``torch.manual_seed`` takes: -2**63 to 2**64 - 1. torch uses its low 32 bits alone.

    Raises
    ------
    InputError
        For a seed that is no integer or out of that range.

    """

    def __init__(self, seed: int) -> None:
        self.seed = check_seed(seed)
        self._twister = np.random.RandomState(self.seed & 0xFFFFFFFF)
        self._waiting: float | None = None

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Draw what ``torch.randn(shape, generator=...)`` would draw next: float32, mean 0, variance 1."""
        size = math.prod(shape)
        flat = self._blocks(size) if size >= _BLOCK else np.array([self._scalar() for _ in range(size)], np.float32)
        return flat.reshape(shape)

    def _uint32(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def _blocks(self, size: int) -> NDArray[np.float32]:
        whole = size // _BLOCK * _BLOCK
        flat = np.empty(size, np.float32)
        integers = self._uint32(size)
        _box_muller(integers[:whole].reshape(-1, _BLOCK), flat[:whole].reshape(-1, _BLOCK))
        if whole != size:
            # The last 16 elements, whole blocks' share included, are then drawn afresh.
            _box_muller(self._uint32(_BLOCK).reshape(1, _BLOCK), flat[-_BLOCK:].reshape(1, _BLOCK))
        return flat

    def _scalar(self) -> float:
        if self._waiting is not None:
            value, self._waiting = self._waiting, None
            return value
        high_0, low_0, high_1, low_1 = (int(word) for word in self._uint32(4))
        turn = ((high_0 << 32 | low_0) & (1 << 53) - 1) / (1 << 53)
        u = ((high_1 << 32 | low_1) & (1 << 53) - 1) / (1 << 53)
        radius = math.sqrt(-2.0 * math.log1p(-u))
        self._waiting = radius * math.sin(2.0 * math.pi * turn)
        return radius * math.cos(2.0 * math.pi * turn)


def _box_muller(integers: NDArray[np.uint32], out: NDArray[np.float32]) -> None:
    """Fill `out` from `integers`, both of shape (blocks, 16): radii from the first half, angles from the second."""
    # In float32 throughout, as torch does: its rounding of the angle shows in the fifth digit of a large radius.
    uniforms = (integers & np.uint32(0xFFFFFF)).astype(np.float32)
    uniforms *= np.float32(2**-24)
    radius = np.log(np.float32(1) - uniforms[:, :_HALF])
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle = uniforms[:, _HALF:] * np.float32(2 * math.pi)
    np.multiply(radius, np.cos(angle), out=out[:, :_HALF])
    np.multiply(radius, np.sin(angle), out=out[:, _HALF:])


def batch_noise(seeds: Iterable[int], shape: tuple[int, ...]) -> Callable[[], NDArray[np.float32]]:
    """Give every image of a batch a generator of its own, as diffusers does with a list of generators.

    An image is then the same whether it is made alone or in a batch; by custom image i uses ``seed + i``.

    Parameters
    ----------
    seeds
        One seed an image.
    shape
        Of one image's latents, (4, height / 8, width / 8).

    Returns
    -------
    A function that draws float32 of shape (len(seeds), *shape): the initial latents at its first call, and the fresh
    noise of one sampling step at each call after that.

    Raises
    ------
    InputError
        For a seed that is no integer, or out of torch's range.

    """
    generators = [TorchGenerator(seed) for seed in seeds]

    def draw() -> NDArray[np.float32]:
        batch = np.empty((len(generators), *shape), np.float32)
        for image, generator in zip(batch, generators, strict=True):
            image[...] = generator.randn(shape)
        return batch

    return draw
