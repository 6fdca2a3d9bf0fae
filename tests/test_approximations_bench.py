"""The measurement of what less work costs, on a model that takes no time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from bench.approximations import SETTINGS, judged, psnr, table, timed

import sdrt

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {"num_inference_steps": 6, "sampler": "ddim", "width": 64, "height": 64}


def test_every_setting_is_timed_and_its_evaluations_are_told(tiny_bundle: Path) -> None:
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        settings, kinds = timed(pipe, 1, **SMALL)
    assert list(settings) == list(SETTINGS)
    assert settings["exact"]["evaluations"] == {"whole U-Net, with and without prompt": 6}
    assert settings["cache 3"]["evaluations"] == {
        "whole U-Net, with and without prompt": 2,
        "outer blocks, with and without prompt": 4,
    }
    assert settings["encoder 2"]["evaluations"] == {
        "whole U-Net, with and without prompt": 3,
        "decoder alone, with and without prompt": 3,
    }
    for figures in settings.values():
        assert sum(figures["evaluations"].values()) == 6
        assert 0 < figures["loop seconds"] < figures["seconds"]
    assert len(kinds) == 6  # three parts of the U-Net, guided or not
    shown = table({"settings": settings, "evaluation seconds": kinds, "peak memory GB": {"exact": 1.0}})
    assert [line.split("  ")[0] for line in shown.splitlines()[1 : 1 + len(SETTINGS)]] == list(SETTINGS)


def test_pictures_are_judged_and_compared_with_the_exact_ones(tiny_bundle: Path) -> None:
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        found = judged(pipe, 2, **SMALL)
    assert "PSNR" not in found["exact"]
    for name in SETTINGS:
        assert 0 <= found[name]["unseen prompts"] <= 1
        assert name == "exact" or found[name]["PSNR"] > 10


def test_psnr_is_that_of_the_literature() -> None:
    flat = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(flat, flat) == float("inf")
    assert abs(psnr(flat, flat + np.uint8(1)) - 48.1308) < 1e-4
