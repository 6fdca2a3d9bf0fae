"""A process that publishes bundles and obeys its standard input, for tests that kill it.

Each line is a JSON list: ``["hold", TARGET]`` begins a build, writes a part of it and answers ``held``, until a line
``end`` or ``fail``. ``["crash", TARGET, FORCE, CONTENT, K]`` builds in a child of this process which kills itself with
SIGKILL just before it touches the disk for the K-th time, and answers with the child's exit status (0: it was done).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from sdrt.engines.publish import publishing
from tests.engines.example import fill

TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "fcntl.flock", "os.listdir"}


def hold(target: Path) -> str:
    with publishing(target) as folder:
        (folder / "unet.onnx").write_bytes(b"part of it")
        print(json.dumps("held"), flush=True)  # noqa: T201 - the test reads it
        if sys.stdin.readline().strip() == "fail":
            raise ValueError("asked to fail")
        for file in folder.iterdir():
            file.unlink()
        fill(folder, name=target.name)
    return "done"


def crash(target: Path, force: bool, content: str, at: int) -> int:
    pid = os.fork()
    if pid == 0:
        left = at

        def hook(event: str, _: object) -> None:
            nonlocal left
            if event in TOUCHES:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(hook)
        with publishing(target, force=force) as folder:
            fill(folder, content.encode(), name=target.name)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    for line in sys.stdin:
        deed, target, *rest = json.loads(line)
        answer = hold(Path(target)) if deed == "hold" else crash(Path(target), *rest)
        print(json.dumps(answer), flush=True)  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main()
