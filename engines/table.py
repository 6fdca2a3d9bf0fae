"""Rows of cells as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def columns(rows: Sequence[tuple[str, ...]], widest: int | None = None) -> str:
    """Align rows of cells, two spaces apart.

    Parameters
    ----------
    rows
        Of as many cells each.
    widest
        How wide a column may become; a longer cell pushes the rest of its row to the right. None for any width.

    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if widest is not None:
        widths = [min(width, widest) for width in widths]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
