"""ONNX graphs on the CPU through OpenVINO, compiled for the shapes that they are run with."""

from __future__ import annotations

import functools
import threading
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from ..errors import BackendError, MissingDependencyError, SdrtWarning
from . import attention, own_operations
from .common_rows import compute_once
from .mapped_pages import let_go_of_pages
from .packed_weights import PackedWeights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ..engines.manifest import Component
    from .compile_cache import CompileCache
    from .program import Program

Precision = Literal["bf16", "fp32"]

_NAMES: dict[Precision, str] = {"bf16": "bf16", "fp32": "f32"}
# Guided and unguided at two sizes: each compilation holds the weights in a layout of its own.
_KEPT = 4
_Shapes = tuple[tuple[int, ...], ...]


@functools.cache
def _core() -> Any:
    """Give the process its one core, which holds the plugin for the CPU."""
    try:
        import openvino  # noqa: PLC0415 - half a second that --help need not pay
    except ImportError:
        raise MissingDependencyError("openvino", "running an ONNX bundle with it", "openvino") from None
    return openvino.Core()


def default_precision() -> Precision:
    """Name the precision that OpenVINO takes by itself: bf16 where the CPU has instructions for it, else fp32.

    Raises
    ------
    MissingDependencyError
        OpenVINO is not installed.

    """
    return "bf16" if _core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string() == "bf16" else "fp32"


class OpenVinoSession:
    """One component of an ONNX bundle in OpenVINO.

    The graph is compiled when it is first bound to shapes, and for these alone, since fixed shapes run faster. The
    last four compilations are kept.

    Parameters
    ----------
    graph
        The ``.onnx`` file.
    weights
        The file of its external data, or None if it has none.
    component
        What the manifest says of it.
    precision
        ``bf16`` for products and most of what is between them, or ``fp32`` for all. What is bound is float32 anyway.
    cache
        Where compilations are kept for other processes.

    Raises
    ------
    MissingDependencyError
        OpenVINO is not installed.

    """

    def __init__(
        self, graph: Path, weights: Path | None, component: Component, precision: Precision, cache: CompileCache
    ) -> None:
        self._core = _core()
        self._graph, self._weights, self._component = graph, weights, component
        self._precision: Precision = precision
        self._cache = cache
        self._packed = PackedWeights(cache, component.name)
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def bind(self, shapes: Mapping[str, tuple[int, ...]], *, in_pairs: bool = False) -> OpenVinoBinding:
        """Make buffers for the inputs and for those outputs that `shapes` names, and bind them.

        With `in_pairs`, what depends on no text is computed for the first half of the batch alone.

        Raises
        ------
        BackendError
            OpenVINO does not take the graph, or not with these shapes.

        """
        outputs = tuple(spec.name for spec in self._component.outputs if spec.name in shapes)
        with self._lock:
            compiled, programs = self._compiled(
                tuple(shapes[spec.name] for spec in self._component.inputs), outputs, in_pairs
            )
        return OpenVinoBinding(compiled, programs, self._component, shapes)

    def _compile(self, shapes: _Shapes, outputs: tuple[str, ...], in_pairs: bool) -> tuple[Any, list[Program]]:
        """Compile the graph for the shapes of its inputs and the outputs that are wanted, or take what was compiled."""
        # Blobs of both precisions would have one name, and bf16 from one of fp32 gives NaN: the name tells them apart.
        sizes = ("x".join(map(str, shape)) for shape in shapes)
        some = [] if len(outputs) == len(self._component.outputs) else outputs
        name = "-".join((self._component.name, self._precision, *some, *(["pairs"] if in_pairs else []), *sizes))
        try:
            model = self._read(shapes, outputs)
            if in_pairs:
                try:
                    compute_once(model)
                except RuntimeError:  # a graph of somebody else's export
                    model = self._read(shapes, outputs)
            programs = own_operations.put_in(model, self._packed) if self._precision == "bf16" else []
            if programs:
                compiled = self._compile_with_kernels(model)
                self._packed.keep()
            else:
                with self._cache.entry(name) as folder:
                    compiled = self._compile_with(model, folder)
        except (RuntimeError, MemoryError) as error:
            raise BackendError(f"openvino does not compile {self._graph}: {_last_line(error)}") from error
        if self._weights is not None:
            let_go_of_pages(self._weights)  # what is compiled has its own, in the layout of its instructions
        return compiled, programs

    def _read(self, shapes: _Shapes, outputs: tuple[str, ...]) -> Any:
        # The weights stay in their file, of which pages are read as they are needed.
        model = self._core.read_model(self._graph)
        model.reshape({spec.name: shape for spec, shape in zip(self._component.inputs, shapes, strict=True)})
        for result in model.get_results():
            if not result.output(0).names & set(outputs):
                model.remove_result(result)  # which is not for nothing: it would be put in another order
        _fix_shapes(model)
        if self._precision == "bf16":
            attention.put_in(model)  # before `compute_once`, which would come between its parts
        return model

    def _options(self) -> dict[str, str]:
        return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _NAMES[self._precision]}

    def _compile_with_kernels(self, model: Any) -> Any:
        """Compile a graph that has operations of ours, which OpenVINO's cache does not take."""
        try:
            # Snippets are kernels that are generated for what is between products, attention above all. Without them a
            # step is no slower, and the graph is compiled in about the time that the cache takes. Not documented.
            return self._core.compile_model(model, "CPU", self._options() | {"SNIPPETS_MODE": "DISABLE"})
        except RuntimeError:
            return self._core.compile_model(model, "CPU", self._options())

    def _compile_with(self, model: Any, folder: Path | None) -> Any:
        options = self._options()
        if folder is None:
            return self._core.compile_model(model, "CPU", options)
        # With its path it need not hash all weights at every start, which stand for themselves in the cache's name.
        caching = {"CACHE_DIR": str(folder), "CACHE_MODEL_PATH": str(self._graph)}
        if self._weights is not None:
            # Kept without the weights, which are read from the bundle: megabytes rather than gigabytes for each shape.
            caching |= {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(self._weights)}
        try:
            return self._core.compile_model(model, "CPU", options | caching)
        except RuntimeError as error:
            compiled = self._core.compile_model(model, "CPU", options)
            warnings.warn(
                f"openvino cannot keep what it compiles of {self._component.name}, and will compile it anew at each "
                f"start: {_last_line(error)}",
                SdrtWarning,
                stacklevel=2,
            )
            return compiled

    def close(self) -> None:
        """Free the weights."""
        self._compiled.cache_clear()
        self._packed.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OpenVinoBinding:
    """Buffers in host memory that OpenVINO reads and writes in place, and a request of their own to compute with."""

    def __init__(
        self, compiled: Any, programs: list[Program], component: Component, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        import openvino  # noqa: PLC0415 - imported already

        self._name = component.name
        self._compiled, self._programs = compiled, programs
        self._request = compiled.create_infer_request()
        self.inputs: Mapping[str, NDArray[Any]] = {
            spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in component.inputs
        }
        self.outputs: Mapping[str, NDArray[Any]] = {
            spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in component.outputs if spec.name in shapes
        }
        try:
            for name, buffer in (self.inputs | self.outputs).items():
                self._request.set_tensor(name, openvino.Tensor(buffer, shared_memory=True))
        except RuntimeError as error:
            raise BackendError(f"openvino does not take the buffers of {self._name}: {_last_line(error)}") from error

    def run(self) -> None:
        """Compute the outputs from the inputs.

        Raises
        ------
        BackendError
            OpenVINO could not, for want of memory for example.

        """
        try:
            # On a thread of OpenVINO's, for what a signal's handler raises comes up in the main thread's next line of
            # Python, and that would be within an operation of ours.
            try:
                self._request.start_async()
            finally:
                self._request.wait()  # even if a handler has raised something: its buffers are in use until then
        except (RuntimeError, MemoryError) as error:
            raise BackendError(f"{self._name} failed in openvino: {_last_line(error)}") from error

    def trim(self) -> None:
        """Free the activations, which all bindings of these shapes share, unless one of them runs just now."""
        with suppress(RuntimeError):
            self._compiled.release_memory()
        for program in self._programs:
            program.trim()


def _fix_shapes(model: Any) -> None:
    """Put numbers where a graph asks for shapes that are fixed, so that parts of it can be taken by themselves."""
    from openvino import opset13  # noqa: PLC0415 - imported already

    for node in model.get_ordered_ops():
        if node.get_type_name() == "ShapeOf":
            shape = np.array(list(node.get_input_shape(0)), node.output(0).element_type.to_dtype())
            node.output(0).replace(opset13.constant(shape).output(0))


def _last_line(error: Exception) -> str:
    """Give the last line of an error's message, which says what happened; those before it say where in its source."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
