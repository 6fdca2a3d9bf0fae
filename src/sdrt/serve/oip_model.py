"""A model as clients of the Open Inference Protocol see it: its tensors, their meaning, and its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .fields import MOST_IMAGES, PROMPT, SETTINGS, make_requests
from .http import RefusalError
from .oip_tensors import ANY, TensorMetadata
from .schema import conform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runtime.request import Request
    from .models import Model
    from .oip_tensors import InputTensor
    from .schema import Schema
    from .service import Service

PLATFORM = "sdrt"
VERSION = "1"
"""Of every model: a bundle never changes."""
_SIDE: Schema = {"type": "integer", "minimum": 8, "maximum": 9999}


@dataclass(frozen=True)
class Input(TensorMetadata):
    """A tensor that every model takes.

    Attributes
    ----------
    setting
        Its name among those of `fields`.
    schema
        Of one element, or of all as an array.
    meaning
        For people.

    """

    setting: str = ""
    schema: Schema = field(default_factory=dict)
    meaning: str = ""


def _setting(name: str, datatype: str, setting: str, shape: tuple[int, ...] = (1,)) -> Input:
    schema = SETTINGS[setting]
    return Input(name, datatype, shape, optional=True, setting=setting, schema=schema, meaning=schema["description"])


def _side(name: str) -> Input:
    meaning = "In pixels, a multiple of 8; by default what the model was trained on."
    return Input(name, "INT32", (1,), optional=True, setting=name, schema=_SIDE, meaning=meaning)


_PROMPT = Input("prompt", "BYTES", (ANY,), setting="prompt", schema=PROMPT, meaning="One for each picture.")
_NEGATIVE = _setting("negative_prompt", "BYTES", "negative_prompt", (ANY,))
_SEED = _setting("seed", "INT64", "seed", (ANY,))
INPUTS = (
    _PROMPT,
    _NEGATIVE,
    _setting("steps", "INT32", "num_inference_steps"),
    _setting("guidance_scale", "FP32", "guidance_scale"),
    _SEED,
    _side("width"),
    _side("height"),
    _setting("sampler", "BYTES", "sampler"),
    _setting("eta", "FP32", "eta"),
    _setting("timestep_spacing", "BYTES", "timestep_spacing"),
    _setting("clip_skip", "INT32", "clip_skip"),
    _setting("guidance_interval", "FP32", "guidance_interval", (2,)),
    _setting("cache_interval", "INT32", "cache_interval"),
    _setting("encoder_interval", "INT32", "encoder_interval"),
)
IMAGE = TensorMetadata("image", "UINT8", (ANY, ANY, ANY, 3))
SEED = TensorMetadata("seed", "INT64", (ANY,))
OUTPUTS = (IMAGE, SEED)
_BY_NAME = {each.name: each for each in INPUTS}


def metadata(model: Model) -> dict[str, Any]:
    """Describe a model, as the protocol has it."""
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [_metadata(each) for each in INPUTS],
        "outputs": [_metadata(each) for each in OUTPUTS],
    }


def _metadata(tensor: TensorMetadata) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def configuration(model: Model) -> dict[str, Any]:
    """Describe a model as Triton's configuration of it would; the parameters say what the inputs mean."""
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "runtime": "",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [
            {**_configured(each), "format": "FORMAT_NONE", "allow_ragged_batch": False, "optional": each.optional}
            for each in INPUTS
        ],
        "output": [{**_configured(each), "label_filename": ""} for each in OUTPUTS],
        "batch_input": [],
        "batch_output": [],
        "instance_group": [{"name": model.name, "kind": "KIND_MODEL", "count": 1}],
        "default_model_filename": "",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {each.name: {"string_value": each.meaning} for each in INPUTS},
        "model_warmup": [],
    }


def _configured(tensor: TensorMetadata) -> dict[str, Any]:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    return {
        "name": tensor.name,
        "data_type": f"TYPE_{kind}",
        "dims": list(tensor.shape),
        "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }


def make_all(service: Service, model: Model, tensors: Sequence[InputTensor]) -> list[Request]:
    """Make one request for each prompt.

    Raises
    ------
    RefusalError, SchemaError, InputError
        A tensor is missing, unknown or twice there, or holds what makes no sense for this model.

    """
    given: dict[str, list[Any]] = {}
    for tensor in tensors:
        if (expected := _BY_NAME.get(tensor.name)) is None:
            raise RefusalError(400, f"unknown input {tensor.name[:100]!r}: expected {', '.join(_BY_NAME)}")
        if tensor.name in given:
            raise RefusalError(400, f"input {tensor.name!r} is given twice: give it once", param=tensor.name)
        given[tensor.name] = _checked(expected, tensor)
    if (prompts := given.pop(_PROMPT.name, None)) is None:
        raise RefusalError(400, f"input {_PROMPT.name!r} is missing: expected BYTES, one for each picture")
    if not 1 <= len(prompts) <= MOST_IMAGES:
        raise RefusalError(400, f"there are {len(prompts)} prompts: expected 1 to {MOST_IMAGES}", param=_PROMPT.name)
    negatives = _for_each(_NEGATIVE, given, len(prompts))
    seeds = _for_each(_SEED, given, len(prompts))
    fields: dict[str, Any] = {
        _BY_NAME[name].setting: values if "items" in _BY_NAME[name].schema else values[0]
        for name, values in given.items()
    }
    service.check_size(model, fields.get("width", model.side), fields.get("height", model.side))
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        one = {**fields, "prompt": prompt}
        if negatives:
            one["negative_prompt"] = negatives[number % len(negatives)]
        if number < len(seeds):
            one["seed"] = seeds[number]
        elif number:
            one["seed"] = requests[0].seeds[0] + number
        requests += make_requests(model, one, 1)
    return requests


def _checked(expected: Input, tensor: InputTensor) -> list[Any]:
    """Give a tensor's elements, each of them what its field may be."""
    values = tensor.values(expected, also="UINT64" if expected is _SEED else None)
    if "items" in expected.schema:
        checked: list[Any] = conform(expected.schema, values, expected.name)
        return checked
    return [conform(expected.schema, value, expected.name) for value in values]


def _for_each(tensor: Input, given: dict[str, list[Any]], count: int) -> list[Any]:
    """Take out what may be one for all pictures or one for each; nothing where it was left out."""
    if tensor.name not in given:
        return []
    values = given.pop(tensor.name)
    if len(values) not in {1, count}:
        raise RefusalError(
            400,
            f"input {tensor.name!r} has {len(values)} elements and there are {count} prompts: expected 1 or {count}",
            param=tensor.name,
        )
    return values
