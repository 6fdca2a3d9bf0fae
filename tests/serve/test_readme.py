"""Every snippet about the server in README.md, run as a reader would, against a server on another port."""

from __future__ import annotations

import base64
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sdrt.cli import main

from .server import serving, until

if TYPE_CHECKING:
    import pytest

    from .server import Server

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## As a server\n")[2].partition("\n## ")[0]
SNIPPET = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPETS = SNIPPET.findall(SECTION)
PROSE = SNIPPET.sub("", SECTION)
INFERENCE = SNIPPET.findall(README.partition("\n## Open Inference Protocol\n")[2].partition("\n## ")[0])


def test_the_section_is_found() -> None:
    assert [language for language, _ in SNIPPETS] == ["sh", "python", "sh", "sh"]


def test_what_it_links_to_is_there() -> None:
    """Files and headings, of the whole page."""
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link}
    assert {link for link in links if link.startswith("#") and link[1:] not in anchors} == set()
    root = Path(__file__).parents[2]
    assert {
        link for link in links if not link.startswith("#") and not (root / link.partition("#")[0]).exists()
    } == set()


def test_the_server_is_started_with_options_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    (install, start) = SNIPPETS[0][1].splitlines()
    assert shlex.split(install)[:3] == ["pip", "install", "-c"]
    program, *arguments = shlex.split(start)
    assert program == "sdrt"
    assert main([*arguments, "--help"]) == 0
    known = capsys.readouterr().out
    for option in set(re.findall(r"--[a-z-]+", PROSE)):
        assert option in known


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_snippet(server: Server, tmp_path: Path) -> None:
    code = SNIPPETS[1][1].replace("http://127.0.0.1:7860", server.url)
    printed = run([sys.executable, "-c", code], tmp_path)
    with Image.open(tmp_path / "star.png") as image:
        assert image.info["parameters"].startswith("a large red star on a blue background\nNegative prompt: green")
    names = [line.split()[0] for line in printed.splitlines()]
    assert names == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]


def test_the_shell_snippet(server: Server, tmp_path: Path) -> None:
    code = SNIPPETS[2][1].replace("http://127.0.0.1:7860", server.url)
    printed = run(["sh", "-ec", code], tmp_path)
    with Image.open(tmp_path / "cross.png") as image:
        assert image.info["parameters"].startswith("a yellow cross on black\nSteps: 20")
    assert '"status":"ready"' in printed
    assert "sdrt_queue_depth" in printed
    assert '"openapi":"3.1.0"' in printed


def test_the_shell_snippet_about_a_unix_socket(server: Server, home: Path, tmp_path: Path) -> None:
    (start,) = re.findall(r"`(sdrt serve [^`]* --uds sdrt\.sock)`", PROSE)
    assert start == "sdrt serve --bundle demo --uds sdrt.sock"
    path = tmp_path / "sdrt.sock"
    with serving(home, "--uds", str(path)) as local:
        assert local.url == f"unix:{path}"
        ready = [
            "curl",
            "-s",
            "--unix-socket",
            str(path),
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "http://localhost/readyz",
        ]
        until("it is ready", lambda: run(ready, tmp_path) == "200")
        run(["sh", "-ec", SNIPPETS[3][1]], tmp_path)
    settings = {"num_inference_steps": 20, "seed": 42}
    answer = server.client().images.generate(prompt="a yellow cross on black", extra_body=settings)
    assert answer.data
    assert (tmp_path / "cross.png").read_bytes() == base64.b64decode(answer.data[0].b64_json or "")


def test_the_snippets_about_the_open_inference_protocol(
    inference_server: Server,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert [language for language, _ in INFERENCE] == ["sh", "python", "sh"]
    program, *arguments = shlex.split(INFERENCE[0][1])
    assert program == "sdrt"
    assert main([*arguments, "--help"]) == 0
    known = capsys.readouterr().out
    assert all(each in known for each in arguments if each.startswith("--"))
    code = INFERENCE[1][1].replace("127.0.0.1:8001", inference_server.grpc or "")
    assert run([sys.executable, "-c", code], tmp_path) == "[42 43]\n"
    options = ["--bundle", "demo", "--steps", "20", "--cfg-scale", "5", "--seed", "42", "-o", str(tmp_path / "run.png")]
    monkeypatch.setenv("SDRT_HOME", str(home))
    assert main(["run", "a large red star on a blue background", *options]) == 0
    with Image.open(tmp_path / "star.png") as image, Image.open(tmp_path / "run.png") as expected:
        assert image.tobytes() == expected.tobytes()
    printed = run(["sh", "-ec", INFERENCE[2][1].replace("http://127.0.0.1:7860", inference_server.url)], tmp_path)
    assert '"name":"guidance_scale","datatype":"FP32","shape":[1]' in printed
    assert '{"name":"seed","datatype":"INT64","shape":[1],"data":[42]}' in printed
