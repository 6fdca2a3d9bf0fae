"""Backends by name: which of them this machine has, and the session each one opens."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from ..errors import BackendError

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from .session import Session


def obstacle(bundle: Bundle) -> str | None:
    """Tell in one line why this machine cannot run a bundle; None if it can."""
    backend = bundle.manifest.backend.name
    if backend != "onnx":
        return f"its engines are for {backend}, expected onnx: build it with this version of sdrt"
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: run pip install 'sdrt[cpu]'"
    return None


def open_session(bundle: Bundle, name: str) -> Session:
    """Load a component.

    Raises
    ------
    BackendError, MissingDependencyError
        It cannot be loaded; the message says why.

    """
    from .onnx import OnnxSession  # noqa: PLC0415 - the backend that is used, and no other

    component = bundle.component(name)
    if reason := obstacle(bundle):
        raise BackendError(f"{bundle.folder} cannot be run here: {reason}")
    return OnnxSession(bundle.path(component.graph), component)
