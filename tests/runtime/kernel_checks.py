"""What the tests of the compiled kernels share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.manifest import DimRange
from sdrt.runtime import backends
from sdrt.runtime.compile_cache import CompileCache
from sdrt.runtime.kernels import kernels
from sdrt.runtime.openvino import _fix_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdrt.engines.bundle import Bundle

    Array = NDArray[Any]

openvino = pytest.importorskip("openvino")

needs_kernels = pytest.mark.skipif(kernels() is None, reason="not compiled, or a CPU without AMX")
NOT_WRITTEN = 0x7FC1
"""Bits that no kernel gives."""


def bf16(array: Array) -> Array:
    """Round to bf16 as processors do, as the upper halves of float32."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def fp32(array: Array) -> Array:
    return (array.astype(np.uint32) << 16).view(np.float32)


def tokens(seed: int, *shape: int, spread: float = 1.0) -> Array:
    return bf16(np.random.default_rng(seed).standard_normal(shape, np.float32) * spread)


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
