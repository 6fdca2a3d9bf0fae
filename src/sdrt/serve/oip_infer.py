"""What HTTP and gRPC have in common of the Open Inference Protocol: from a client's tensors to those of the answer."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._version import __version__
from .http import RefusalError
from .oip_model import IMAGE, OUTPUTS, PLATFORM, SEED, VERSION, make_all
from .scheduler import Picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .models import Model
    from .oip_tensors import InputTensor, SharedPart, TensorMetadata
    from .service import Service

_NS = 1e9
_PHASES = {"queue": "queue", "compute_input": "prepare", "compute_infer": "denoise", "compute_output": "decode"}
_RESERVED = "triton_"
_PARAMETERS = (bool, int, float, str)

MODELS_ARE_FIXED = "models are neither loaded nor unloaded while the server runs: name them with --bundle at its start"


@dataclass(frozen=True)
class RequestedOutput:
    """A tensor that a client wants.

    Attributes
    ----------
    name
        Its name.
    binary
        Whether it is to follow the JSON, over HTTP.
    target
        Where in shared memory it is to be written, or None.

    """

    name: str
    binary: bool = False
    target: SharedPart | None = None


@dataclass(frozen=True)
class InferenceRequest:
    """What a client asks for, its tensors not looked at yet.

    Attributes
    ----------
    model, version
        Which one; the version may be empty.
    id
        Given back in the answer, unless it is empty.
    inputs
        The tensors.
    outputs
        Those that are wanted.

    """

    model: str
    version: str
    id: str
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the answer.

    Attributes
    ----------
    metadata
        Its name and datatype.
    array
        Its elements.
    requested
        How they are wanted; nothing of them goes into the answer if they were written to shared memory.

    """

    metadata: TensorMetadata
    array: NDArray[Any]
    requested: RequestedOutput

    @property
    def in_answer(self) -> bool:
        """Whether the answer carries the elements."""
        return self.requested.target is None


class Inference:
    """Answers what the protocol has calls for.

    Parameters
    ----------
    service
        What makes the pictures.

    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._counts = {model.name: _Counts() for model in service.models}

    @property
    def ready(self) -> bool:
        """Whether pictures are made."""
        return self.service.state == "ready"

    def server_metadata(self) -> dict[str, Any]:
        """Describe the server."""
        extensions = ["binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"]
        if self.service.regions.allowed:
            extensions.append("system_shared_memory")
        return {"name": PLATFORM, "version": __version__, "extensions": extensions}

    def model(self, name: str, version: str) -> Model:
        """Find a model by name and version; the latter may be empty.

        Raises
        ------
        RefusalError
            There is none such.

        """
        model = self.service.model(name)
        if version not in {"", VERSION}:
            raise RefusalError(404, f"model {name!r} has no version {version[:100]!r}: expected {VERSION}, or none")
        return model

    def is_ready(self, name: str, version: str) -> bool:
        """Tell whether there is such a model and pictures are made."""
        try:
            self.model(name, version)
        except RefusalError:
            return False
        return self.ready

    def index(self, *, ready_only: bool) -> list[dict[str, str]]:
        """List the models, as the model repository extension has it."""
        if ready_only and not self.ready:
            return []
        state = {} if self.service.state == "loading" else {"state": "READY"}
        return [{"name": model.name, "version": VERSION, **state} for model in self.service.models]

    def statistics(self, name: str, version: str) -> dict[str, Any]:
        """Give figures of one model, or of all if `name` is empty, as the statistics extension has it.

        Success and failure count requests of this protocol, the phases pictures of all.
        """
        models = self.service.models if not name else [self.model(name, version)]
        return {"model_stats": [self._statistics(model) for model in models]}

    def _statistics(self, model: Model) -> dict[str, Any]:
        counts = self._counts[model.name]
        figures = self.service.metrics.phase_totals(model.name)
        pictures = figures.get("decode", (0, 0.0))[0]
        nothing = {"count": 0, "ns": 0}
        return {
            "name": model.name,
            "version": VERSION,
            "last_inference": counts.last_ms,
            "inference_count": pictures,
            "execution_count": pictures,
            "inference_stats": {
                "success": _duration(*counts.success),
                "fail": _duration(*counts.fail),
                **{name: _duration(*figures.get(phase, (0, 0.0))) for name, phase in _PHASES.items()},
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }

    async def infer(self, request: InferenceRequest) -> list[OutputTensor]:
        """Make pictures and give the tensors that are wanted of them, in the model's order.

        What goes to shared memory is there when this returns. Cancelling it ends the work.

        Raises
        ------
        RefusalError, SchemaError, SdrtError
            The request makes no sense, or it cannot be answered now.

        """
        model = self.model(request.model, request.version)
        began = time.perf_counter()
        counts = self._counts[model.name]
        try:
            answer = await self._infer(model, request)
        except Exception:
            counts.fail = _add(counts.fail, began)
            raise
        counts.success = _add(counts.success, began)
        counts.last_ms = int(time.time() * 1000)
        return answer

    async def _infer(self, model: Model, request: InferenceRequest) -> list[OutputTensor]:
        wanted = _wanted(request.outputs)
        service = self.service
        service.check_ready()
        service.scheduler.check_room(1)
        # Tables of a thousand steps take milliseconds that others need not wait for.
        requests = await asyncio.to_thread(make_all, service, model, request.inputs)
        pictures = [Picture(model, each) for each in requests]
        _check_targets(wanted, len(requests), requests[0].height, requests[0].width)
        service.scheduler.submit(pictures)
        try:
            images = await asyncio.gather(*(asyncio.wrap_future(picture.done) for picture in pictures))
        finally:
            for picture in pictures:
                picture.done.cancel()
        seeds = np.array([each.seeds[0] & (1 << 64) - 1 for each in requests], np.uint64).view(np.int64)
        arrays = {IMAGE: np.stack([np.asarray(image) for image in images]), SEED: seeds}
        answer = [
            OutputTensor(tensor, arrays[tensor], wanted[tensor.name]) for tensor in OUTPUTS if tensor.name in wanted
        ]
        for tensor in answer:
            if tensor.requested.target is not None:
                await asyncio.to_thread(tensor.requested.target.write, tensor.array.data.cast("B"))
        return answer


class _Counts:
    """Of one model: how many requests, and seconds spent on them."""

    def __init__(self) -> None:
        self.success = (0, 0.0)
        self.fail = (0, 0.0)
        self.last_ms = 0


def _add(total: tuple[int, float], began: float) -> tuple[int, float]:
    return total[0] + 1, total[1] + time.perf_counter() - began


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * _NS)}


def _wanted(outputs: Sequence[RequestedOutput]) -> dict[str, RequestedOutput]:
    """Give the outputs by name."""
    known = [each.name for each in OUTPUTS]
    for output in outputs:
        if output.name not in known:
            raise RefusalError(400, f"unknown output {output.name[:100]!r}: expected {' or '.join(known)}")
    return {each.name: each for each in outputs}


def all_outputs(*, binary: bool = False) -> list[RequestedOutput]:
    """Give what a request wants that names no outputs."""
    return [RequestedOutput(each.name, binary) for each in OUTPUTS]


def _check_targets(wanted: dict[str, RequestedOutput], count: int, height: int, width: int) -> None:
    """Refuse shared memory that is too small before any work is done for it."""
    sizes = {IMAGE.name: count * height * width * 3, SEED.name: count * np.dtype(np.int64).itemsize}
    for name, output in wanted.items():
        if output.target is not None and output.target.byte_size < sizes[name]:
            raise RefusalError(
                400,
                f"output {name!r} takes {sizes[name]} bytes and there are {output.target.byte_size} of shared memory: "
                "expected shared_memory_byte_size to be as large",
            )


def check_parameters(parameters: dict[str, Any]) -> None:
    """Refuse parameters of a request that no server would understand; the others are left alone.

    Raises
    ------
    RefusalError
        One is neither truth value, number nor string, or has a name that is reserved.

    """
    for name, value in parameters.items():
        if not isinstance(value, _PARAMETERS):
            raise RefusalError(
                400, f"parameter {name[:100]!r} is of a wrong type: expected a boolean, number or string"
            )
        if name.startswith(_RESERVED):
            raise RefusalError(400, f"parameter {name[:100]!r} is reserved: names must not begin with {_RESERVED}")
