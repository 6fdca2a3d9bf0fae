"""The example programs, built against the installed library as a reader would, and called with curl."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest

from tests.serve.server import PATIENCE_S, until

from .conftest import EMBED, EXPECTED, STAR, pixels_of, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serve.server import Server


@pytest.fixture(scope="module")
def examples(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    run("cmake", "-S", EMBED / "examples", "-B", folder, f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", folder, "--parallel", "2")
    return folder


def test_a_picture_from_c(examples: Path, surroundings: dict[str, str], tmp_path: Path) -> None:
    """With 20 steps and the model's own sampler, from a server of its own and from one that runs."""
    from sdrt.cli import main

    made = tmp_path / "run.png"
    os.environ["SDRT_HOME"] = surroundings["SDRT_HOME"]
    assert main(["run", "a red star", "--bundle", "demo", "--steps", "20", "--seed", "42", "-o", str(made)]) == 0
    address = surroundings["SDRT_TEST_ADDRESS"].removeprefix("http://")
    for number, server in enumerate(("demo", address)):
        file = tmp_path / f"{number}.ppm"
        printed = run(examples / "sdrt-picture", server, "a red star", file, "42", env=surroundings)
        assert printed == f"{file} (seed 42)\n"
        assert pixels_of(file) == pixels_of(made)


def test_a_picture_that_cannot_be(examples: Path, surroundings: dict[str, str], tmp_path: Path) -> None:
    def fail(*words: str) -> tuple[int, str]:
        command = [str(examples / "sdrt-picture"), *words]
        done = subprocess.run(
            command, env=surroundings, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
        return done.returncode, done.stderr

    assert fail()[0] == 2
    code, line = fail("nothing", "a star", str(tmp_path / "a.ppm"))
    assert code == 1
    assert line.startswith("the server could not start: it has ended with exit code 1: there is no bundle 'nothing'")
    address = surroundings["SDRT_TEST_ADDRESS"].removeprefix("http://")
    code, lines = fail(address, "x" * 40_000, str(tmp_path / "a.ppm"))
    assert code == 1
    assert "invalid argument: prompt is" in lines
    assert fail(address, "a star", str(tmp_path / "no" / "folder.ppm"))[0] == 1


@pytest.fixture
def service(examples: Path, surroundings: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The service over a server that runs, and its URL."""
    address = surroundings["SDRT_TEST_ADDRESS"].removeprefix("http://")
    command = [str(examples / "sdrt-service"), address, "0"]
    with subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        match = re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())
        assert match
        try:
            yield process, match[1]
        finally:
            process.kill()


def curl(url: str, file: Path) -> str:
    return run("curl", "-sS", "--max-time", "60", "-o", file, "-w", "%{http_code}", url)


def test_pictures_from_the_service(service: tuple[subprocess.Popen[str], str], pictures: Path, tmp_path: Path) -> None:
    """At once, each as sdrt run makes it with the same settings."""
    _, url = service
    asked = [expected for expected in EXPECTED if expected.sampler == STAR.sampler]
    from sdrt.cli import main

    def draw(number: int) -> bytes:
        expected = asked[number]
        fields = {"prompt": expected.prompt, "steps": 4, "seed": expected.seed, "scale": 5.5}
        file = tmp_path / f"{number}.bmp"
        assert curl(f"{url}/picture?{urlencode(fields)}", file) == "200"
        return pixels_of(file)

    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(draw, range(len(asked))))
    for expected, pixels in zip(asked, found, strict=True):
        made = tmp_path / "run.png"
        options = ["--steps", "4", "--seed", str(expected.seed), "--cfg-scale", "5.5", "-o", str(made)]
        assert main(["run", expected.prompt, "--bundle", "demo", *options]) == 0
        assert pixels == pixels_of(made)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/", "404", "expected GET /picture"),
        ("/picture", "404", "expected GET /picture"),
        ("/picture?steps=4", "200", None),
        ("/picture?size=4", "400", "'size' is no field"),
        ("/picture?prompt=a&steps=x", "400", "steps is 'x': expected a number"),
        ("/picture?prompt=a&steps=2000", "400", "num_inference_steps is 2000"),
        ("/picture?prompt=%f", "400", "a % without two digits"),
        ("/picture?prompt=%ff", "400", "the body is no JSON"),
    ],
)
def test_what_the_service_answers(
    service: tuple[subprocess.Popen[str], str], tmp_path: Path, path: str, status: str, message: str | None
) -> None:
    file = tmp_path / "answer"
    assert curl(service[1] + path, file) == status
    assert message is None or message in file.read_text(encoding="utf-8")


def test_whose_client_goes_is_not_worked_for(service: tuple[subprocess.Popen[str], str], sharing: Server) -> None:
    process, url = service
    before = sharing.figure("sdrt_steps_total")
    with subprocess.Popen(
        ["curl", "-s", f"{url}/picture?prompt=a+star&steps=1000"], stdout=subprocess.DEVNULL
    ) as asking:
        until("it runs", lambda: sharing.figure("sdrt_running_images") == 1)
        asking.kill()
    until("it has stopped", lambda: sharing.figure("sdrt_running_images") == 0)
    assert sharing.figure("sdrt_steps_total") < before + 1000
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
