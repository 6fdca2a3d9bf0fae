"""Triton's extensions for shared memory over HTTP: registering regions, whose names then stand for tensors' data."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from . import cuda_shared_memory
from .cuda_shared_memory import CudaRegion
from .http import INFERENCE, JSONAnswer, RefusalError, read_body
from .oip_schemas import CUDA_REGIONS, REGISTER, REGISTER_CUDA, SYSTEM_REGIONS
from .openapi import Operation
from .schema import conform, read_json
from .shared_memory import Region, SystemRegion

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from .schema import Schema
    from .shared_memory import Regions

R = TypeVar("R", bound=Region)


def operations(regions: Regions) -> list[Operation]:
    """Offer them."""
    return [
        *_operations(regions, "system", SystemRegion, system_facts, SYSTEM_REGIONS),
        _register(regions, "system", REGISTER, _register_system),
        *_operations(regions, "cuda", CudaRegion, cuda_facts, CUDA_REGIONS),
        _register(regions, "cuda", REGISTER_CUDA, _register_cuda),
    ]


def system_facts(region: SystemRegion) -> dict[str, Any]:
    """Describe a region."""
    return {"name": region.name, "key": region.key, "offset": region.offset, "byte_size": region.byte_size}


def cuda_facts(region: CudaRegion) -> dict[str, Any]:
    """Describe a region."""
    return {"name": region.name, "device_id": region.device_id, "byte_size": region.byte_size}


def _operations(
    regions: Regions, word: str, kind: type[R], facts: Callable[[R], dict[str, Any]], schema: Schema
) -> list[Operation]:
    async def status(request: Request) -> Response:
        return JSONAnswer([facts(region) for region in regions.status(request.path_params.get("region"), kind)])

    async def unregister(request: Request) -> Response:
        regions.unregister(request.path_params.get("region"), kind)
        return Response()

    path, name = f"{INFERENCE}/{word}sharedmemory", f"{word}SharedMemory"
    listed = {200: ("The regions.", {"application/json": schema})}
    done: dict[int, tuple[str, dict[str, Schema]]] = {200: ("It is done.", {})}
    return [
        Operation("GET", f"{path}/status", f"{name}Status", "List regions.", status, listed, errors=(403,)),
        Operation(
            "GET",
            f"{path}/region/{{region}}/status",
            f"{name}RegionStatus",
            "Find a region.",
            status,
            listed,
            errors=(403, 404),
        ),
        Operation(
            "POST", f"{path}/unregister", f"{name}UnregisterAll", "Forget all regions.", unregister, done, errors=(403,)
        ),
        Operation(
            "POST",
            f"{path}/region/{{region}}/unregister",
            f"{name}Unregister",
            "Forget a region.",
            unregister,
            done,
            errors=(403,),
        ),
    ]


def _register(
    regions: Regions, word: str, schema: Schema, make: Callable[[Regions, str, dict[str, Any]], Region]
) -> Operation:
    async def register(request: Request) -> Response:
        regions.check_allowed()
        given = conform(schema, read_json(await read_body(request)))
        make(regions, request.path_params["region"], given)
        return Response()

    return Operation(
        "POST",
        f"{INFERENCE}/{word}sharedmemory/region/{{region}}/register",
        f"{word}SharedMemoryRegister",
        "Register a region.",
        register,
        {200: ("It is done.", {})},
        body=schema,
        errors=(400, 403, 408, 413),
    )


def _register_system(regions: Regions, name: str, given: dict[str, Any]) -> Region:
    return regions.register(name, given["key"], given.get("offset", 0), given["byte_size"])


def _register_cuda(regions: Regions, name: str, given: dict[str, Any]) -> Region:
    try:
        handle = base64.b64decode(given["raw_handle"]["b64"], validate=True)
    except (binascii.Error, ValueError):
        raise RefusalError(400, "raw_handle is not base64: expected a CUDA IPC handle in it") from None
    size, device = given["byte_size"], given["device_id"]
    return cuda_shared_memory.register(regions, name, handle, device_id=device, byte_size=size)
