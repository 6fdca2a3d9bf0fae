"""Who takes part: what each of them is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Turn:
    """One thing done once.

    Attributes
    ----------
    seconds
        What it took.
    more
        What else was seen, by its name.

    """

    seconds: float
    more: dict[str, Any] = field(default_factory=dict)


class Contender(Protocol):
    """Something that makes pictures with a model, loaded and ready."""

    @property
    def about(self) -> dict[str, Any]:
        """What it is: precision, threads, versions; known once a step was made."""

    def text(self, turn: int) -> Turn:
        """Encode the prompt of a turn."""

    def step(self, turn: int) -> Turn:
        """Make one guided step of the U-Net."""

    def decode(self, turn: int) -> Turn:
        """Decode latents to images."""

    def picture(self, turn: int) -> Turn:
        """Make the images of a turn's prompt."""

    def pixels(self) -> NDArray[np.float32]:
        """Give the last images made: float32 of shape (N, height, width, 3) in [0, 1]."""
