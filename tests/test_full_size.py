"""The real size: minutes and gigabytes, run by `make test-full`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from bench import full_size
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.full_size
@pytest.mark.timeout(3600)
def test_every_format_builds_to_the_same_bundle_and_runs_within_memory(tmp_path: Path) -> None:
    bundles = {}
    for form in ("ldm", "lightning", "diffusers"):
        bundles[form], figures = full_size.build_from(form, tmp_path)
        assert figures["peak_gb"] <= 10
    first, *others = (full_size.digests(bundle) for bundle in bundles.values())
    assert all(other == first for other in others)
    figures = full_size.run_once(bundles["ldm"], 2, tmp_path / "wall.png")
    assert figures["peak_gb"] <= 7
    with Image.open(tmp_path / "wall.png") as image:
        assert image.size == (512, 512)
        assert np.asarray(image).std() > 1
