"""ONNX graph to TensorRT plan, with TensorRT or TensorRT-RTX: their Python modules have one and the same interface.

TensorRT-RTX builds on any machine for the GPUs that it is told; TensorRT builds on the GPU that will run the engine,
timing kernels on it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from ..errors import BackendError, InputError, MissingDependencyError
from .bundle import plan_name
from .devices import nvidia_gpus
from .manifest import DEEP_FEATURES, FileEntry
from .monitor import Log, Monitor, one_line, run_beside
from .targets import capability_of_sm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from .fusion import FusionReport
    from .manifest import InputRange

BackendName = Literal["tensorrt-rtx", "tensorrt"]

#: Python module and extra of each backend.
MODULES: Mapping[BackendName, tuple[str, str]] = {
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
    "tensorrt": ("tensorrt", "trt"),
}

# How many nodes an error names beside the first.
_NODES_SHOWN = 5


@dataclass(frozen=True)
class Options:
    """What may be asked of the builder.

    Attributes
    ----------
    optimization_level
        0 to 5: how long the builder may search; None for its own default, 3.
    hardware_compatible
        TensorRT: the engine runs on Ampere and all later GPUs, slower than one built for its GPU alone.
    version_compatible
        TensorRT: the engine loads in later versions of it too.
    refit
        The weights can be replaced without building again. Such engines may be slower.

    """

    optimization_level: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    refit: bool = False


@dataclass(frozen=True)
class Plan:
    """A built engine: its file, and what became of the network in it."""

    file: FileEntry
    fusion: FusionReport


class Builder:
    """Builds plans with one of the two modules.

    Parameters
    ----------
    backend
        ``tensorrt-rtx`` or ``tensorrt``.
    capabilities
        Compute capabilities, such as ``8.6``, that the plans shall run on. TensorRT takes the GPU's own alone.
    options
        What may be asked of the builder.
    timing_cache
        Where TensorRT keeps what it measured, for builds to come; None to keep nothing. TensorRT-RTX measures nothing.

    Raises
    ------
    MissingDependencyError
        The backend's package is not installed.
    BackendError
        It needs a GPU, and there is none.
    InputError
        It cannot do what the options ask.

    """

    def __init__(
        self,
        backend: BackendName,
        capabilities: Sequence[str],
        options: Options | None = None,
        timing_cache: Path | None = None,
    ) -> None:
        self.backend = backend
        self.capabilities = tuple(capabilities)
        self._options = options or Options()
        self._timing_cache = timing_cache if backend == "tensorrt" else None
        self._module = load(backend)
        self._check_options()
        require_gpu(backend)

    @property
    def version(self) -> str:
        """The version of TensorRT: a plan loads in this one alone."""
        return str(self._module.__version__)

    def build(
        self,
        graph: Path,
        folder: Path,
        component: str,
        profiles: Sequence[Mapping[str, InputRange]],
        report: Callable[[str, float], object] = lambda _what, _fraction: None,
    ) -> Plan:
        """Build one engine, and write its plan into a folder.

        Parameters
        ----------
        graph
            The ONNX file.
        folder, component
            The plan becomes ``COMPONENT.plan`` in this folder.
        profiles
            Ranges of the inputs, one mapping for each optimisation profile.
        report
            Called from the caller's thread, ten times a second, with what is being done and the share that is done.
            Whatever it raises cancels the build, as Ctrl-C does.

        Raises
        ------
        BackendError
            TensorRT does not take the graph, with the node that it names, or cannot build the engine.

        """
        log = Log(self._module)
        monitor = Monitor(self._module)
        name = plan_name(component)
        with (folder / name).open("xb") as file:
            writer = _PlanWriter(self._module, file, monitor)

            def work() -> None:
                self._serialize(graph, profiles, log, monitor, writer)

            run_beside(work, monitor, lambda: report(monitor.phase, monitor.fraction))
        report("done", 1.0)
        return Plan(FileEntry(name, writer.size, writer.digest.hexdigest()), log.build.report())

    def _serialize(
        self,
        graph: Path,
        profiles: Sequence[Mapping[str, InputRange]],
        log: Log,
        monitor: Monitor,
        writer: _PlanWriter,
    ) -> None:
        trt = self._module
        builder = trt.Builder(log.logger)
        network = builder.create_network(_network_flags(trt))
        parser = trt.OnnxParser(network, log.logger)
        # By its path, so that the weights beside it are found and mapped, not read.
        if not parser.parse_from_file(os.fspath(graph)):
            raise BackendError(_parser_message(self.backend, graph, parser))
        _leave_out_features(network)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = monitor.monitor
        self._configure(config)
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        for ranges in profiles:
            profile = builder.create_optimization_profile()
            for tensor in inputs:
                if -1 in tensor.shape:
                    shapes = ranges[tensor.name]
                    profile.set_shape(tensor.name, shapes.min, shapes.opt, shapes.max)
            if config.add_optimization_profile(profile) < 0:
                raise BackendError(f"{self.backend} does not take a profile of {graph.name}: {dict(ranges)}")
        cache = self._read_timing_cache(config)
        built = builder.build_serialized_network_to_stream(network, config, writer.stream)
        if writer.failure is not None:
            raise writer.failure
        if not built or not writer.size:
            raise BackendError(f"{self.backend} cannot build an engine of {graph.name}: {log.cause}")
        self._write_timing_cache(cache)

    def _configure(self, config: Any) -> None:
        trt, options = self._module, self._options
        if self.backend == "tensorrt-rtx":
            config.num_compute_capabilities = len(self.capabilities)
            for index, capability in enumerate(self.capabilities):
                config.set_compute_capability(_enum_of(trt)[capability], index)
            # Without it the runtime may allocate while it is being captured into a CUDA graph.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        for wanted, flag in ((options.version_compatible, "VERSION_COMPATIBLE"), (options.refit, "REFIT")):
            if wanted:
                config.set_flag(getattr(trt.BuilderFlag, flag))

    def _check_options(self) -> None:
        options = self._options
        if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
            raise InputError(f"the optimization level is {options.optimization_level}: expected 0 to 5")
        if self.backend == "tensorrt-rtx" and options.hardware_compatible:
            raise InputError(
                "tensorrt-rtx builds for the targets that it is told: name several targets instead of asking for "
                "hardware compatibility"
            )
        if self.backend == "tensorrt-rtx" and options.version_compatible:
            raise InputError(
                "tensorrt-rtx has no engines that load in other versions: build again after an update, or use tensorrt"
            )
        if self.backend == "tensorrt-rtx" and options.refit and not nvidia_gpus():
            raise InputError(
                "tensorrt-rtx builds engines that can be refitted on a machine with an NVIDIA GPU alone, and this one "
                "shows none: build without refit"
            )

    def _read_timing_cache(self, config: Any) -> Any:
        if self._timing_cache is None:
            return None
        try:
            kept = self._timing_cache.read_bytes()
        except OSError:
            kept = b""
        cache = config.create_timing_cache(kept) or config.create_timing_cache(b"")
        # It is refused if it was measured on another GPU or version; then this build measures anew.
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        return cache

    def _write_timing_cache(self, cache: Any) -> None:
        if cache is None or self._timing_cache is None:
            return
        # Not being able to keep it costs time at the next build and nothing else.
        with suppress(OSError):
            self._timing_cache.parent.mkdir(parents=True, exist_ok=True)
            draft = self._timing_cache.with_suffix(f".{os.getpid()}")
            draft.write_bytes(memoryview(cache.serialize()))
            draft.replace(self._timing_cache)


def load(backend: BackendName) -> Any:
    """Import a backend's module.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    BackendError
        It is installed and does not load.

    """
    module, extra = MODULES[backend]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise MissingDependencyError(module, f"building engines for {backend}", extra) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"{module} is installed and does not load: {one_line(error)}: run pip install --force-reinstall "
            f"'sdrt[{extra}]'"
        ) from error


def require_gpu(backend: BackendName) -> None:
    """Raise `BackendError` if a backend builds on a GPU alone and there is none."""
    if backend == "tensorrt" and not nvidia_gpus():
        raise BackendError(
            "tensorrt builds engines on the GPU that will run them, and the CUDA driver shows none here: "
            "build on that machine, or with tensorrt-rtx, which needs no GPU"
        )


def supported_capabilities(backend: BackendName) -> tuple[str, ...]:
    """Tell for which compute capabilities a backend builds: RTX for those of its list, TensorRT for the GPU here.

    Raises
    ------
    MissingDependencyError, BackendError
        The backend is not installed; it needs a GPU and there is none.

    """
    if backend == "tensorrt":
        require_gpu(backend)
        return tuple(dict.fromkeys(gpu.compute_capability for gpu in nvidia_gpus()))
    return tuple(_enum_of(load(backend)))


def _enum_of(trt: Any) -> dict[str, Any]:
    members = trt.ComputeCapability.__members__
    return {capability: value for name, value in members.items() if (capability := capability_of_sm(name))}


def _network_flags(trt: Any) -> int:
    # TensorRT 11 knows strongly typed networks alone; before, it is a choice.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _leave_out_features(network: Any) -> None:
    """Let an engine give nothing for feature caching, which runs on no GPU so far."""
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for tensor in outputs:
        if tensor.name == DEEP_FEATURES:
            network.unmark_output(tensor)


class _PlanWriter:
    """Writes and hashes a plan as TensorRT hands it over, piece by piece, so that it is never held twice."""

    def __init__(self, trt: Any, file: BinaryIO, monitor: Monitor) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self.failure: BaseException | None = None
        outer = self

        class Stream(trt.IStreamWriter):  # type: ignore[misc]  # the module is known at run time alone
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                return outer.write(data, file, monitor)

        self.stream = Stream()

    def write(self, data: bytes, file: BinaryIO, monitor: Monitor) -> int:
        """Write one piece; 0 tells TensorRT that it failed, whose bindings swallow exceptions."""
        if self.failure is not None or monitor.cancelled.is_set():
            return 0
        monitor.phase = "writing"
        try:
            file.write(data)
        except BaseException as error:  # noqa: BLE001 - kept for the caller's thread
            self.failure = error
            return 0
        self.digest.update(data)
        self.size += len(data)
        return len(data)


def _parser_message(backend: str, graph: Path, parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return f"{backend} cannot read {graph.name}: it gives no reason"
    first = errors[0]
    # One node may be behind several errors; and often the text is no more than a condition that was false.
    nodes = list(dict.fromkeys(node for error in errors if (node := _node_of(error))))
    where = f" at {nodes[0]}" if _node_of(first) else ""
    kind = first.code().name.lower().replace("_", " ")
    others = ", ".join(nodes[1 : 1 + _NODES_SHOWN]) + (", ..." if len(nodes) > 1 + _NODES_SHOWN else "")
    also = f"; nor at {others}" if others else ""
    return f"{backend} does not take {graph.name}{where}: {kind}: {one_line(first.desc())}{also}"


def _node_of(error: Any) -> str | None:
    """Name the node of a parser's error; None where it is about the whole file."""
    operator = error.node_operator()
    return f"node {error.node_name() or error.node()} ({operator})" if operator else None
