"""Every snippet about the server in README.md, run as a reader would, against a server on another port."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from sdrt.cli import main

if TYPE_CHECKING:
    import pytest

    from .server import Server

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## As a server\n")[2].partition("\n## ")[0]
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)


def test_the_section_is_found() -> None:
    assert [language for language, _ in SNIPPETS] == ["sh", "python", "sh"]


def test_the_server_is_started_with_options_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    (install, start) = SNIPPETS[0][1].splitlines()
    assert shlex.split(install)[:3] == ["pip", "install", "-c"]
    program, *arguments = shlex.split(start)
    assert program == "sdrt"
    assert main([*arguments, "--help"]) == 0
    known = capsys.readouterr().out
    for option in set(re.findall(r"--[a-z-]+", SECTION)) - {"--help"}:
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
