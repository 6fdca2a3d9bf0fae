"""What the tests of the compiled kernels share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.manifest import DimRange
from sdrt.runtime import backends, own_operations
from sdrt.runtime.compile_cache import CompileCache
from sdrt.runtime.kernels import kernels
from sdrt.runtime.openvino import _fix_shapes
from sdrt.runtime.program import _KERNELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from sdrt.engines.bundle import Bundle
    from sdrt.runtime.program import Program

    Array = NDArray[Any]

openvino = pytest.importorskip("openvino")

needs_kernels = pytest.mark.skipif(kernels() is None, reason="not compiled, or a CPU without AMX")
NOT_WRITTEN = 0x7FC1
"""Bits that no kernel gives; as a number they are none, so that it shows wherever they are computed with."""
_AROUND = 4096


def bf16(array: Array) -> Array:
    """Round to bf16 as processors do, as the upper halves of float32."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def fp32(array: Array) -> Array:
    return (array.astype(np.uint32) << 16).view(np.float32)


def tokens(seed: int, *shape: int, spread: float = 1.0) -> Array:
    return bf16(np.random.default_rng(seed).standard_normal(shape, np.float32) * spread)


class Guarded:
    """An array of bf16 within memory that is not to be written, nor to be computed with.

    Parameters
    ----------
    shape
        Of the array.
    off
        By how many numbers it begins after a cache line.

    """

    def __init__(self, *shape: int, off: int = 0) -> None:
        whole = np.full(int(np.prod(shape)) + 2 * _AROUND, NOT_WRITTEN, np.uint16)
        begin = _AROUND // 2 - whole.ctypes.data // whole.itemsize % 32 + off
        end = begin + int(np.prod(shape))
        self.array = whole[begin:end].reshape(shape)
        self._around = whole[:begin], whole[end:]

    def check(self) -> Array:
        """Give the array once all of it has been written, and nothing else."""
        assert (self.array != NOT_WRITTEN).all()
        for part in self._around:
            assert (part == NOT_WRITTEN).all()
        return self.array


def guarded(array: Array, *, off: int = 0) -> Array:
    """Copy an array of bf16 into memory around which there is nothing to be computed with."""
    copy = Guarded(*array.shape, off=off).array
    copy[...] = array
    return copy


def error(found: Array, right: Array) -> float:
    """Give the relative L2 error of numbers in bf16."""
    return float(np.linalg.norm(fp32(found) - right) / np.linalg.norm(right))


def unet_shapes(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    sizes = {"batch": 2, "height": 8, "width": 12}
    component = bundle.component("unet")
    return {
        spec.name: tuple(sizes[dim.name] if isinstance(dim, DimRange) else dim for dim in spec.shape)
        for spec in (*component.inputs, *component.outputs)
    }


def read(bundle: Bundle, name: str = "unet") -> Any:
    component, shapes = bundle.component(name), unet_shapes(bundle)
    model = openvino.Core().read_model(bundle.path(component.graph))
    model.reshape({spec.name: shapes[spec.name] for spec in component.inputs if spec.name in shapes})
    _fix_shapes(model)
    return model


def kinds(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def model_of(build: Callable[..., Any], *shapes: Sequence[int]) -> Any:
    """Make a graph of what a function makes of its inputs."""
    inputs = [openvino.opset13.parameter(list(shape), np.float32) for shape in shapes]
    results = build(*inputs)
    return openvino.Model(results if isinstance(results, list) else [results], inputs)


def infer(model: Any, precision: str, *arrays: Array) -> list[Array]:
    """Compute a graph's outputs from its inputs."""
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return [array.copy() for array in compiled(list(arrays)).values()]


def steps(programs: Iterable[Program]) -> list[str]:
    """Name the kernels that programs call."""
    return [_KERNELS[int(kernel)] for program in programs for kernel in program._steps["kernel"]]


def with_ours(build: Callable[..., Any], *arrays: Array, most: float = 0.01) -> tuple[Any, list[Program]]:
    """Compare a graph that has operations of ours with OpenVINO's own in fp32.

    Returns
    -------
    tuple[Any, list[Program]]
        The graph with its programs, and these.

    """
    shapes = [array.shape for array in arrays]
    right = infer(model_of(build, *shapes), "f32", *arrays)
    model = model_of(build, *shapes)
    programs = own_operations.put_in(model)
    found = infer(model, "bf16", *arrays)
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        assert one.shape == other.shape
        assert np.linalg.norm(one - other) <= most * np.linalg.norm(other)
    return model, programs


def numbers(seed: int, *shape: int, spread: float = 1.0) -> Array:
    """Give float32 that are bf16 too."""
    return fp32(tokens(seed, *shape, spread=spread))


def predict(bundle: Bundle, precision: Any, *, in_pairs: bool = False) -> Array:
    """Run a U-Net in a session of its own."""
    shapes = unet_shapes(bundle)
    rng = np.random.default_rng(0)
    given = {spec.name: rng.standard_normal(shapes[spec.name], np.float32) for spec in bundle.component("unet").inputs}
    given["latents"][1] = given["latents"][0]
    given["timestep"][:] = 500
    with backends._openvino_session(bundle, "unet", precision, CompileCache(bundle, "openvino")) as session:
        binding = session.bind(shapes, in_pairs=in_pairs)
        for name, array in given.items():
            binding.inputs[name][...] = array
        binding.run()
        return binding.outputs["prediction"].copy()
