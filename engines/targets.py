"""The GPUs that engines are built for: names of cards to compute capabilities."""

from __future__ import annotations

import platform
import re
from typing import TYPE_CHECKING

from ..errors import InputError
from .devices import nvidia_gpus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: What engines are built for where there is no GPU and nobody said.
DEFAULT_TARGET = "rtx3090"

#: From NVIDIA's table of CUDA GPUs, https://developer.nvidia.com/cuda-gpus; the first name of each is the one shown.
_CARDS: Mapping[str, Sequence[str]] = {
    "7.5": (
        *("rtx2060", "rtx2060super", "rtx2070", "rtx2070super", "rtx2080", "rtx2080super", "rtx2080ti", "titanrtx"),
        *("gtx1650", "gtx1660", "gtx1660ti", "t4", "quadrortx4000", "quadrortx5000", "quadrortx6000", "quadrortx8000"),
    ),
    "8.0": ("a100", "a30"),
    "8.6": (
        *("rtx3050", "rtx3060", "rtx3060ti", "rtx3070", "rtx3070ti", "rtx3080", "rtx3080ti", "rtx3090", "rtx3090ti"),
        *("a2", "a10", "a16", "a40", "rtxa2000", "rtxa4000", "rtxa4500", "rtxa5000", "rtxa5500", "rtxa6000"),
    ),
    "8.9": (
        *("rtx4050", "rtx4060", "rtx4060ti", "rtx4070", "rtx4070super", "rtx4070ti", "rtx4070tisuper", "rtx4080"),
        *("rtx4080super", "rtx4090", "l4", "l40", "l40s", "rtx4000ada", "rtx4500ada", "rtx5000ada", "rtx6000ada"),
    ),
    "9.0": ("h100", "h200", "h20", "gh200"),
    "10.0": ("b100", "b200", "gb200"),
    "12.0": (
        *("rtx5050", "rtx5060", "rtx5060ti", "rtx5070", "rtx5070ti", "rtx5080", "rtx5090"),
        *("rtxpro4000", "rtxpro4500", "rtxpro5000", "rtxpro6000"),
    ),
    "12.1": ("gb10", "dgxspark"),
}
_CAPABILITY_OF = {card: capability for capability, cards in _CARDS.items() for card in cards}
_SM = re.compile(r"sm_?(?P<major>[0-9]{1,2})(?P<minor>[0-9])")
_DOTTED = re.compile(r"[0-9]{1,2}\.[0-9]")
_SEPARATORS = re.compile(r"[\s_-]")
_FILLER = re.compile(r"^(nvidia)?(geforce)?|(laptop)?(gpu)?$")


def capability_of(target: str) -> str:
    """Give the compute capability that a target names.

    Parameters
    ----------
    target
        A card (``rtx3090``, ``RTX 4090``, ``3060 Ti``, ``A100``), ``sm86``, ``8.6``, or ``native`` for the first GPU of
        this machine.

    Returns
    -------
    str
        Such as ``8.6``.

    Raises
    ------
    InputError
        No card is known by that name, or there is no GPU for ``native`` to mean.

    """
    plain = target.strip().lower()
    if plain == "native":
        gpus = nvidia_gpus()
        if not gpus:
            raise InputError(
                "the target native is this machine's own GPU, and the CUDA driver shows none: "
                f"name the card, such as {DEFAULT_TARGET}"
            )
        return gpus[0].compute_capability
    if match := _SM.fullmatch(plain):
        return f"{match['major']}.{match['minor']}"
    if _DOTTED.fullmatch(plain):
        return plain
    card = _FILLER.sub("", _SEPARATORS.sub("", plain))
    for name in (card, f"rtx{card}"):
        if name in _CAPABILITY_OF:
            return _CAPABILITY_OF[name]
    raise InputError(
        f"{target[:80]!r} is no known target: expected a compute capability such as sm86, native for this machine's "
        f"GPU, or one of {', '.join(_CAPABILITY_OF)}"
    )


def capabilities_of(targets: Iterable[str], supported: Iterable[str]) -> tuple[str, ...]:
    """Give the compute capabilities of several targets, each once, in ascending order.

    Parameters
    ----------
    targets
        As `capability_of` takes them; commas may separate several in one.
    supported
        The compute capabilities that the builder knows.

    Raises
    ------
    InputError
        There is none, one of them is not known, or the builder does not support it; the message lists what it does.

    """
    known = sorted(set(supported), key=_order)
    named = parse_targets(targets)
    for target, capability in named.items():
        if capability not in known:
            raise InputError(
                f"{target} has compute capability {capability}, for which this TensorRT builds no engines: "
                f"it builds for {', '.join(map(describe, known))}"
            )
    return tuple(sorted(set(named.values()), key=_order))


def parse_targets(targets: Iterable[str]) -> dict[str, str]:
    """Give the compute capability of each of several targets, whatever builder there is for it.

    Raises
    ------
    InputError
        There is none, or one of them is not known.

    """
    named = [part.strip() for given in targets for part in given.split(",") if part.strip()]
    if not named:
        raise InputError(f"there is no target to build for: name a card, such as {DEFAULT_TARGET}")
    return {target: capability_of(target) for target in named}


def sm_name(capability: str) -> str:
    """Write a compute capability as NVIDIA's tools do: ``sm86`` for ``8.6``."""
    return f"sm{capability.replace('.', '')}"


def describe(capability: str) -> str:
    """Write a compute capability both ways, such as ``sm86 (8.6)``."""
    return f"{sm_name(capability)} ({capability})"


def capability_of_sm(name: str) -> str | None:
    """Read ``SM86`` as ``8.6``; None for any other text."""
    match = _SM.fullmatch(name.lower())
    return f"{match['major']}.{match['minor']}" if match else None


def host_platform() -> str:
    """Name this operating system and processor as the manifest does, such as ``linux_x86_64``."""
    return f"{platform.system()}_{platform.machine()}".lower()


def _order(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
