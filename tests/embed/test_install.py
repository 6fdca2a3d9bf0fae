"""What is installed, as other people's builds find it: with CMake and with pkg-config, shared and static."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from sdrt._version import __version__

from .conftest import EMBED, run

STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
C_PROGRAM = """
#include <sdrt.h>
#include <stdio.h>

int main(void) {
  sdrt_error error = SDRT_ERROR_INIT;
  sdrt_open_options options = sdrt_default_open_options();
  sdrt_server *server = NULL;
  options.address = "/no/such/socket";
  sdrt_open(&options, &server, &error);
  printf("%s: %s", sdrt_version(), error.message);
  return 0;
}
"""
CPP_PROGRAM = """
#include <sdrt.hpp>
#include <cstdio>

int main() {
  try {
    sdrt::Server::connect("/no/such/socket");
  } catch (const sdrt::Error &error) {
    std::printf("%s: %s", sdrt_version(), error.what());
  }
}
"""
PRINTED = f"{__version__}: /no/such/socket cannot be reached: No such file or directory"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A C and a C++ program, and a build of them as a user would write it."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "program.c").write_text(C_PROGRAM, encoding="utf-8")
    (folder / "program.cpp").write_text(CPP_PROGRAM, encoding="utf-8")
    (folder / "CMakeLists.txt").write_text(
        f"""
cmake_minimum_required(VERSION 3.16)
project(programs LANGUAGES C CXX)
set(CMAKE_CXX_STANDARD 17)
find_package(sdrt {__version__} REQUIRED)
foreach(kind sdrt shared static)
  add_executable(c-${{kind}} program.c)
  add_executable(cpp-${{kind}} program.cpp)
  target_link_libraries(c-${{kind}} PRIVATE sdrt::${{kind}})
  target_link_libraries(cpp-${{kind}} PRIVATE sdrt::${{kind}})
endforeach()
""",
        encoding="utf-8",
    )
    return folder


def test_the_tree(installed: Path) -> None:
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if not path.is_dir()}
    (library,) = {str(Path(name).parent) for name in files if name.endswith("libsdrt.a")}
    package = {"Config", "ConfigVersion", "Targets", "Targets-release"}
    assert files == {
        "include/sdrt.h",
        "include/sdrt.hpp",
        *(f"{library}/libsdrt.{kind}" for kind in ("a", "so", "so.0", f"so.{__version__}")),
        *(f"{library}/cmake/sdrt/sdrt{name}.cmake" for name in package),
        f"{library}/pkgconfig/sdrt.pc",
    }


def test_cmake_finds_it(installed: Path, programs: Path, tmp_path: Path) -> None:
    run("cmake", "-S", programs, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", tmp_path)
    for language in ("c", "cpp"):
        for kind in ("sdrt", "shared", "static"):
            assert run(tmp_path / f"{language}-{kind}") == PRINTED


def test_it_is_part_of_another_build(programs: Path, tmp_path: Path) -> None:
    """With add_subdirectory: no find_package, and none of the examples and tests."""
    text = (programs / "CMakeLists.txt").read_text(encoding="utf-8")
    source = tmp_path / "source"
    source.mkdir()
    changed = re.sub(r"find_package\(.*\)", f'add_subdirectory("{EMBED}" sdrt)', text)
    (source / "CMakeLists.txt").write_text(changed, encoding="utf-8")
    for name in ("program.c", "program.cpp"):
        (source / name).write_text((programs / name).read_text(encoding="utf-8"), encoding="utf-8")
    build = tmp_path / "build"
    run("cmake", "-S", source, "-B", build)
    targets = run("cmake", "--build", build, "--target", "help")
    assert "c-sdrt" in targets
    assert "sdrt_static" in targets
    assert "sdrt-picture" not in targets
    assert "sdrt-test" not in targets


def test_pkg_config_finds_it(installed: Path, programs: Path, tmp_path: Path) -> None:
    (file,) = installed.rglob("sdrt.pc")
    env = {**os.environ, "PKG_CONFIG_PATH": str(file.parent)}
    assert run("pkg-config", "--modversion", "sdrt", env=env).strip() == __version__
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "sdrt", env=env))
    found = f"-Wl,-rpath,{file.parents[1]}"
    run("gcc", "-std=c11", *STRICT, programs / "program.c", *flags, found, "-o", tmp_path / "c")
    run("g++", "-std=c++17", *STRICT, programs / "program.cpp", *flags, found, "-o", tmp_path / "cpp")
    archive = file.parents[1] / "libsdrt.a"
    static = shlex.split(run("pkg-config", "--cflags", "--libs", "--static", "sdrt", env=env))
    static[static.index("-lsdrt")] = str(archive)
    run("gcc", programs / "program.c", *static, "-o", tmp_path / "c-static")
    assert {run(tmp_path / name) for name in ("c", "cpp", "c-static")} == {PRINTED}


@pytest.mark.parametrize("standard", ["c99", "c11", "c17", "c++17", "c++20", "c++23"])
def test_headers_in_every_standard(installed: Path, programs: Path, standard: str) -> None:
    compiler, file = ("g++", "program.cpp") if "+" in standard else ("gcc", "program.c")
    include = f"-I{installed / 'include'}"
    run(compiler, f"-std={standard}", *STRICT, "-fsyntax-only", include, programs / file)


def test_the_shared_library_shows_its_functions_alone(installed: Path) -> None:
    header = (EMBED / "include" / "sdrt.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"^SDRT_API [^;(]*?\*?(sdrt_\w+)\(", header, re.MULTILINE))
    assert len(declared) == 23
    (library,) = installed.rglob(f"libsdrt.so.{__version__}")
    lines = run("nm", "--dynamic", "--defined-only", "--with-symbol-versions", library).splitlines()
    assert {line.split()[-1] for line in lines} == {f"{name}@@SDRT_0" for name in declared} | {"SDRT_0"}
    dynamic = run("readelf", "--dynamic", "--wide", library)
    assert re.findall(r"\(SONAME\).*\[(.*)\]", dynamic) == ["libsdrt.so.0"]
    needed = {name.split(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)}
    assert needed <= {"libc", "libm", "libgcc_s", "libstdc++", "libpthread", "ld-linux-x86-64"}, "and nothing of Python"
