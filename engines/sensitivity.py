"""Which layers of a network must not be quantised: a search that measures few of them alone."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class Search(Generic[T]):
    """Finds the parts of a network that quantisation harms most.

    Rounding errors of different layers are nearly uncorrelated, so that their squares add up. A few layers make most of
    the error, as a rule: the part that makes the most is split into halves, each of which is measured, until the worst
    layers stand alone. Measuring all one by one would take several times as long.

    Parameters
    ----------
    parts
        In the order of computation: neighbours are measured together.
    error
        Measures the relative error of the network's prediction with these parts quantised and all others left alone.

    Attributes
    ----------
    left_alone
        What was found so far, the worst first.

    """

    def __init__(self, parts: Sequence[T], error: Callable[[Sequence[T]], float]) -> None:
        self._error = error
        self.left_alone: list[T] = []
        # Squared errors, negative since a heap has its least on top; the position tells parts of equal error apart.
        self._found: list[tuple[float, int, Sequence[T]]] = []
        self._measure(0, parts)

    def run(self, bound: float) -> None:
        """Leave parts alone until the error of the others is expected to be within a bound."""
        while self._found and sum(-square for square, _, _ in self._found) > bound**2:
            _, position, parts = heapq.heappop(self._found)
            if len(parts) == 1:
                self.left_alone.extend(parts)
                continue
            half = len(parts) // 2
            self._measure(position, parts[:half])
            self._measure(position + half, parts[half:])

    def _measure(self, position: int, parts: Sequence[T]) -> None:
        if parts:
            heapq.heappush(self._found, (-(self._error(parts) ** 2), position, parts))
