"""Whose call of an engine comes next, where many loops run at once."""

from __future__ import annotations

import itertools
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SdrtError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence


class Call(Protocol):
    """One call of an engine, with the buffers that it reads and writes."""

    @property
    def joins(self) -> bool:
        """Whether it may become one with others of its key."""

    def key(self) -> Hashable | None:
        """Give what calls must agree in to be run as one; None for one that is run alone and waits for no others."""

    def alone(self) -> None:
        """Run this call."""

    def together(self, calls: Sequence[Any]) -> None:
        """Run calls of the same key, this one among them, as one."""


class GivenUpError(Exception):
    """Nobody waits any more for what a loop is making."""


class _Loop(threading.local):
    """The loop that a thread is in: its number, by age, and whether it was given up."""

    number: int
    given_up: Callable[[], bool]


class _Waiting:
    """A call that waits for its turn, and afterwards what became of it."""

    def __init__(self, call: Call, loop: _Loop) -> None:
        self.call = call
        self.key = call.key()
        self.joins = call.joins
        self.order = loop.number
        self.given_up = loop.given_up
        self.done = False
        self.error: Exception | None = None


class Turns:
    """One call after the other, or several as one, the oldest loop's first.

    A loop over a U-Net comes here at every step. Calls that agree are run as one, and so loops of the same settings
    that began together stay together: none of them is run before every loop has come with its next one. Loops that
    are at different timesteps cannot share a call, the timestep being one number for the whole batch; the oldest then
    goes on, and the others wait at theirs and so find each other. Calls that do not join wait for older loops alone,
    and for those only that have begun to step: before that, an engine may have to be compiled.

    Parameters
    ----------
    most
        How many calls may become one.
    shared
        Told, after calls with a key, how many of them were run as one.

    """

    def __init__(self, most: int, shared: Callable[[int], None]) -> None:
        self.most = most
        self._shared = shared
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._busy = False
        self._loops: dict[int, bool] = {}  # by number: whether it has begun to step
        self._numbers = itertools.count()
        self._here = _Loop()

    @contextmanager
    def taking_part(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Be one of the loops: others wait for this thread's next call. Every call has to come from inside.

        Parameters
        ----------
        given_up
            Whether nobody waits for the result any more: a call that has not begun then raises `GivenUpError`. It is
            asked whenever something changes; see `wake`.

        """
        number = next(self._numbers)
        self._here.number, self._here.given_up = number, given_up
        with self._changed:
            self._loops[number] = False
        try:
            yield
        finally:
            with self._changed:
                del self._loops[number]
                self._changed.notify_all()

    def wake(self) -> None:
        """Say that a loop may have been given up."""
        with self._changed:
            self._changed.notify_all()

    def run(self, call: Call) -> None:
        """Return once a call is done, or raise what went wrong with it.

        There is no thread for this: whoever waits and sees that a call can be run runs it, be it another's.
        """
        mine = _Waiting(call, self._here)
        with self._changed:
            self._loops[mine.order] |= mine.key is not None
            self._waiting.append(mine)
            self._changed.notify_all()
        while group := self._next(mine):
            self._run(group)
            with self._changed:
                self._busy = False
                for each in group:
                    each.done = True
                self._changed.notify_all()
        if mine.error is not None:
            raise mine.error

    def _next(self, mine: _Waiting) -> list[_Waiting]:
        """Wait until calls can be run and take them, or until one's own is done, and give none."""
        with self._changed:
            while not mine.done:
                if mine in self._waiting and mine.given_up():
                    self._waiting.remove(mine)
                    raise GivenUpError
                if not self._busy and (group := self._choose()):
                    self._busy = True
                    self._waiting = [each for each in self._waiting if each not in group]
                    return group
                self._changed.wait()
        return []

    def _choose(self) -> list[_Waiting]:
        """Choose the calls that are run next: none as long as a loop is waited for."""
        by_age = sorted(self._waiting, key=lambda each: each.order)
        for each in by_age:
            if each.key is None:
                return [each]
        if not by_age:
            return []
        first, here = by_age[0], {each.order for each in by_age}
        for number, stepping in self._loops.items():
            if number not in here and (first.joins or (stepping and number < first.order)):
                return []
        return [each for each in by_age if each.key == first.key][: self.most]

    def _run(self, group: list[_Waiting]) -> None:
        if len(group) > 1:
            try:
                group[0].call.together([each.call for each in group])
            except SdrtError:
                # For want of memory, as a rule: then as many at once are too many, but each may well succeed alone.
                self.most = len(group) - 1
            else:
                self._shared(len(group))
                return
        for each in group:
            try:
                each.call.alone()
            except Exception as error:  # noqa: BLE001 - it is raised where the call came from
                each.error = error
            if each.key is not None:
                self._shared(1)
