"""What both rows of a guided step have in common is computed once, and nothing changes by that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.engines.manifest import DimRange
from sdrt.runtime import backends
from sdrt.runtime.common_rows import compute_once
from sdrt.runtime.compile_cache import CompileCache

if TYPE_CHECKING:
    from pathlib import Path

openvino = pytest.importorskip("openvino")

Shapes = dict[str, tuple[int, ...]]


def guided_shapes(bundle: Bundle, images: int) -> Shapes:
    sizes = {"batch": 2 * images, "height": 8, "width": 12}
    component = bundle.component("unet")
    return {
        spec.name: tuple(sizes[dim.name] if isinstance(dim, DimRange) else dim for dim in spec.shape)
        for spec in (*component.inputs, *component.outputs)
    }


def read(bundle: Bundle, shapes: Shapes) -> Any:
    component = bundle.component("unet")
    model = openvino.Core().read_model(bundle.path(component.graph))
    model.reshape({spec.name: shapes[spec.name] for spec in component.inputs})
    return model


def batches(model: Any, kind: str) -> list[int]:
    return [node.get_output_shape(0)[0] for node in model.get_ordered_ops() if node.get_type_name() == kind]


@pytest.mark.parametrize("images", [1, 3])
def test_the_first_layers_take_half_of_the_batch(tiny_bundle: Path, images: int) -> None:
    bundle = Bundle.open(tiny_bundle)
    model = read(bundle, guided_shapes(bundle, images))
    before = batches(model, "Convolution")
    assert set(before) == {2 * images}
    assert compute_once(model)
    after = batches(model, "Convolution")
    # The first convolution, the two of a residual block, and those of the transformer that are before any text.
    assert after[:3] == [images] * 3
    assert after[-1] == 2 * images
    assert len(after) == len(before)
    assert [output.shape[0] for output in model.outputs] == [2 * images] * 2


def test_an_odd_batch_is_left_as_it_is(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    shapes = {
        name: (1, *shape[1:]) if shape[0] == 2 else shape for name, shape in guided_shapes(bundle, images=1).items()
    }
    model = read(bundle, shapes)
    assert not compute_once(model)
    assert set(batches(model, "Convolution")) == {1}


@pytest.mark.parametrize("images", [1, 2])
def test_a_session_computes_the_same_in_pairs(
    tiny_bundle: Path, images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    bundle = Bundle.open(tiny_bundle)
    shapes = guided_shapes(bundle, images)
    rng = np.random.default_rng(0)
    given = {spec.name: rng.standard_normal(shapes[spec.name], np.float32) for spec in bundle.component("unet").inputs}
    given["latents"][images:] = given["latents"][:images]
    given["timestep"][:] = 500
    found = []
    for in_pairs in (False, True, True):  # the last one from what the one before has compiled
        session = backends._openvino_session(bundle, "unet", "fp32", CompileCache(bundle, "openvino"))
        with session:
            binding = session.bind(shapes, in_pairs=in_pairs)
            for name, array in given.items():
                binding.inputs[name][...] = array
            binding.run()
            found.append({name: array.copy() for name, array in binding.outputs.items()})
    kept = {blob.name.split(".")[0].partition("-fp32-")[2] for blob in tmp_path.glob("compiled/openvino/*/*.blob")}
    assert {name.startswith("pairs-") for name in kept} == {True, False}
    for name, expected in found[0].items():
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(found[1][name], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found[1][name], found[2][name])
