"""ONNX graphs on the CPU through onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..errors import BackendError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ..engines.manifest import Component


class OnnxBinding:
    """Buffers in host memory that onnxruntime reads and writes in place."""

    def __init__(self, session: Any, component: Component, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._session = session
        self._name = component.name
        self._io = session.io_binding()
        # The arena spares a twentieth of a step's time; what others need the room for it gives back after each.
        self._run_options = _onnxruntime().RunOptions()
        self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.inputs: Mapping[str, NDArray[Any]] = {
            spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in component.inputs
        }
        self.outputs: Mapping[str, NDArray[Any]] = {
            spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in component.outputs if spec.name in shapes
        }
        for bind, buffers in ((self._io.bind_input, self.inputs), (self._io.bind_output, self.outputs)):
            for name, buffer in buffers.items():
                bind(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)

    def run(self) -> None:
        """Compute the outputs from the inputs.

        Raises
        ------
        BackendError
            onnxruntime could not, for want of memory for example.

        """
        try:
            self._session.run_with_iobinding(self._io, self._run_options)
        except Exception as error:  # onnxruntime's classes share no other base
            raise BackendError(f"{self._name} failed in onnxruntime: {first_line(error)}") from error

    def trim(self) -> None:
        """Do nothing: the memory of the activations is given back after each run."""


class OnnxSession:
    """One component of an ONNX bundle, loaded into onnxruntime.

    Parameters
    ----------
    graph
        The ``.onnx`` file.
    component
        What the manifest says of it.

    Raises
    ------
    MissingDependencyError
        onnxruntime is not installed.
    BackendError
        onnxruntime does not take the graph.

    """

    def __init__(self, graph: Path, component: Component) -> None:
        onnxruntime = _onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # A buffer that is kept for another of its size takes its room all the while: without that, what a step of the
        # U-Net needs at most is a third.
        options.enable_mem_reuse = False
        self._component = component
        try:
            self._session: Any = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's classes share no other base
            raise BackendError(f"onnxruntime does not load {graph}: {first_line(error)}") from error

    def bind(self, shapes: Mapping[str, tuple[int, ...]], *, in_pairs: bool = False) -> OnnxBinding:  # noqa: ARG002
        """Make buffers for the inputs and for those outputs that `shapes` names, and bind them."""
        return OnnxBinding(self._session, self._component, shapes)

    def close(self) -> None:
        """Free the weights."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415 - 0.1 s that --help need not pay
    except ImportError:
        raise MissingDependencyError("onnxruntime", "running an ONNX bundle", "cpu") from None
    return onnxruntime


def first_line(error: Exception) -> str:
    """Give the first line of an error's message, which is what the others follow from."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
