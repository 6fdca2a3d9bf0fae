"""What holds of the repository as a whole."""

from __future__ import annotations

import os
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from sdrt._version import __version__

ROOT = Path(__file__).parents[1]
FOLDERS = ("export", "engines", "runtime")
LONGEST = 420
"""Lines: a module that grows beyond it holds two things."""


def sources(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def test_modules_stay_short() -> None:
    files = sources(*FOLDERS, "src", "bench")
    assert len(files) > 30
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_sees_the_three_folders_through_links(folder: str) -> None:
    link = ROOT / "src" / "sdrt" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{folder}", "relative, so that a clone may lie anywhere"  # noqa: PTH115  the text itself, unresolved
    assert (ROOT / folder / "__init__.py").is_file()


def test_every_folder_of_modules_is_a_package() -> None:
    """One without ``__init__.py`` is found by no test of imports, and by no wheel."""
    bare = {file.parent for file in sources(*FOLDERS, "bench", "tests") if not (file.parent / "__init__.py").is_file()}
    assert bare == set()


def test_nothing_is_tracked_that_is_ignored() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: there is nothing to ask git about")
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" in project["dynamic"]
    assert version("sdrt") == __version__
    assert f"[{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
