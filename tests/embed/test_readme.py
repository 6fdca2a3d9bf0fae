"""Every snippet about C and C++ in the two READMEs, run as a reader would; the servers' home is the tests' own."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

import pytest

from .conftest import EMBED, pixels_of, run

if TYPE_CHECKING:
    from pathlib import Path

STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")


def snippets(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


SECTION = (
    (EMBED.parent / "README.md").read_text(encoding="utf-8").partition("\n## From C and C++\n")[2].partition("\n## ")[0]
)
OWN = snippets((EMBED / "README.md").read_text(encoding="utf-8"))
SHORT = snippets(SECTION)


@pytest.fixture
def env(installed: Path, surroundings: dict[str, str]) -> dict[str, str]:
    """What a reader's shell has: the prefix where it looks for libraries."""
    (file,) = installed.rglob("sdrt.pc")
    paths = {"PKG_CONFIG_PATH": str(file.parent), "LD_LIBRARY_PATH": str(file.parents[1]), "PREFIX": str(installed)}
    return {**surroundings, **paths}


def test_the_snippets_are_found() -> None:
    assert [language for language, _ in OWN] == ["sh", "cmake", "sh", "c", "cpp"]
    assert [language for language, _ in SHORT] == ["sh", "cpp"]


def test_both_build_it_in_the_same_way() -> None:
    assert OWN[0][1].split() == SHORT[0][1].replace("&&", "").split()


def test_it_is_built_and_installed_as_it_says(tmp_path: Path, env: dict[str, str]) -> None:
    """From a copy, so that the clone stays as it is."""
    for name in ("embed", "src/sdrt/_version.py"):
        source, target = EMBED.parent / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    prefix = tmp_path / "prefix"
    run(
        "sh", "-ec", SHORT[0][1], folder=tmp_path, env={**env, "PREFIX": str(prefix), "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    )
    assert (prefix / "include" / "sdrt.hpp").is_file()
    assert list(prefix.rglob("libsdrt.so"))


def test_the_cmake_snippet(installed: Path, env: dict[str, str], tmp_path: Path) -> None:
    head = "cmake_minimum_required(VERSION 3.16)\nproject(x LANGUAGES C)\nadd_executable(program picture.c)\n"
    (tmp_path / "CMakeLists.txt").write_text(head + OWN[1][1], encoding="utf-8")
    (tmp_path / "picture.c").write_text(OWN[3][1], encoding="utf-8")
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}", env=env)
    run("cmake", "--build", tmp_path / "build", env=env)
    assert (tmp_path / "build" / "program").is_file()


def test_the_c_snippet(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "picture.c").write_text(OWN[3][1], encoding="utf-8")
    run("sh", "-ec", OWN[2][1], folder=tmp_path, env={**env, "CFLAGS": " ".join(STRICT)})
    run(tmp_path / "picture", folder=tmp_path, env=env)
    assert len(pixels_of(tmp_path / "star.ppm")) == 128 * 128 * 3


@pytest.mark.parametrize(
    ("code", "printed"),
    [(OWN[4][1], "128x128, seed 42\na yellow cross on black\nSteps: 50, "), (SHORT[1][1], "128x128, seed 42\n")],
    ids=["embed", "sdrt"],
)
def test_the_cpp_snippets(code: str, printed: str, env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "picture.cpp").write_text(code, encoding="utf-8")
    flags = run("pkg-config", "--cflags", "--libs", "sdrt", env=env).split()
    run("g++", "-std=c++17", *STRICT, tmp_path / "picture.cpp", *flags, "-o", tmp_path / "picture")
    assert run(tmp_path / "picture", folder=tmp_path, env=env).startswith(printed)


def test_options_and_variables_that_are_named_exist() -> None:
    """Of the text around the snippets."""
    text = (EMBED / "README.md").read_text(encoding="utf-8")
    header = (EMBED / "include" / "sdrt.h").read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(SDRT_[A-Z_]+|sdrt_[a-z_]+)\b", text)) - {"SDRT_PROGRAM"}:
        assert name in header, name
    assert "SDRT_PROGRAM" in header
    for name in set(re.findall(r"\]\(([\w./]+)\)", text)):
        assert os.path.exists(EMBED / name), name  # noqa: PTH110 - it may lead upwards
