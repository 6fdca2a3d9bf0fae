"""A home with the demo model in it, and one server that many tests ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import sdrt
from sdrt.engines import demo

from .server import Server, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the demo is unpacked."""
    folder = tmp_path_factory.mktemp("served")
    demo.bundle_folder(folder)
    return folder


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[Server]:
    """A server that is ready."""
    with serving(home, "--log-format", "json") as running:
        yield running.wait_until_ready()


@pytest.fixture(scope="session")
def inference_server(home: Path) -> Iterator[Server]:
    """A server that answers gRPC as well, and shares memory."""
    with serving(home, "--grpc-port", "0", "--allow-shared-memory") as running:
        yield running.wait_until_ready()


@pytest.fixture(scope="session")
def pipe(home: Path) -> Iterator[sdrt.Pipeline]:
    """The same model in this process."""
    with sdrt.load(demo.bundle_folder(home), backend="onnxruntime") as pipeline:
        yield pipeline
