"""The calls of the gRPC service that take one message and give one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import ParseDict

from ..errors import SdrtError
from . import cuda_shared_memory
from .cuda_shared_memory import CudaRegion
from .grpc_inference import read_inference, write_inference
from .grpc_messages import message_class
from .oip_infer import MODELS_ARE_FIXED
from .oip_memory import cuda_facts, system_facts
from .oip_model import configuration, metadata
from .shared_memory import SystemRegion

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.protobuf.message import Message

    from .oip_infer import Inference
    from .shared_memory import Regions

    Call = Callable[[Any], Awaitable[Message]]


class UnsupportedError(SdrtError):
    """A call that the protocol has, and that is not answered here."""


def calls(inference: Inference) -> dict[str, Call]:
    """Give the calls by their names; each raises what is to be told its client."""
    return {**_describing(inference), **_repository(inference), **_memory(inference.service.regions)}


def _filled(name: str, fields: dict[str, Any]) -> Message:
    """Make a message of what HTTP answers with; a message has no place for some of it."""
    message: Message = ParseDict(fields, message_class(name)(), ignore_unknown_fields=True)
    return message


def _describing(inference: Inference) -> dict[str, Call]:
    async def server_live(_: Any) -> Message:
        return _filled("ServerLiveResponse", {"live": True})

    async def server_ready(_: Any) -> Message:
        return _filled("ServerReadyResponse", {"ready": inference.ready})

    async def model_ready(request: Any) -> Message:
        return _filled("ModelReadyResponse", {"ready": inference.is_ready(request.name, request.version)})

    async def server_metadata(_: Any) -> Message:
        return _filled("ServerMetadataResponse", inference.server_metadata())

    async def model_metadata(request: Any) -> Message:
        return _filled("ModelMetadataResponse", metadata(inference.model(request.name, request.version)))

    async def model_config(request: Any) -> Message:
        config = configuration(inference.model(request.name, request.version))
        return _filled("ModelConfigResponse", {"config": config})

    async def model_statistics(request: Any) -> Message:
        return _filled("ModelStatisticsResponse", inference.statistics(request.name, request.version))

    async def model_infer(request: Any) -> Message:
        asked = read_inference(request, inference.service.regions)
        return write_inference(asked, await inference.infer(asked))

    return {
        "ServerLive": server_live,
        "ServerReady": server_ready,
        "ModelReady": model_ready,
        "ServerMetadata": server_metadata,
        "ModelMetadata": model_metadata,
        "ModelConfig": model_config,
        "ModelStatistics": model_statistics,
        "ModelInfer": model_infer,
    }


def _repository(inference: Inference) -> dict[str, Call]:
    async def index(request: Any) -> Message:
        if request.repository_name:
            raise UnsupportedError("there are no repositories: leave repository_name out")
        return _filled("RepositoryIndexResponse", {"models": inference.index(ready_only=request.ready)})

    async def refuse(_: Any) -> Message:
        raise UnsupportedError(MODELS_ARE_FIXED)

    return {"RepositoryIndex": index, "RepositoryModelLoad": refuse, "RepositoryModelUnload": refuse}


def _memory(regions: Regions) -> dict[str, Call]:
    async def system_status(request: Any) -> Message:
        found = regions.status(request.name or None, SystemRegion)
        return _filled(
            "SystemSharedMemoryStatusResponse", {"regions": {region.name: system_facts(region) for region in found}}
        )

    async def system_register(request: Any) -> Message:
        regions.register(request.name, request.key, request.offset, request.byte_size)
        return _filled("SystemSharedMemoryRegisterResponse", {})

    async def system_unregister(request: Any) -> Message:
        regions.unregister(request.name or None, SystemRegion)
        return _filled("SystemSharedMemoryUnregisterResponse", {})

    async def cuda_status(request: Any) -> Message:
        found = regions.status(request.name or None, CudaRegion)
        return _filled(
            "CudaSharedMemoryStatusResponse", {"regions": {region.name: cuda_facts(region) for region in found}}
        )

    async def cuda_register(request: Any) -> Message:
        size, device = request.byte_size, request.device_id
        cuda_shared_memory.register(regions, request.name, request.raw_handle, device_id=device, byte_size=size)
        return _filled("CudaSharedMemoryRegisterResponse", {})

    async def cuda_unregister(request: Any) -> Message:
        regions.unregister(request.name or None, CudaRegion)
        return _filled("CudaSharedMemoryUnregisterResponse", {})

    return {
        "SystemSharedMemoryStatus": system_status,
        "SystemSharedMemoryRegister": system_register,
        "SystemSharedMemoryUnregister": system_unregister,
        "CudaSharedMemoryStatus": cuda_status,
        "CudaSharedMemoryRegister": cuda_register,
        "CudaSharedMemoryUnregister": cuda_unregister,
    }
