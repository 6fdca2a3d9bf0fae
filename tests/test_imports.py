"""Who imports whom, and what an import costs: read from the source, then seen in fresh interpreters."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import sdrt

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(sdrt.__file__).parent
TRACING = {"torch", "diffusers", "transformers"}
HEAVY = {*TRACING, "onnx", "onnxruntime", "PIL", "tokenizers", "huggingface_hub", "openvino", "tensorrt", "polygraphy"}
SLOW_TO_START = {*HEAVY, "numpy", "tqdm", "platformdirs", "importlib.metadata", "asyncio", "ssl", "multiprocessing"}


class Import(NamedTuple):
    """One name that a module imports, as an absolute dotted name."""

    line: int
    name: str
    for_types_only: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_in(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import of a source text, at the top or inside functions, `module` being its dotted name."""
    package = module.split(".") if is_package else module.split(".")[:-1]

    def walk(node: ast.AST, *, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield Import(node.lineno, origin, for_types)
            yield from (Import(node.lineno, f"{origin}.{alias.name}", for_types) for alias in node.names)
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            for statement in node.body:
                yield from walk(statement, for_types=True)
            for statement in node.orelse:
                yield from walk(statement, for_types=for_types)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, for_types=for_types)

    yield from walk(ast.parse(source), for_types=False)


def modules() -> dict[str, Path]:
    """Every module of sdrt by its dotted name; the three folders are followed through their links."""
    files = list(PACKAGE.glob("*.py"))
    for folder in ("benchmark", "commands", "export", "engines", "runtime", "serve"):
        files += sorted((PACKAGE / folder).rglob("*.py"))
    found = {}
    for file in files:
        parts = ["sdrt", *file.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports_of(module: str) -> list[Import]:
    """All that a module of sdrt imports while it runs."""
    file = MODULES[module]
    found = imports_in(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")
    return [each for each in found if not each.for_types_only]


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
import torch.nn as nn
from typing import TYPE_CHECKING
from . import sibling
from ..engines.bundle import Bundle
if TYPE_CHECKING:
    import diffusers
else:
    import json
def later():
    with open("x"):
        from transformers import CLIPTextModel
"""
    found = {(each.name, each.for_types_only) for each in imports_in(source, "sdrt.runtime.x", is_package=False)}
    assert found >= {
        ("torch.nn", False),
        ("sdrt.runtime.sibling", False),
        ("sdrt.engines.bundle", False),
        ("sdrt.engines.bundle.Bundle", False),
        ("diffusers", True),
        ("json", False),
        ("transformers.CLIPTextModel", False),
    }
    assert {each.name for each in imports_in("from ..engines import bundle", "sdrt.runtime", is_package=True)} == {
        "sdrt.engines",
        "sdrt.engines.bundle",
    }
    assert {each.name for each in imports_in("from .loop import x", "sdrt.runtime", is_package=True)} == {
        "sdrt.runtime.loop",
        "sdrt.runtime.loop.x",
    }


def test_every_folder_is_looked_at() -> None:
    assert {"sdrt.errors", "sdrt.cli", "sdrt.runtime.loop", "sdrt.engines.bundle", "sdrt.export"} <= MODULES.keys()


ALLOWED = {
    "sdrt.runtime": ("sdrt.runtime", "sdrt.engines"),
    "sdrt.engines": ("sdrt.engines",),
    "sdrt.export": ("sdrt.export", "sdrt.engines"),
    "sdrt.serve": ("sdrt.serve", "sdrt.runtime", "sdrt.engines", "sdrt.generate"),
}
"""What of sdrt a folder may import, besides the errors and the version."""


def breaks_the_rule(module: str, imported: Import) -> bool:
    if imported.top in TRACING:
        return not inside(module, "sdrt.export")
    if imported.top != "sdrt":
        return imported.top in {"runtime", "engines", "export", "tests", "bench"}
    allowed = next((names for folder, names in ALLOWED.items() if inside(module, folder)), ("sdrt",))
    return not inside(imported.name, *allowed, "sdrt.errors", "sdrt._version")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_data(module: str) -> None:
    wrong = [
        f"{module}:{each.line} imports {each.name}" for each in imports_of(module) if breaks_the_rule(module, each)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sdrt.runtime.onnx", "from ..export.ldm import ldm_names"),
        ("sdrt.runtime.onnx", "import torch"),
        ("sdrt.runtime.onnx", "from sdrt import cli"),
        ("sdrt.engines.bundle", "from ..runtime import loop"),
        ("sdrt.engines.bundle", "from ..export import trace"),
        ("sdrt.export.trace", "from ..runtime.tokenizer import Tokenizer"),
        ("sdrt.export.trace", "import runtime.tokenizer"),
        ("sdrt.cli", "from transformers import CLIPTextModel"),
        ("sdrt.serve.models", "from ..export import trace"),
    ],
)
def test_the_rule_catches(module: str, line: str) -> None:
    assert any(breaks_the_rule(module, each) for each in imports_in(line, module, is_package=False))


def test_a_bundle_is_read_with_the_standard_library_and_numpy() -> None:
    """Through every module of sdrt that engines/bundle.py reaches."""
    reached: set[str] = set()
    queue = ["sdrt.engines.bundle"]
    foreign = []
    while queue:
        module = queue.pop()
        if module in reached:
            continue
        reached.add(module)
        for each in imports_of(module):
            if each.name in MODULES:
                queue.append(each.name)
            elif each.top not in {*sys.stdlib_module_names, "numpy", "sdrt"}:
                foreign.append(f"{module}:{each.line} imports {each.name}")
    assert foreign == []
    assert {"sdrt.engines.manifest", "sdrt.errors"} <= reached


def modules_after(code: str) -> set[str]:
    """Names in sys.modules once a fresh interpreter has run `code`, each with the packages above it."""
    script = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\nimport json\n"
    script += "print(chr(10) + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import sdrt", HEAVY),
        ("import sdrt.cli", SLOW_TO_START),
        ("sys.argv = ['sdrt', '--help']; from sdrt.cli import main; main()", SLOW_TO_START),
        ("sys.argv = ['sdrt', 'run', '--help']; from sdrt.cli import main; main()", SLOW_TO_START),
        ("import sdrt.runtime.pipeline, sdrt.engines.store", TRACING),
    ],
    ids=["import sdrt", "import sdrt.cli", "sdrt --help", "sdrt run --help", "the whole run time"],
)
def test_an_import_brings_nothing_heavy(code: str, banned: set[str]) -> None:
    before = modules_after("pass")
    assert not banned & (modules_after(code) - before)
