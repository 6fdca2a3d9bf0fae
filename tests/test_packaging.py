"""The sdist and the wheel as people get them, and the wheel at work in an environment that has no PyTorch."""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

from sdrt._version import __version__

ROOT = Path(__file__).parents[1]
SIZE_LIMIT = 230_000_000
"""Bytes on disk of the base install with the extra ``cpu``."""
WHEEL_LIMIT = 15_000_000
LIBRARY = "sdrt/runtime/libsdrt_kernels.so.1"
COMPILES = (sys.platform, platform.machine()) == ("linux", "x86_64") and shutil.which("gcc") is not None


class Distributions(NamedTuple):
    """What ``python -m build`` makes of the tree."""

    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


def build(source: Path, kind: str, out: Path, **environment: str) -> Path:
    """Build an sdist or a wheel from a folder, and nothing beside it."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), str(source)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Built from a copy, since setuptools takes along what an earlier build left in ``build/``."""
    place = tmp_path_factory.mktemp("distributions")
    tree = place / "tree"
    tree.mkdir()
    for folder in ("src", "export", "engines", "runtime", "bench", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so.1")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    for name in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, tree)
    sdist = build(tree, "sdist", place / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    return Distributions(sdist, build(tree, "wheel", place / "wheel"), build(unpacked, "wheel", place / "again"))


def expected_modules() -> set[str]:
    """Every module of the working tree, as a wheel names it."""
    package = ROOT / "src" / "sdrt"
    own = {f"sdrt/{file.relative_to(package)}" for each in (package, package / "serve") for file in each.glob("*.py")}
    folders = [package / folder for folder in ("export", "engines", "runtime")]
    return own | {f"sdrt/{file.relative_to(package)}" for folder in folders for file in folder.rglob("*.py")}


def test_sdist_holds_each_file_once_and_no_links(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        members = archive.getmembers()
    assert all(member.isreg() or member.isdir() for member in members)
    names = {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in members if member.isreg()}
    assert {f"src/{name}" for name in expected_modules()} <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "src/sdrt/export/vocabulary/merges.txt.gz"} <= names
    sources = {f"src/sdrt/runtime/{file.name}" for file in (ROOT / "runtime").glob("*.[ch]")}
    assert {"setup.py", "src/sdrt/runtime/attention.c", "src/sdrt/runtime/kernels.h"} <= {"setup.py", *sources} <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {"src"}, "no second copy, no tests, no bench"


def test_wheel_holds_the_package_alone_and_no_links(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        entries = archive.infolist()
        metadata = archive.read(f"sdrt-{__version__}.dist-info/METADATA").decode()
    assert all(stat.S_ISREG(entry.external_attr >> 16) for entry in entries)
    names = {entry.filename for entry in entries}
    assert expected_modules() <= names
    assert {"sdrt/py.typed", "sdrt/export/vocabulary/merges.txt.gz", "sdrt/export/vocabulary/LICENSE"} <= names
    assert {name.split("/")[0] for name in names} == {"sdrt", f"sdrt-{__version__}.dist-info"}
    assert {"sdrt/engines/README.md", "sdrt/engines/demo.tar.xz", "sdrt/serve/page.html"} <= names
    assert not any(name.endswith(".safetensors") for name in names), "the demo's checkpoint is in the archive"
    assert distributions.wheel.stat().st_size <= WHEEL_LIMIT
    assert f"Version: {__version__}" in metadata
    assert "License-Expression: Apache-2.0 AND MIT" in metadata
    base = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert len(base) == 6, base


def test_a_wheel_of_the_sdist_is_the_wheel_of_the_tree(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as tree, zipfile.ZipFile(distributions.wheel_of_sdist) as sdist:
        assert {entry.filename: entry.CRC for entry in tree.infolist()} == {
            entry.filename: entry.CRC for entry in sdist.infolist()
        }


@pytest.mark.skipif(not COMPILES, reason="the kernels are compiled for Linux on x86-64, with a C compiler")
def test_a_wheel_has_what_was_compiled_and_is_for_any_python(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        assert archive.read(LIBRARY).startswith(b"\x7fELF")
        assert not any(entry.endswith(".c") for entry in archive.namelist())
    assert distributions.wheel.name.endswith("-py3-none-linux_x86_64.whl")


def test_without_a_compiler_there_is_a_wheel_without_it(distributions: Distributions, tmp_path: Path) -> None:
    with tarfile.open(distributions.sdist) as archive:
        archive.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    wheel = build(tree, "wheel", tmp_path / "wheel", CC="false")
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(distributions.wheel) as other:
        assert {*archive.namelist(), LIBRARY} == {*other.namelist(), LIBRARY}
        assert LIBRARY not in archive.namelist()


class Lean(NamedTuple):
    """An environment that holds sdrt with its extra ``cpu``, and no pip."""

    folder: Path
    environment: dict[str, str]

    @property
    def site_packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, away from the working tree."""
        program = self.folder / "bin" / command[0]
        return subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=self.folder,
            env=self.environment,
        )


@pytest.fixture(scope="session")
def lean(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Lean:
    """The wheel, installed as a user does it."""
    folder = tmp_path_factory.mktemp("lean") / "venv"
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--disable-pip-version-check"]
    command += ["-c", str(ROOT / "constraints.txt"), f"{distributions.wheel}[cpu]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SDRT_"))}
    return Lean(folder, environment | {"SDRT_HOME": str(folder / "home")})


def test_install_is_lean(lean: Lean) -> None:
    """Blocks on disk, compiled modules included."""
    files = [file for file in lean.site_packages.rglob("*") if file.is_file() and not file.is_symlink()]
    assert len(files) > 500
    assert sum(file.stat().st_blocks * 512 for file in files) <= SIZE_LIMIT


def test_every_runtime_module_imports_without_torch(lean: Lean) -> None:
    """And the modules under test come from the wheel, not from the working tree."""
    script = """
import importlib, importlib.util, json, pkgutil, sys
import sdrt, sdrt.cli, sdrt.engines, sdrt.runtime
names = [each.name for folder in (sdrt.engines, sdrt.runtime) for each in
         pkgutil.walk_packages(folder.__path__, folder.__name__ + ".")]
names += ["sdrt." + each.name for each in pkgutil.iter_modules(sdrt.__path__)
          if each.name not in ("export", "__main__")]
for name in names:
    importlib.import_module(name)
banned = ("torch", "diffusers", "transformers")
print(json.dumps({
    "names": names,
    "file": sdrt.__file__,
    "found": [name for name in banned if importlib.util.find_spec(name)],
    "imported": [name for name in banned if name in sys.modules],
}))
"""
    done = lean.run("python", "-c", script)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert {"sdrt.engines.bundle", "sdrt.runtime.pipeline", "sdrt.runtime.tokenizer", "sdrt.cli"} <= set(seen["names"])
    assert Path(seen["file"]).is_relative_to(lean.site_packages)
    assert seen["found"] == []
    assert seen["imported"] == []


def test_run_makes_a_picture_without_torch(lean: Lean, tiny_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "wall.png"
    size = ("-W", "64", "-H", "64")
    done = lean.run(
        "sdrt", "run", "Great Wall photo", "--bundle", str(tiny_bundle), "--steps", "2", *size, "-o", str(picture)
    )
    assert done.returncode == 0, done.stderr
    script = "import sys; from PIL import Image; image = Image.open(sys.argv[1]); image.load(); print(image.size)"
    assert lean.run("python", "-c", script, str(picture)).stdout == "(64, 64)\n"


def test_run_draws_with_the_demo_from_nothing(lean: Lean, tmp_path: Path) -> None:
    """No build, no network (a proxy that is not there), and a home folder that is empty."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    alone = lean._replace(environment=lean.environment | nowhere | {"SDRT_HOME": str(tmp_path / "home")})
    picture = tmp_path / "star.png"
    done = alone.run(
        "sdrt", "run", "a large red star on a blue background", "--steps", "20", "--seed", "1", "-o", str(picture)
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stderr
    assert "sdrt build --ckpt v1-1" in done.stderr
    script = "import sys; import numpy as np; from PIL import Image\n"
    script += "pixels = np.asarray(Image.open(sys.argv[1])).astype(int)\n"
    script += "red, _, blue = pixels.transpose(2, 0, 1)\n"
    script += "print(*pixels.shape, np.mean(red > blue + 100), np.mean(blue > red + 100))"
    *shape, red, blue = alone.run("python", "-c", script, str(picture)).stdout.split()
    assert shape == ["128", "128", "3"]
    assert 0.03 < float(red) < 0.2, "the star's share of the picture"
    assert float(blue) > 0.75


def test_build_names_the_extra_that_it_lacks(lean: Lean, tmp_path: Path) -> None:
    done = lean.run("sdrt", "build", "--ckpt", "v1-1", "-o", str(tmp_path / "bundle"))
    assert done.returncode == 1
    assert "pip install 'sdrt[export]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "bundle").exists()
