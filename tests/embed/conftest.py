"""The C and C++ library, built once a session in each way that tests want it, and pictures to hold it against."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from PIL import Image

from sdrt.cli import main
from sdrt.engines.lock import locked
from sdrt.runtime.noise import batch_noise
from tests.serve.conftest import home  # noqa: F401 - a fixture
from tests.serve.server import Server, environment, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EMBED = Path(__file__).parents[2] / "embed"
TOOLS = {"cmake": "cmake", "g++": "g++", "gcc": "gcc", "valgrind": "valgrind", "pkg-config": "pkg-config"}
"""Programs, and Debian's packages that hold them."""
SANITIZERS = {"plain": "", "address": "address,undefined", "thread": "thread"}
PATIENCE_S = 300


@pytest.fixture(scope="session", autouse=True)
def toolchain() -> None:
    """Nothing here can be tried without a compiler."""
    missing = [package for program, package in TOOLS.items() if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install {' '.join(missing)}")


def run(*command: object, folder: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command that has to succeed, and give what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env=env, capture_output=True, text=True, errors="replace", check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a build by the name of its sanitizers; processes that test at once share it."""
    worker = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp().parent if worker else tmp_path_factory.getbasetemp()

    def build(sanitizers: str) -> Path:
        folder = base / f"embed-{sanitizers}"
        done = folder / "done"
        with locked(base / f"embed-{sanitizers}.lock", str(folder), patience_s=PATIENCE_S):
            if not done.exists():
                options = ["-DSDRT_WERROR=ON", "-DSDRT_BUILD_TESTS=ON", f"-DSDRT_SANITIZE={SANITIZERS[sanitizers]}"]
                if sanitizers == "plain":
                    options += ["-DCMAKE_BUILD_TYPE=Release"]
                else:
                    options += ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-g1", "-DSDRT_BUILD_EXAMPLES=OFF"]
                run("cmake", "-S", EMBED, "-B", folder, *options)
                run("cmake", "--build", folder, "--parallel", "2")
                done.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def installed(built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix under which it is installed."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", built("plain"), "--prefix", prefix)
    return prefix


class Expected(NamedTuple):
    """A picture that `sdrt run` makes."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    scale: float
    sampler: str
    width: int
    height: int

    def options(self) -> list[str]:
        """Those of the command line."""
        return [
            *(self.prompt, "-n", self.negative_prompt, "--seed", str(self.seed), "--steps", str(self.steps)),
            *("--cfg-scale", str(self.scale), "--sampler", self.sampler),
            *("-W", str(self.width), "-H", str(self.height)),
        ]


STAR = Expected("a large red star on a blue background", "", 42, 4, 7.5, "euler", 128, 128)
EXPECTED = (
    *(STAR._replace(seed=STAR.seed + number) for number in range(3)),
    Expected("a green ring", "red", 2**64 - 1, 5, 3.0, "ddim", 128, 128),
    Expected("ein gr\u00fcner Kreis \u2605", "", 7, 4, 1.0, "plms", 64, 136),
    Expected("a yellow cross on black", "", 0, 6, 5.5, "dpmpp_2m", 128, 64),
)


def pixels_of(path: Path) -> bytes:
    """RGB of a picture's file."""
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.fixture(scope="session")
def pictures(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811 - the fixture
    """A list of pictures of `sdrt run`, as embed/tests/pictures.hpp reads it, and the noise of the first three."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDRT_HOME", str(home))
        for number, expected in enumerate(EXPECTED):
            file = folder / f"{number}.png"
            command = ["run", *expected.options(), "--bundle", "demo", "--backend", "onnxruntime", "-o", str(file)]
            assert main(command) == 0
            raw = file.with_suffix(".rgb")
            raw.write_bytes(pixels_of(file))
            lines.append("\t".join(map(str, (raw, *expected))) + "\n")
    (folder / "list").write_text("".join(lines), encoding="utf-8")
    seeds = tuple(expected.seed for expected in EXPECTED[:3])
    noise = batch_noise(seeds, (4, STAR.height // 8, STAR.width // 8))()
    (folder / "latents").write_bytes(np.ascontiguousarray(noise, "<f4").tobytes())
    return folder / "list"


@pytest.fixture(scope="session")
def sharing(home: Path) -> Iterator[Server]:  # noqa: F811 - the fixture
    """A server on a port that shares memory."""
    with serving(home, "--allow-shared-memory") as running:
        yield running.wait_until_ready()


@pytest.fixture
def surroundings(home: Path, pictures: Path, sharing: Server) -> Iterator[dict[str, str]]:  # noqa: F811 - the fixture
    """What the library's tests are told in variables."""
    # A socket's path has to be short, and what pytest makes is not.
    with tempfile.TemporaryDirectory(prefix="embed-", dir="/tmp") as folder:
        variables = environment(
            home,
            TMPDIR=folder,
            SDRT_PROGRAM=str(program(Path(folder))),
            SDRT_TEST_ADDRESS=sharing.url,
            SDRT_TEST_PICTURES=str(pictures),
            SDRT_TEST_LATENTS=str(pictures.with_name("latents")),
            ASAN_OPTIONS="detect_leaks=1",
            TSAN_OPTIONS="halt_on_error=1",
        )
        variables.pop("XDG_RUNTIME_DIR", None)
        yield variables


def program(folder: Path) -> Path:
    """Make a program that is sdrt, with the interpreter that runs the tests."""
    path = folder / "sdrt"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sdrt "$@"\n', encoding="utf-8")
    path.chmod(0o700)
    return path
