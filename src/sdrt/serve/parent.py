"""Ending together with another process."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_PATIENCE_S = 0.5


def watch(process: int, ended: Callable[[], None]) -> None:
    """Have something called, by the running event loop, once a process has ended.

    Linux's PR_SET_PDEATHSIG would not do: it speaks of the thread that started this process, and a library may be
    called from threads that come and go.
    """
    loop = asyncio.get_running_loop()
    if hasattr(os, "pidfd_open"):
        # Where the kernel knows nothing of it, and where it is forbidden, looking again and again does.
        with suppress(PermissionError, NotImplementedError):
            try:
                descriptor = os.pidfd_open(process)
            except ProcessLookupError:
                ended()
                return
            loop.add_reader(descriptor, ended)
            return
    _look(process, ended, loop)


def _look(process: int, ended: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        ended()
        return
    except PermissionError:
        pass  # it is there, and another user's
    loop.call_later(_PATIENCE_S, _look, process, ended, loop)
