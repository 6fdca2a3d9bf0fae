"""A STAND-IN for TensorRT's Python module, over the stand-in for the driver. It runs no engine, and proves none.

It has the part of ``tensorrt_rtx`` that `sdrt.runtime.tensorrt` calls. A plan is a text that names a component; running
it computes a known function of numpy's in the stream's turn, from and to the addresses that were set. What TensorRT
would not forgive fails here too: an address or memory that is missing or too small, a shape out of the profile, a first
run within a capture. All of the activations' memory is overwritten at each run, as an engine may do.
"""

from __future__ import annotations

import dataclasses
import types
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sdrt.engines.manifest import (
    Backend,
    Component,
    FileEntry,
    InputRange,
    Latent,
    Manifest,
    Model,
    TensorSpec,
    Text,
    utc_now,
)
from sdrt.engines.profiles import profiles_of, tensors_of

from .driver_stand_in import network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .driver_stand_in import DriverStandIn

VERSION = "1.7.1.116"
WIDTH, TOKENS, LAYERS = 6, 7, 3
WORKSPACE = {"text_encoder": 1000, "unet": 3000, "vae_decoder": 9000}


def compute(component: str, inputs: Mapping[str, Any]) -> Any:
    """What each component gives: a function in which every input matters."""
    if component == "unet":
        return network(inputs["latents"], float(inputs["timestep"][0]), inputs["text_embeddings"])
    if component == "text_encoder":
        angles = inputs["input_ids"][..., None] * np.arange(1, WIDTH + 1) / 100 + int(inputs["clip_skip"][0])
        return np.sin(angles).astype(np.float32)
    return np.tanh(inputs["latents"][:, :3].repeat(8, axis=2).repeat(8, axis=3) / 3)


def manifest(
    sizes: Sequence[tuple[int, int]] = ((64, 64),),
    images: Sequence[int] = (1, 2),
    *,
    backend: str = "tensorrt-rtx",
    dynamic: bool = False,
) -> Manifest:
    """Of a bundle of engines, as `sdrt.engines.build` would write it; its plans are a few bytes."""
    from sdrt.engines.manifest import DimRange

    batch, height, width = DimRange("batch", 1, 32), DimRange("height", 1, 128), DimRange("width", 1, 128)
    picture = (batch, 3, DimRange("image_height", 8, 1024, 8), DimRange("image_width", 8, 1024, 8))
    latents = TensorSpec("latents", "float32", (batch, 4, height, width))
    embeddings = TensorSpec("text_embeddings", "float32", (batch, TOKENS, WIDTH))
    tensors: dict[str, tuple[tuple[TensorSpec, ...], TensorSpec]] = {
        "text_encoder": (
            (TensorSpec("input_ids", "int64", (batch, TOKENS)), TensorSpec("clip_skip", "int64", (1,))),
            embeddings,
        ),
        "unet": (
            (latents, TensorSpec("timestep", "float32", (1,)), embeddings),
            TensorSpec("prediction", "float32", latents.shape),
        ),
        "vae_decoder": ((latents,), TensorSpec("image", "float32", picture)),
    }
    components = []
    for name, (inputs, output) in tensors.items():
        file = FileEntry(f"{name}.plan", len(f"plan of {name}"), "0" * 64)
        whole = Component(name, "fp16", (file,), inputs, (output,), None)
        profiles = profiles_of(whole, sizes, images, 8, dynamic=dynamic)
        narrow_inputs, narrow_outputs = tensors_of(whole, profiles)
        components.append(
            dataclasses.replace(whole, inputs=narrow_inputs, outputs=narrow_outputs, profiles=tuple(profiles))
        )
    return Manifest(
        name="v1-1-rtx-sm86",
        kind="engine",
        precision="fp16",
        created=utc_now(),
        command="sdrt build",
        sdrt_version="0.1.0",
        model=Model("sd-v1", "v1-1", "diffusers", ema=False),
        backend=Backend(backend, VERSION, compute_capabilities=("8.6",), platform="linux_x86_64"),
        latent=Latent(sample_size=8),
        text=Text(embedding_width=WIDTH, layers=LAYERS, max_tokens=TOKENS),
        scheduler={
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
        },
        components=tuple(components),
        tokenizer=FileEntry("tokenizer.json", 2, "0" * 64),
        tools={},
    )


def write_plan(folder: Path, component: Component) -> Path:
    plan = folder / component.graph.path
    plan.write_text(f"plan of {component.name}")
    return plan


class TensorLocation(IntEnum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class CudaGraphStrategy(IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, level: int, message: str) -> None:
        raise NotImplementedError


class TensorRTStandIn(types.ModuleType):
    """Stands in for the module.

    Attributes
    ----------
    capturable
        What `is_stream_capturable` says.
    on_host
        Tensors that the host reads.
    fails
        What an engine's next run, or a plan's loading, shall write into the log before it fails.
    environment
        What a runtime cache has to come from.

    """

    TensorLocation, ExecutionContextAllocationStrategy = TensorLocation, ExecutionContextAllocationStrategy
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
    CudaGraphStrategy = CudaGraphStrategy

    def __init__(self, driver: DriverStandIn, manifest: Manifest) -> None:
        super().__init__("tensorrt_rtx")
        self.__version__, self.ILogger = VERSION, ILogger
        self.driver, self.manifest = driver, manifest
        self.capturable = True
        self.on_host: set[str] = set()
        self.fails: str | None = None
        self.environment = b"this GPU"
        self.contexts: list[Context] = []
        self.compiled: list[str] = []

    def Runtime(self, logger: ILogger) -> Runtime:  # noqa: N802 - TensorRT's name
        return Runtime(self, logger)


class Runtime:
    def __init__(self, trt: TensorRTStandIn, logger: ILogger) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        if self.trt.fails is not None:
            self.logger.log(ILogger.ERROR, self.trt.fails)
            self.trt.fails = None
            return None
        name = bytes(plan).decode().removeprefix("plan of ")
        (component,) = (part for part in self.trt.manifest.components if part.name == name)
        return Engine(self.trt, self.logger, component)


class Engine:
    def __init__(self, trt: TensorRTStandIn, logger: ILogger, component: Component) -> None:
        self.trt, self.logger, self.component = trt, logger, component
        self.specs = (*component.inputs, *component.outputs)

    @property
    def num_io_tensors(self) -> int:
        return len(self.specs)

    def get_tensor_name(self, index: int) -> str:
        return self.specs[index].name

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.trt.on_host else TensorLocation.DEVICE

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        assert 0 <= profile_index < len(self.component.profiles)
        return WORKSPACE[self.component.name]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.trt)

    def create_execution_context(self, *, runtime_config: RuntimeConfig) -> Context:
        assert runtime_config.allocation == ExecutionContextAllocationStrategy.USER_MANAGED
        context = Context(self, runtime_config)
        self.trt.contexts.append(context)
        return context


class RuntimeConfig:
    def __init__(self, trt: TensorRTStandIn) -> None:
        self.trt = trt
        self.allocation = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.trt)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    def __init__(self, trt: TensorRTStandIn) -> None:
        self.trt = trt
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        environment, _, kernels = blob.partition(b":")
        if environment != self.trt.environment:
            return False
        self.kernels = set(kernels.decode().split())
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.trt.environment + b":" + " ".join(sorted(self.kernels)).encode())


class Context:
    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        self.engine, self.config = engine, config
        self.profile: Mapping[str, InputRange] = engine.component.profiles[0]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.warm = False
        self.log: list[str] = []

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self.engine.trt.driver.live["stream"]
        self.profile = self.engine.component.profiles[index]
        self.log.append(f"profile {index}")
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        ranges = self.profile[name]
        fits = all(low <= size <= high for low, size, high in zip(ranges.min, shape, ranges.max, strict=True))
        if not fits:
            self.engine.logger.log(ILogger.ERROR, "a shape does not fit the profile")
        self.shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self.addresses[name] = address
        self.log.append(f"address {name}")
        return True

    def infer_shapes(self) -> list[str]:
        return [spec.name for spec in self.engine.component.inputs if spec.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        first = self.shapes[self.engine.component.inputs[0].name]
        if name == "prediction":
            return first
        if name == "image":
            return (first[0], 3, 8 * first[2], 8 * first[3])
        return (*first, WIDTH)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= WORKSPACE[self.engine.component.name]
        self.engine.trt.driver.view(memory, size)
        self.memory = memory, size
        self.log.append("memory")

    def is_stream_capturable(self, _stream: int) -> bool:
        return self.engine.trt.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        trt = self.engine.trt
        if trt.fails is not None:
            self.engine.logger.log(ILogger.ERROR, trt.fails)
            trt.fails = None
            return False
        if not self.warm:
            trt.driver.break_capture(stream_handle)  # it compiles, which no capture allows
            assert self.config.cache is not None or self.engine.trt.manifest.backend.name == "tensorrt"
            if self.config.cache is not None:
                kernel = f"{self.engine.component.name}-{'x'.join(map(str, next(iter(self.shapes.values()))))}"
                if kernel not in self.config.cache.kernels:
                    trt.compiled.append(kernel)
                    self.config.cache.kernels.add(kernel)
            self.warm = True
        component, addresses, memory = self.engine.component, dict(self.addresses), self.memory
        inputs = {spec.name: self._array(spec, addresses) for spec in component.inputs}
        # What the host reads is read now, and not in the stream's turn.
        inputs |= {name: inputs[name].copy() for name in trt.on_host & inputs.keys()}
        output = self._array(component.outputs[0], addresses)

        def run() -> None:
            trt.driver.view(*memory)[...] = 0xFF
            output[...] = compute(component.name, inputs)

        trt.driver.enqueue(stream_handle, run)
        return True

    def _array(self, spec: TensorSpec, addresses: Mapping[str, int]) -> Any:
        shape = self.get_tensor_shape(spec.name)
        nbytes = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
        return self.engine.trt.driver.view(addresses[spec.name], nbytes).view(spec.dtype).reshape(shape)


class NumpySession:
    """The same functions as a session of the host's."""

    def __init__(self, component: Component) -> None:
        self.component = component

    def bind(self, shapes: Mapping[str, tuple[int, ...]], *, in_pairs: bool = False) -> NumpyBinding:  # noqa: ARG002
        return NumpyBinding(self.component, shapes)

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class NumpyBinding:
    def __init__(self, component: Component, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.component = component
        self.inputs: Mapping[str, Any] = {
            spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in component.inputs
        }
        self.outputs: Mapping[str, Any] = {
            spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in component.outputs
        }

    def run(self) -> None:
        self.outputs[self.component.outputs[0].name][...] = compute(self.component.name, self.inputs)

    def trim(self) -> None:
        pass
