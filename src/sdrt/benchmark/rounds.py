"""Taking turns: in each round everybody does each part once, in the same order."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.bundle import Bundle
from .contenders import FLOOR, OWN, PEERS, reason_to_skip
from .machine import available_memory
from .worker import Worker, WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .contender import Turn
    from .settings import Settings

_PIXELS = 512 * 512
#: What decoding one image of so many pixels takes while it lasts, in the network that takes most.
_DECODING_BYTES = 3 * 2**30


@dataclass
class Record:
    """What became of a contender.

    Attributes
    ----------
    turns
        Those that count, by part.
    own
        For a peer, sdrt's turns in the same rounds, by part.
    about
        What it said of itself.
    reason
        Why it did not take part, or not to the end; None if nothing went wrong.
    skipped
        Whether it was not even tried.
    psnr
        Its last pictures against sdrt's of the same turn, in dB; None where they were not made, infinite for equal
        ones.

    """

    turns: dict[str, list[Turn]] = field(default_factory=lambda: defaultdict(list))
    own: dict[str, list[Turn]] = field(default_factory=lambda: defaultdict(list))
    about: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    skipped: bool = False
    psnr: float | None = None


def compete(settings: Settings, peers: Sequence[str], tell: Callable[[str], object]) -> dict[str, Record]:
    """Measure sdrt, the floor and peers in turns.

    Each has a process of its own. Where memory does not hold all at once there are several groups, one after the
    other, sdrt being in each, so that a peer is always compared with turns between its own.

    Parameters
    ----------
    settings
        What is measured.
    peers
        Names in `PEERS`.
    tell
        Called with a line for each thing that is begun.

    Raises
    ------
    WorkerError
        sdrt itself failed.

    """
    records = {OWN: Record(), FLOOR: Record()} | {name: Record() for name in peers}
    waiting = []
    for name in peers:
        records[name].reason = reason_to_skip(name, settings)
        records[name].skipped = records[name].reason is not None
        if records[name].skipped:
            tell(f"{name} is left out: {records[name].reason}")
        else:
            waiting.append(name)
    for launch in range(1, settings.launches + 1):
        if settings.launches > 1:
            tell(f"launch {launch} of {settings.launches}")
        _launch(settings, records, [name for name in waiting if records[name].reason is None], tell)
    return records


def _launch(
    settings: Settings, records: dict[str, Record], waiting: Sequence[str], tell: Callable[[str], object]
) -> None:
    """Start everybody, in as many groups as it takes, and let them take turns."""
    while True:
        with ExitStack() as stack:
            group = _Group(settings, records, stack, tell)
            waiting = group.fill(waiting)
            group.run()
        if not waiting:
            return
        tell(f"memory holds no more at once: another group begins, with {', '.join(waiting)} to come")


class _Group:
    """Those that are in memory together."""

    def __init__(
        self, settings: Settings, records: dict[str, Record], stack: ExitStack, tell: Callable[[str], object]
    ) -> None:
        self._settings, self._records, self._stack, self._tell = settings, records, stack, tell
        self._workers: dict[str, Worker] = {}
        self._join(OWN)
        if "step" in settings.parts and settings.no_floor is None:
            self._join(FLOOR)

    def fill(self, waiting: Sequence[str]) -> list[str]:
        """Load peers while there is memory for them, one in any case, and return those that are left."""
        for index, name in enumerate(waiting):
            free = available_memory()
            alone = not any(other in PEERS for other in self._workers)
            if not alone and (free is None or free < self._need(name)):
                return list(waiting[index:])
            self._join(name)
        return []

    def run(self) -> None:
        """Let everybody take turns."""
        for turn in range(1, self._settings.rounds + 1):
            self._tell(f"round {turn} of {self._settings.rounds}: {', '.join(self._workers)}")
            for part in self._settings.parts:
                for name in [*self._workers]:
                    if part == "step" or name != FLOOR:
                        self._take_turn(name, part, turn)
                for name, record in self._records.items():
                    if name in self._workers and name in PEERS:
                        record.own[part].append(self._records[OWN].turns[part][-1])
        pixels: NDArray[np.float32] | None = None
        for name, worker in self._workers.items():
            self._records[name].about = worker.about()
            if "picture" not in self._settings.parts or name == FLOOR:
                continue
            found = worker.pixels()
            if pixels is None:  # sdrt comes first
                pixels = found
            else:
                self._records[name].psnr = _psnr(found, pixels)

    def _join(self, name: str) -> None:
        """Load a contender and let it do everything once, which does not count."""
        self._tell(f"{name}: loading")
        try:
            worker = self._stack.enter_context(Worker(name, self._settings))
            for part in self._settings.parts if name != FLOOR else ():
                self._tell(f"{name}: first {part}")
                worker.turn(part, 0)
        except WorkerError as error:
            self._give_up(name, error)
        else:
            self._workers[name] = worker

    def _take_turn(self, name: str, part: str, turn: int) -> None:
        try:
            if part == "step" and name != FLOOR:
                # Who has stood still during the others' turns is slower at first, and steps follow upon each other.
                self._workers[name].turn(part, turn)
            self._records[name].turns[part].append(self._workers[name].turn(part, turn))
        except WorkerError as error:
            self._give_up(name, error)

    def _give_up(self, name: str, error: WorkerError) -> None:
        if name == OWN:
            raise error
        self._records[name].reason = str(error)
        self._tell(f"{name} failed: {error}")
        if (worker := self._workers.pop(name, None)) is not None:
            worker.close()

    def _need(self, name: str) -> float:
        """Estimate the bytes that a peer will take."""
        bundle = Bundle.read(self._settings.bundle)
        weights = bundle.size * (2 if bundle.manifest.precision == "fp16" else 1)
        share = self._settings.width * self._settings.height / _PIXELS
        return PEERS[name].copies * weights + share * _DECODING_BYTES


def _psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    square = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return -10 * float(np.log10(square)) if square else float("inf")
