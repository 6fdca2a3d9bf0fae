"""Pictures decoded in tiles, in a fraction of the memory, and the same to rounding as decoded whole.

``engines/decoder_parts.py`` says why overlapping tiles alone are not the same, and how the decoder is cut. A tile is as
wide as the picture, so that its rows lie together in memory, and as high as `_TILE_BYTES` allows. What the stages hand
on is kept whole, two pictures of features at most and the one that is being made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..engines.manifest import DECODER_HEAD, MEAN, TILE_MARGIN, VARIANCE, DimRange
from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from ..engines.manifest import Component, Dim, Manifest
    from .session import Session

LARGEST_WHOLE = 768 * 768
"""Pixels up to which a picture is decoded whole unless tiles are asked for: ``bench/README.md`` has the memory."""

_TILE_BYTES = 64 * 2**20
"""Of the larger one of what a stage takes and gives for a tile."""


def check_tiling(asked: bool | None, manifest: Manifest) -> bool | None:
    """Refuse to decode in tiles with a bundle that has no stages.

    Raises
    ------
    InputError
        It has none, or `asked` is something else than true, false or None.

    """
    if asked is not None and not isinstance(asked, bool):
        raise InputError(f"vae tiling is {asked!r}: expected True, False, or None to choose by the picture's size")
    if asked and not manifest.decoder_stages:
        if manifest.kind == "engine":
            advice = "leave it out, or run an ONNX bundle on the CPU"
        else:
            advice = f"build it again with sdrt build --ckpt {manifest.model.source} --force"
        raise InputError(f"this bundle has no graphs for decoding in tiles: {advice}")
    return asked


def wants_tiles(asked: bool | None, manifest: Manifest, height: int, width: int) -> bool:
    """Tell whether a picture of so many pixels is decoded in tiles; see `check_tiling` for what it raises."""
    if check_tiling(asked, manifest) is None:
        return bool(manifest.decoder_stages) and height * width > LARGEST_WHOLE
    return bool(asked)


def decode_in_tiles(
    manifest: Manifest, session: Callable[[str], Session], latents: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Decode one picture.

    Parameters
    ----------
    manifest
        Of a bundle with the stages of the decoder.
    session
        Gives a component's session by its name.
    latents
        float32 of shape (4, h, w).

    Returns
    -------
    float32 array of shape (3, 8h, 8w), around [-1, 1].

    """
    (head,) = (component for component in manifest.components if component.name == DECODER_HEAD)
    stages = manifest.decoder_stages
    features = _run_head(head, session(head.name), latents)
    kept = {head.outputs[0].name: features}
    found = None
    for index, stage in enumerate(stages):
        later = stages[index + 1 :]
        groups = _groups(later[0]) if later else None
        made, found = _run_stage(stage, session(stage.name), kept, found, groups)
        wanted = {tensor.name for each in later for tensor in each.inputs}
        kept = {name: array for name, array in (kept | {stage.outputs[0].name: made}).items() if name in wanted}
    return made


def _run_head(head: Component, session: Session, latents: NDArray[np.float32]) -> NDArray[np.float32]:
    (given,), (made,) = head.inputs, head.outputs
    scale = _scale(head)
    _, height, width = latents.shape
    shape = (1, _size(made.shape[1]), scale * height, scale * width)
    binding = session.bind({given.name: (1, *latents.shape), made.name: shape})
    binding.inputs[given.name][0] = latents
    binding.run()
    binding.trim()
    features: NDArray[np.float32] = binding.outputs[made.name][0]
    return features


def _run_stage(
    stage: Component,
    session: Session,
    kept: Mapping[str, NDArray[np.float32]],
    statistics: Statistics | None,
    groups: int | None,
) -> tuple[NDArray[np.float32], Statistics | None]:
    """Run a stage over all tiles of the picture.

    Parameters
    ----------
    stage, session
        What runs.
    kept
        What the parts before have made, by name, each of shape (channels, rows, columns).
    statistics
        Of what the stage normalises, where it does.
    groups
        Of the channels that the next stage normalises by, or None if there is no such thing.

    Returns
    -------
    tuple
        What the stage makes, and the statistics of that.

    """
    (output,) = stage.outputs
    arrays = {tensor.name: kept[tensor.name] for tensor in stage.inputs if tensor.name in kept}
    _, height, width = next(iter(arrays.values())).shape
    scale, channels = _scale(stage), _size(output.shape[1])
    made = np.empty((channels, scale * height, scale * width), np.float32)
    row_bytes = max(made.nbytes, *(array.nbytes for array in arrays.values())) // height
    rows, tiles = strips(height, max(_TILE_BYTES // row_bytes, 1))
    shapes: dict[str, tuple[int, ...]] = {name: (1, len(array), rows, width) for name, array in arrays.items()}
    shapes |= {tensor.name: (_size(tensor.shape[0]),) for tensor in stage.inputs if tensor.name not in arrays}
    binding = session.bind(shapes | {output.name: (1, channels, scale * rows, scale * width)})
    if statistics is not None:
        binding.inputs[MEAN][...] = statistics.mean
        binding.inputs[VARIANCE][...] = statistics.variance
    found = None if groups is None else Statistics(groups)
    for tile in tiles:
        for name, array in arrays.items():
            binding.inputs[name][0] = array[:, tile.first : tile.first + rows]
        binding.run()
        begin, end = scale * tile.begin, scale * tile.end
        part = made[:, begin:end]
        part[...] = binding.outputs[output.name][0, :, begin - scale * tile.first : end - scale * tile.first]
        if found is not None:
            found.add(part)
    binding.trim()
    return made, found


@dataclass(frozen=True)
class Strip:
    """A tile: it takes the rows from `first` on, and what it makes counts for those from `begin` to before `end`."""

    first: int
    begin: int
    end: int


def strips(height: int, most: int) -> tuple[int, list[Strip]]:
    """Cover a picture with tiles of one height, which overlap by the margin at least that is wrong at inner edges.

    Parameters
    ----------
    height
        Of the picture, in rows.
    most
        Rows of a tile, if that is enough to get on.

    Returns
    -------
    tuple
        How many rows each tile takes, and the tiles from top to bottom.

    """
    count = math.ceil(max(height - 2 * TILE_MARGIN, 1) / max(most - 2 * TILE_MARGIN, 2 * TILE_MARGIN))
    if count == 1:
        return height, [Strip(0, 0, height)]
    rows = math.ceil((height - 2 * TILE_MARGIN) / count) + 2 * TILE_MARGIN
    tiles, end = [], 0
    for number in range(count):
        first = min(number * (rows - 2 * TILE_MARGIN), height - rows)
        begin, end = end, height if number == count - 1 else first + rows - TILE_MARGIN
        tiles.append(Strip(first, begin, end))
    return rows, tiles


class Statistics:
    """Mean and variance of each group of channels, of which one part after the other is seen.

    Each part's own are found first and joined to those of the parts before (Chan, Golub & LeVeque 1979, Updating
    formulae and a pairwise algorithm for computing sample variances): squares are those of differences from a mean near
    the right one, so that float32 is enough for them.
    """

    def __init__(self, groups: int) -> None:
        self.mean = np.zeros(groups)
        self._squares = np.zeros(groups)
        self._count = 0

    @property
    def variance(self) -> NDArray[np.float64]:
        """Of each group, that of all its values, not an estimate from a sample; as group normalisation has it."""
        return self._squares / self._count

    def add(self, part: NDArray[np.float32]) -> None:
        """See a part: float32 of shape (channels, rows, columns), a group's channels beside one another."""
        groups = len(self.mean)
        mean, squares = np.empty(groups), np.empty(groups)
        size = len(part) // groups
        for group in range(groups):
            values = part[group * size : (group + 1) * size]
            mean[group] = values.mean()
            differences = (values - np.float32(mean[group])).ravel()
            squares[group] = np.dot(differences, differences)
        count = part.size // groups
        total = self._count + count
        shift = mean - self.mean
        self.mean += shift * (count / total)
        self._squares += squares + shift**2 * (self._count * count / total)
        self._count = total


def _groups(stage: Component) -> int | None:
    """Tell how many groups a stage normalises, if it does."""
    return next((_size(tensor.shape[0]) for tensor in stage.inputs if tensor.name == MEAN), None)


def _scale(part: Component) -> int:
    """Tell how many rows a part makes of one."""
    given, made = part.inputs[0].shape[2], part.outputs[0].shape[2]
    return _step(made) // _step(given)


def _step(size: Dim) -> int:
    return size.multiple_of if isinstance(size, DimRange) else 1


def _size(size: Dim) -> int:
    return size.max if isinstance(size, DimRange) else size
