"""How much of the U-Net each step of a request evaluates, where less than all of it was asked for.

Two approximations save work, and they combine: guidance between two noise levels alone (Kynkaanniemi et al. 2024,
arXiv:2404.07724), and deep features of the U-Net kept for some steps (Ma et al. 2023, DeepCache, arXiv:2312.00858).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Work:
    """One evaluation of the U-Net.

    Attributes
    ----------
    guided
        Two rows an image, without the prompt and with it; otherwise the one with it.
    whole
        All of the U-Net; otherwise its outermost blocks, on the deep features of the last whole evaluation.

    """

    guided: bool
    whole: bool


def plan(
    sigmas: Iterable[float], *, guided: bool, guidance_interval: tuple[float, float] | None, cache_interval: int
) -> tuple[Work, ...]:
    """Say what each evaluation of a request comes to.

    Parameters
    ----------
    sigmas
        Noise over signal at each evaluation.
    guided
        Whether there is guidance at all.
    guidance_interval
        Guidance where ``low < sigma <= high``; None for everywhere.
    cache_interval
        The whole U-Net once in so many evaluations, 1 for all. It runs earlier where guidance sets in and the
        features at hand are of the rows with the prompt alone; the count then begins anew.

    """
    low, high = (0.0, math.inf) if guidance_interval is None else guidance_interval
    evaluations: list[Work] = []
    age, for_both = cache_interval, False
    for sigma in sigmas:
        both = guided and low < sigma <= high
        whole = age >= cache_interval or (both and not for_both)
        age, for_both = (1, both) if whole else (age + 1, for_both)
        evaluations.append(Work(both, whole))
    return tuple(evaluations)
