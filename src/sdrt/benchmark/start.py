"""Fresh processes: how long until the first step, and how much memory a picture takes by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError
from .machine import resident_bytes
from .settings import PROMPT, SEED

if TYPE_CHECKING:
    from collections.abc import Callable

    from .settings import Settings

_OPTIONS = "SDRT_RUN_"
_WARM = 3


def measure_starts(settings: Settings, tell: Callable[[str], object]) -> dict[str, Any]:
    """Start ``sdrt run`` with an SDRT_HOME that is empty, and then again with what that start has left there.

    The bundle's files themselves may be in memory already: the system keeps what was read last.

    Returns
    -------
    dict
        ``cold``, the seconds until the first step where nothing was verified or compiled before; ``warm``, those of
        the later starts; ``process``, the seconds that the whole picture took from outside; and ``peak``, the most
        bytes that its process had in memory, mapped files counted, None where the system does not tell.

    """
    with tempfile.TemporaryDirectory(prefix="sdrt-bench-") as folder:
        tell("start: cold, with an empty SDRT_HOME")
        cold, _, _ = _run(settings, Path(folder), 1)
        tell("start: warm, a whole picture")
        first, seconds, peak = _run(settings, Path(folder), settings.steps)
        warm = [first]
        for number in range(1, min(_WARM, settings.rounds)):
            tell(f"start: warm, again {number}")
            warm.append(_run(settings, Path(folder), 1)[0])
    return {"cold": cold, "warm": warm, "process": seconds, "peak": peak}


def _run(settings: Settings, folder: Path, steps: int) -> tuple[float, float, int | None]:
    """Make a picture and give the seconds until its first step, those of the process, and its peak of memory."""
    options: dict[str, Any] = {
        "bundle": settings.bundle,
        "backend": settings.backend,
        "steps": steps,
        "width": settings.width,
        "height": settings.height,
        "batch": settings.batch,
        "sampler": settings.sampler,
        "cfg-scale": settings.cfg_scale,
        "cache-interval": settings.cache_interval,
        "encoder-interval": settings.encoder_interval,
        "seed": SEED,
        "output": folder,
    }
    if settings.guidance_interval is not None:
        options["guidance-interval"] = ",".join(map(str, settings.guidance_interval))
    command = [sys.executable, "-m", "sdrt", "run", PROMPT, "--json"]
    command += [f"--{name}={value}" for name, value in options.items()]
    # Of the user's own settings those stay that are not about one command.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OPTIONS)}
    environment["SDRT_HOME"] = str(folder / "home")
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)  # noqa: S603 - ourselves
        peak = _wait(process)
        seconds = time.perf_counter() - began
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            lines = errors.read().decode(errors="replace").strip().splitlines()
            last = lines[-1].removeprefix("sdrt: ") if lines else f"exit code {process.returncode}"
            raise BackendError(f"sdrt run failed: {last}")
        return json.loads(output.read())["seconds"]["until_first_step"], seconds, peak


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Wait for the end of a process and give its peak of memory in bytes."""
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # Ctrl-C: it got it too
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return resident_bytes(usage.ru_maxrss)
