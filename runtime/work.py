"""How much of the U-Net each step of a request evaluates, where less than all of it was asked for.

Three approximations save work, and they combine: guidance between two noise levels alone (Kynkaanniemi et al. 2024,
arXiv:2404.07724), deep features of the U-Net kept for some steps (Ma et al. 2023, DeepCache, arXiv:2312.00858), and
all features of its encoder kept for some steps (Li et al. 2023, Faster Diffusion, arXiv:2312.09608).
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
    reuses_encoder
        Of a whole evaluation the decoder alone, on the features that the encoder gave last.

    """

    guided: bool
    whole: bool
    reuses_encoder: bool = False


def plan(
    sigmas: Iterable[float],
    *,
    guided: bool,
    guidance_interval: tuple[float, float] | None,
    cache_interval: int,
    encoder_interval: int,
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
    encoder_interval
        The encoder once in so many evaluations of the whole U-Net, 1 for all; earlier too, as the whole U-Net.

    """
    low, high = (0.0, math.inf) if guidance_interval is None else guidance_interval
    evaluations: list[Work] = []
    age, for_both = cache_interval, False
    encoder_age, encoder_for_both = encoder_interval, False
    for sigma in sigmas:
        both = guided and low < sigma <= high
        whole = age >= cache_interval or (both and not for_both)
        age, for_both = (1, both) if whole else (age + 1, for_both)
        reuses = whole and encoder_age < encoder_interval and (encoder_for_both or not both)
        if whole:
            encoder_age, encoder_for_both = (encoder_age + 1, encoder_for_both) if reuses else (1, both)
        evaluations.append(Work(both, whole, reuses))
    return tuple(evaluations)
