"""Optimisation profiles: for which shapes an engine is built, worked out from sizes and counts of images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import InputError
from .manifest import DimRange, InputRange, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .manifest import Component, Dim

Profile = dict[str, InputRange]
Values = dict[str, int]
"""The size of each dimension that is chosen at run time, by its name."""


def check_sizes(
    unet: Sequence[TensorSpec],
    factor: int,
    sizes: Sequence[tuple[int, int]],
    images: Sequence[int],
    *,
    dynamic: bool = False,
) -> None:
    """Refuse sizes and counts that the graphs do not take.

    Parameters
    ----------
    unet
        The inputs of the U-Net's graph.
    factor
        Image pixels to a latent pixel.
    sizes
        Width and height in pixels.
    images
        How many images a request makes.
    dynamic
        Whether engines shall take all that lies between them.

    Raises
    ------
    InputError
        A side is no multiple of the latent space's factor, something is out of its range, or nothing lies between.

    """
    limits = {dim.name: dim for dim in _dims(unet)}
    for width, height in sizes:
        for name, side in (("width", width), ("height", height)):
            limit = limits[name]
            latent, rest = divmod(side, factor)
            if rest or not limit.min <= latent <= limit.max or latent % limit.multiple_of:
                raise InputError(
                    f"the {name} of {width}x{height} is {side}: expected a multiple of {factor * limit.multiple_of} "
                    f"from {factor * limit.min} to {factor * limit.max}"
                )
    most = limits["batch"].max // 2
    if not images:
        raise InputError(f"there is no count of images to build for: expected 1 to {most}")
    for count in images:
        if not 1 <= count <= most:
            raise InputError(f"{count} images at once: expected 1 to {most}")
    if dynamic and len(set(sizes)) == len(set(images)) == 1:
        raise InputError(
            "dynamic engines take all sizes and counts of images between those given, and one of each is given: "
            "give another size or count too, or leave --dynamic out"
        )


def profiles_of(
    component: Component, sizes: Sequence[tuple[int, int]], images: Sequence[int], factor: int, *, dynamic: bool
) -> list[Profile]:
    """Choose the optimisation profiles of a component.

    The U-Net sees each image twice in one batch with guidance, and once without: both are there for every count of
    images, guided first. The text encoder sees each different prompt once, 1 to twice the images. The autoencoder
    takes one image at a time, whose activations are what needs most memory.

    Parameters
    ----------
    component
        Of an ONNX bundle.
    sizes
        Width and height in pixels.
    images
        How many images a request makes.
    factor
        Image pixels to a latent pixel.
    dynamic
        One profile from the least to the most, rather than one for each combination.

    """
    if component.name == "text_encoder":
        batch = {"min": 1, "opt": min(2, 2 * max(images)), "max": 2 * max(images)}
        return [_profile(component, *({"batch": batch[key]} for key in ("min", "opt", "max")))]
    batches = [1]
    if component.name == "unet":
        batches = list(dict.fromkeys([count * rows for rows in (2, 1) for count in images]))
    points = [_values(size, batch, factor) for size in dict.fromkeys(sizes) for batch in batches]
    if dynamic:
        least, most = ({key: pick(point[key] for point in points) for key in points[0]} for pick in (min, max))
        return [_profile(component, least, points[0], most)]
    return [_profile(component, point, point, point) for point in points]


def tensors_of(
    component: Component, profiles: Sequence[Mapping[str, InputRange]]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Narrow the inputs and outputs of a component to what its profiles take."""
    values: dict[str, tuple[int, int]] = {}
    for spec in component.inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, DimRange):
                ranges = [profile[spec.name] for profile in profiles]
                values[dim.name] = min(each.min[axis] for each in ranges), max(each.max[axis] for each in ranges)
    for dim in _dims((*component.inputs, *component.outputs)):
        if dim.name not in values:
            values[dim.name] = _derived(dim.name, values, component)
    inputs, outputs = (
        tuple(replace(spec, shape=tuple(_narrow(dim, values) for dim in spec.shape)) for spec in specs)
        for specs in (component.inputs, component.outputs)
    )
    return inputs, outputs


def _derived(name: str, values: Mapping[str, tuple[int, int]], component: Component) -> tuple[int, int]:
    """Give the range of an output's side: the image's from the latent's, or the other way round."""
    sizes = {dim.name: dim for dim in _dims((*component.inputs, *component.outputs))}
    other = name.removeprefix("image_") if name.startswith("image_") else f"image_{name}"
    least, most = values[other]
    return least * sizes[name].max // sizes[other].max, most * sizes[name].max // sizes[other].max


def _narrow(dim: Dim, values: Mapping[str, tuple[int, int]]) -> Dim:
    if isinstance(dim, int):
        return dim
    least, most = values[dim.name]
    return least if least == most else replace(dim, min=least, max=most)


def _dims(specs: Sequence[TensorSpec]) -> list[DimRange]:
    return [dim for spec in specs for dim in spec.shape if isinstance(dim, DimRange)]


def _values(size: tuple[int, int], batch: int, factor: int) -> Values:
    width, height = size
    return {
        "batch": batch,
        "width": width // factor,
        "height": height // factor,
        "image_width": width,
        "image_height": height,
    }


def _profile(component: Component, least: Values, best: Values, most: Values) -> Profile:
    return {
        spec.name: InputRange(*(_shape(spec, values) for values in (least, best, most))) for spec in component.inputs
    }


def _shape(spec: TensorSpec, values: Values) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else values[dim.name] for dim in spec.shape)
