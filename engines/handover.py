"""Components that go on from each other's work: whether each takes what others take or give, as a manifest says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BundleCorruptError
from .manifest import DECODER_HEAD, DECODER_STAGE, MEAN, UNET_HALVES, VARIANCE, is_decoder_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .manifest import Component


def check_handover(components: Sequence[Component]) -> None:
    """Check the U-Net's outermost blocks and halves, and the VAE decoder's parts, where there are any.

    Raises
    ------
    BundleCorruptError
        One takes what nobody gives, or one is missing.

    """
    by_name = {component.name: component for component in components}
    if shallow := by_name.get("unet_shallow"):
        unet = by_name["unet"]
        _check_inputs(shallow, _names(unet), f"and {unet.name} neither takes nor gives it")
    halves = [by_name[name] for name in UNET_HALVES if name in by_name]
    if halves:
        _check_halves(halves, by_name["unet"])
    parts = [component for component in components if is_decoder_part(component.name)]
    if parts:
        _check_parts(parts, by_name["vae_decoder"])


def _check_halves(halves: Sequence[Component], unet: Component) -> None:
    if len(halves) == 1:
        raise BundleCorruptError(f"bundle.json: components has {halves[0].name} without the U-Net's other half")
    offered = {tensor.name for tensor in unet.inputs}
    for half in halves:
        _check_inputs(half, offered, "and no part of the U-Net before it gives it")
        offered |= {tensor.name for tensor in half.outputs}
    if missing := [tensor.name for tensor in unet.outputs if tensor.name not in offered]:
        raise BundleCorruptError(f"bundle.json: components has halves of the U-Net, and none gives {missing[0]!r}")


def _check_parts(parts: Sequence[Component], decoder: Component) -> None:
    expected = (DECODER_HEAD, *(DECODER_STAGE.format(number) for number in range(1, len(parts))))
    for part, name in zip(parts, expected, strict=True):
        if part.name != name:
            raise BundleCorruptError(f"bundle.json: components has {part.name} in the place of {name}")
    offered = {tensor.name for tensor in decoder.inputs}
    for part in parts:
        _check_inputs(part, offered, "and no part before it gives it")
        offered |= {MEAN, VARIANCE, *(tensor.name for tensor in part.outputs)}
    if missing := [tensor.name for tensor in decoder.outputs if tensor.name not in offered]:
        raise BundleCorruptError(f"bundle.json: components has parts of the VAE decoder, and none gives {missing[0]!r}")


def _check_inputs(component: Component, offered: Iterable[str], otherwise: str) -> None:
    if missing := [tensor.name for tensor in component.inputs if tensor.name not in offered]:
        raise BundleCorruptError(
            f'bundle.json: components has {component.name}, which takes "{missing[0]}", {otherwise}'
        )


def _names(component: Component) -> set[str]:
    return {tensor.name for tensor in (*component.inputs, *component.outputs)}
