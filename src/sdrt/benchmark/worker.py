"""Each contender in a process of its own, which does one thing at a time, when it is told to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from ..errors import BackendError, SdrtError
from .contenders import FLOOR, make
from .machine import peak_memory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from .contender import Turn
    from .settings import Settings

_PATIENCE_S = 10.0
_SHOWN = 300  # characters of an error


class WorkerError(BackendError):
    """A contender failed; the message is its own error in one line, or how its process ended."""


class Worker:
    """A contender in its process.

    Parameters
    ----------
    name
        Whom to load.
    settings
        What will be measured.

    Raises
    ------
    WorkerError
        It cannot be loaded.

    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, settings), name=f"sdrt bench {name}")
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def turn(self, part: str, number: int) -> Turn:
        """Let it do its part once.

        Raises
        ------
        WorkerError
            It failed.

        """
        turn: Turn = self._ask(part, number)
        return turn

    def about(self) -> dict[str, Any]:
        """Tell what it is, and the most memory that its process has had, in bytes."""
        facts: dict[str, Any] = self._ask("about", 0)
        return facts

    def pixels(self) -> Any:
        """Give the last images, float32 of shape (N, height, width, 3) in [0, 1]."""
        return self._ask("pixels", 0)

    def _ask(self, what: str, number: int) -> Any:
        try:
            self._connection.send((what, number))
        except OSError:
            raise self._end() from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._end() from None
        if not good:
            raise WorkerError(answer)
        return answer

    def _end(self) -> WorkerError:
        self._process.join(_PATIENCE_S)
        code = self._process.exitcode
        how = "was killed, for want of memory perhaps" if code == -signal.SIGKILL else f"ended with {code}"
        return WorkerError(f"its process {how}")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # nobody waits for its turn to end
            self._process.kill()
        self.close()


def _serve(connection: Connection, name: str, settings: Settings) -> None:
    """Load a contender and do as told until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end gets it too, and ends us
    os.dup2(2, 1)  # standard output is for the results, whatever a library has to say
    warnings.simplefilter("ignore")
    tqdm.set_lock(threading.RLock())  # its own is the system's, and stays behind where a process is killed
    try:
        contender = _load(name, settings)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is told
        connection.send((False, _line(error)))
        return
    connection.send((True, None))
    while True:
        try:
            what, number = connection.recv()
        except (EOFError, OSError):
            break
        try:
            if what == "about":
                answer = {**contender.about, "peak": peak_memory()}
            elif what == "pixels":
                answer = contender.pixels()
            else:
                answer = getattr(contender, what)(number)
        except Exception as error:  # noqa: BLE001 - whatever a library raises is told
            connection.send((False, _line(error)))
        else:
            connection.send((True, answer))


def _load(name: str, settings: Settings) -> Any:
    if name == FLOOR:
        from .floor import Floor  # noqa: PLC0415 - for one worker alone

        return Floor(settings)
    return make(name, settings)


def _line(error: Exception) -> str:
    """Tell an error in one line; its class only where that is not one of our own."""
    text = str(error) if isinstance(error, SdrtError) else "".join(traceback.format_exception_only(error))
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
