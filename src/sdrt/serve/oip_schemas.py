"""What the served OpenAPI document says about the Open Inference Protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .oip_model import INPUTS, OUTPUTS

if TYPE_CHECKING:
    from .schema import Schema

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NAMES: Schema = {"type": "array", "items": _TEXT}
_SIZES: Schema = {"type": "array", "items": {"type": "integer"}}
_PARAMETERS: Schema = {
    "type": "object",
    "additionalProperties": {"type": ["boolean", "number", "string"]},
    "description": "Of Triton's: binary_data_output says whether outputs follow the JSON in binary.",
}
_SHARED = {
    "shared_memory_region": {"type": "string", "description": "Registered before; --allow-shared-memory has to be on."},
    "shared_memory_offset": _COUNT,
    "shared_memory_byte_size": _COUNT,
}
_INPUT: Schema = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {
            "type": "string",
            "enum": [each.name for each in INPUTS],
            "description": " ".join(f"{each.name}: {each.meaning}" for each in INPUTS),
        },
        "datatype": {"type": "string", "enum": sorted({each.datatype for each in INPUTS} | {"UINT64"})},
        "shape": {"type": "array", "items": _COUNT, "minItems": 1, "maxItems": 1},
        "parameters": {
            "type": "object",
            "properties": {
                **_SHARED,
                "binary_data_size": {**_COUNT, "description": "Of this input's share of what follows the JSON."},
            },
        },
        "data": {"type": "array", "items": {"type": ["number", "string", "array"]}, "description": "Nested or not."},
    },
}
_OUTPUT: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "enum": [each.name for each in OUTPUTS]},
        "parameters": {"type": "object", "properties": {**_SHARED, "binary_data": {"type": "boolean"}}},
    },
}
INFER: Schema = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string", "description": "Given back in the answer."},
        "parameters": _PARAMETERS,
        "inputs": {"type": "array", "items": _INPUT, "minItems": 1},
        "outputs": {"type": "array", "items": _OUTPUT},
    },
}
_ANSWERED: Schema = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": _TEXT,
        "datatype": _TEXT,
        "shape": _SIZES,
        "parameters": {"type": "object", "properties": {"binary_data_size": _COUNT}},
        "data": {"type": "array", "items": {"type": "integer"}},
    },
}
INFERENCES: Schema = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "id": _TEXT,
        "model_name": _TEXT,
        "model_version": _TEXT,
        "outputs": {"type": "array", "items": _ANSWERED},
    },
}
SERVER: Schema = {
    "type": "object",
    "required": ["name", "version", "extensions"],
    "properties": {"name": _TEXT, "version": _TEXT, "extensions": _NAMES},
}
_TENSORS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {"name": _TEXT, "datatype": _TEXT, "shape": _SIZES},
    },
}
MODEL: Schema = {
    "type": "object",
    "required": ["name", "versions", "platform", "inputs", "outputs"],
    "properties": {"name": _TEXT, "versions": _NAMES, "platform": _TEXT, "inputs": _TENSORS, "outputs": _TENSORS},
}
CONFIGURATION: Schema = {
    "type": "object",
    "required": ["name", "platform", "max_batch_size", "input", "output"],
    "description": "As Triton's ModelConfig in JSON.",
}
STATISTICS: Schema = {
    "type": "object",
    "required": ["model_stats"],
    "properties": {
        "model_stats": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "version", "last_inference", "inference_count", "execution_count"],
                "properties": {
                    "name": _TEXT,
                    "version": _TEXT,
                    "last_inference": {**_COUNT, "description": "Milliseconds since 1970."},
                    "inference_count": _COUNT,
                    "execution_count": _COUNT,
                    "inference_stats": {
                        "type": "object",
                        "additionalProperties": {"type": "object", "properties": {"count": _COUNT, "ns": _COUNT}},
                    },
                },
            },
        }
    },
}
READY_ONLY: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"ready": {"type": "boolean", "description": "List only models that are ready."}},
}
INDEX: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "version"],
        "properties": {"name": _TEXT, "version": _TEXT, "state": _TEXT, "reason": _TEXT},
    },
}
_SIZE: Schema = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
REGISTER: Schema = {
    "type": "object",
    "required": ["key", "byte_size"],
    "additionalProperties": False,
    "properties": {
        "key": {"type": "string", "maxLength": 256, "description": "Of a POSIX shared memory object, such as /pixels."},
        "offset": _SIZE,
        "byte_size": _SIZE,
    },
}
REGISTER_CUDA: Schema = {
    "type": "object",
    "required": ["raw_handle", "device_id", "byte_size"],
    "additionalProperties": False,
    "properties": {
        "raw_handle": {
            "type": "object",
            "required": ["b64"],
            "additionalProperties": False,
            "properties": {"b64": {"type": "string", "maxLength": 256}},
        },
        "device_id": _SIZE,
        "byte_size": _SIZE,
    },
}
SYSTEM_REGIONS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "key", "offset", "byte_size"],
        "properties": {"name": _TEXT, "key": _TEXT, "offset": _COUNT, "byte_size": _COUNT},
    },
}
CUDA_REGIONS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "device_id", "byte_size"],
        "properties": {"name": _TEXT, "device_id": _COUNT, "byte_size": _COUNT},
    },
}
