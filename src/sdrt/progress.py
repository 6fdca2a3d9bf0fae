"""Progress on standard error: bars on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TICK_S = 1.0


@contextmanager
def stages(note: str | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Show a job of several stages that is counted in bytes, with the time that is left.

    Parameters
    ----------
    note
        A line that stands above it all, once the job has begun: one that is refused leaves the line of its error alone.

    Yields
    ------
    A function of what is being done, such as ``U-Net: tracing``, the bytes done and the bytes in all.

    """
    with _bar(total=1, unit="B", unit_scale=True, unit_divisor=1000) as bar, _ticking(bar):
        part, shown = "", set[str]()

        def report(what: str, done: int, total: int) -> None:
            nonlocal part, note
            if note is not None:
                bar.write(f"sdrt: {note}", file=sys.stderr)
                note = None
            if bar.disable:
                if (begun := what.partition(":")[0]) != part:
                    part = begun
                    shown.clear()
                # A builder goes back and forth between its phases.
                if what not in shown:
                    shown.add(what)
                    sys.stderr.write(f"{what}\n")
            else:
                if total != bar.total:
                    bar.reset(total)
                bar.set_description(what, refresh=False)
                bar.update(done - bar.n)

        yield report


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many bytes are done; yields a function that adds to them."""
    with _bar(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1000) as bar:
        yield lambda count: bar.update(count) and None


@contextmanager
def steps_bar(total: int, what: str, note: str | None = None) -> Iterator[Callable[[], None]]:
    """Show the steps of the denoising loop with iterations per second.

    Parameters
    ----------
    total
        How many there are.
    what
        Stands before the bar.
    note
        A line that stands above it once a step is done: where there is none, the line of the error stands alone.

    Yields
    ------
    A function that counts one.

    """
    with _bar(total=total, desc=what, unit="it") as bar:

        def count() -> None:
            nonlocal note
            if note is not None:
                bar.write(f"sdrt: {note}", file=sys.stderr)
                note = None
            bar.update()

        yield count


def _bar(**options: Any) -> Any:
    from tqdm import tqdm  # noqa: PLC0415 - not for --help

    # disable=None: no bar where standard error is not a terminal
    return tqdm(file=sys.stderr, disable=None, leave=False, dynamic_ncols=True, **options)


@contextmanager
def _ticking(bar: Any) -> Iterator[None]:
    """Keep the clock of a bar running through stages that report nothing for a minute."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(_TICK_S):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
