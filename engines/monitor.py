"""TensorRT's logger and progress monitor, and the thread that it builds in."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .fusion import BuildLog

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_S = 0.1
# The phase that takes nearly all of the time, and the share of it all that is done as it begins and ends.
_LONGEST = "Computing profile costs"
_BEFORE, _AFTER = 0.05, 0.95


class Log:
    """Takes TensorRT's messages: what the fusion report needs, and errors."""

    def __init__(self, trt: Any) -> None:
        self.build = BuildLog()
        self.errors: list[str] = []
        severity = trt.ILogger
        outer = self

        class Messages(trt.ILogger):  # type: ignore[misc]  # the module is known at run time alone
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    outer.errors.append(one_line(message))
                elif level == severity.VERBOSE:
                    outer.build.feed(message)

        self.logger = Messages()

    @property
    def cause(self) -> str:
        """The first error, which is what the others follow from."""
        return self.errors[0] if self.errors else "it gives no reason"


class Monitor:
    """Takes TensorRT's progress from whatever thread, and tells it to stop."""

    def __init__(self, trt: Any) -> None:
        self.phase = "reading"
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        #: Each phase that is going on: its parent, steps in all, steps done.
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._reached = 0.0
        outer = self

        class Progress(trt.IProgressMonitor):  # type: ignore[misc]  # the module is known at run time alone
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                outer.start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                outer.step(phase_name, step)
                return not outer.cancelled.is_set()

            def phase_finish(self, phase_name: str) -> None:
                outer.finish(phase_name)

        self.monitor = Progress()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Note that a phase has begun, within another or None."""
        with self._lock:
            self._phases[phase] = parent, max(1, steps), 0
            self._tell(phase.lower())

    def step(self, phase: str, step: int) -> None:
        """Note that a step of a phase is done, the first being 0."""
        with self._lock:
            if phase in self._phases:
                parent, steps, _ = self._phases[phase]
                self._phases[phase] = parent, steps, min(step + 1, steps)

    def finish(self, phase: str) -> None:
        """Note that a phase is over."""
        with self._lock:
            parent, *_ = self._phases.pop(phase, (None, 1, 1))
            if parent in self._phases:
                self._tell(parent.lower())

    def cancel(self) -> None:
        """Tell TensorRT to stop at its next step."""
        with self._lock:
            self.cancelled.set()
            self.phase = "cancelling"

    def _tell(self, phase: str) -> None:
        # Phases come and go until TensorRT has stopped.
        if not self.cancelled.is_set():
            self.phase = phase

    @property
    def fraction(self) -> float:
        """The share that is done, never less than before."""
        with self._lock:
            if _LONGEST in self._phases:
                done = _BEFORE + (_AFTER - _BEFORE) * self._share(_LONGEST)
            else:
                done = _BEFORE * self._share(self._child(None))
            self._reached = max(self._reached, done)
            return self._reached

    def _share(self, phase: str | None) -> float:
        if phase is None:
            return 0.0
        _, steps, done = self._phases[phase]
        return min(1.0, (done + self._share(self._child(phase))) / steps)

    def _child(self, phase: str | None) -> str | None:
        return next((child for child, (parent, _, _) in self._phases.items() if parent == phase), None)


def run_beside(work: Callable[[], None], monitor: Monitor, tick: Callable[[], object]) -> None:
    """Run the builder beside the caller's thread: Python handles Ctrl-C in its main thread, which C++ must not block.

    Parameters
    ----------
    work
        Calls the builder; what it raises is raised here.
    monitor
        Told to cancel if `tick` raises, or Ctrl-C is pressed.
    tick
        Called ten times a second, in the caller's thread, and once more when it is cancelled.

    """
    failures: list[BaseException] = []
    # Not Thread.join: in Python 3.11 an interrupt in it makes a running thread pass for finished.
    ended = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="tensorrt-build", daemon=True)
    thread.start()
    try:
        tick()
        while not ended.wait(_POLL_S):
            tick()
    except BaseException:
        monitor.cancel()
        # Who pressed Ctrl-C shall see that it was noticed; who raised in `tick` does so again.
        with suppress(BaseException):
            tick()
        # TensorRT stops at its next step, seconds away; until then it must not find its folder gone.
        ended.wait()
        raise
    finally:
        if ended.is_set():
            thread.join()
    if failures:
        raise failures[0]


def one_line(message: object) -> str:
    """Join the lines of a message."""
    return " ".join(str(message).split())
