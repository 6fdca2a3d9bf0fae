"""``bundle.json`` to a :class:`~.manifest.Manifest`, trusting nothing of what it reads.

The file comes from disk, perhaps from a stranger: it ends in a whole manifest or in one error that names the field.
Fields that are not known are ignored, so that a later sdrt may add some without a new schema version.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any, Never, TypeVar, get_args

from ..errors import BundleCorruptError
from .handover import check_handover
from .manifest import (
    COMPONENT_NAMES,
    DECODER_HEAD,
    DECODER_STAGE,
    REQUIRED_COMPONENTS,
    SCHEMA_VERSION,
    Backend,
    Component,
    Dim,
    DimRange,
    FileEntry,
    InputRange,
    Kind,
    Latent,
    Manifest,
    Metric,
    Model,
    Parity,
    Precision,
    Scalar,
    TensorSpec,
    Text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
DTYPES = ("bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CAPABILITY = re.compile(r"[0-9]{1,3}\.[0-9]{1,2}")
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{6})?Z")
_STAGE = re.compile(DECODER_STAGE.format("[1-9][0-9]?"))
_LARGEST = 2**63 - 1


def parse_manifest(text: str | bytes) -> Manifest:
    """Read the text of ``bundle.json``.

    Parameters
    ----------
    text
        The content of the file; bytes are UTF-8.

    Raises
    ------
    BundleCorruptError
        The text is no JSON, its schema version is not the one that this sdrt knows, or a field is missing, of the wrong
        type or out of its range. The message names the field.

    """
    try:
        document = json.loads(
            text.decode() if isinstance(text, bytes) else text, object_pairs_hook=_object, parse_constant=_constant
        )
    except RecursionError:
        raise BundleCorruptError("bundle.json is nested too deeply to be a manifest") from None
    except ValueError as error:
        raise BundleCorruptError(f"bundle.json is not valid JSON: {error}") from None
    root = _Node(document, "")
    version = root["schema_version"].integer(minimum=1)
    if version != SCHEMA_VERSION:
        raise BundleCorruptError(
            f"bundle.json: schema_version is {version}, expected {SCHEMA_VERSION}: "
            + ("update sdrt" if version > SCHEMA_VERSION else "build the bundle again")
        )
    return _manifest(root)


class _Node:
    """A JSON value that knows where in the file it stands, so that whatever is wrong with it can be named."""

    def __init__(self, value: Any, where: str) -> None:
        self.value = value
        self.where = where

    def fail(self, expected: str) -> Never:
        if isinstance(self.value, dict | list):
            found = "an object" if isinstance(self.value, dict) else "a list"
        else:
            found = _short(self.value)
        raise BundleCorruptError(f"bundle.json: {self.where or 'the whole'} is {found}, expected {expected}")

    def __getitem__(self, key: str) -> _Node:
        if not isinstance(self.value, dict):
            self.fail("an object")
        where = f"{self.where}.{key}" if self.where else key
        if key not in self.value:
            raise BundleCorruptError(f"bundle.json: {where} is missing")
        return _Node(self.value[key], where)

    def lenient(self, key: str, read: Callable[[_Node], tuple[T, ...]]) -> tuple[T, ...]:
        """Read a list that only engines need, and that an ONNX bundle may leave out."""
        return read(self[key]) if not isinstance(self.value, dict) or key in self.value else ()

    def mapping(self, read: Callable[[_Node], T]) -> dict[str, T]:
        if not isinstance(self.value, dict):
            self.fail("an object")
        for key in self.value:
            _Node(key, f"a key of {self.where}").matching(NAME, "letters, digits, '.', '_' and '-'")
        return {key: read(_Node(item, f"{self.where}.{key}")) for key, item in self.value.items()}

    def tuple_of(self, read: Callable[[_Node], T], *, at_least: int = 0) -> tuple[T, ...]:
        if not isinstance(self.value, list) or len(self.value) < at_least:
            self.fail(f"a list of at least {at_least}" if at_least else "a list")
        return tuple(read(_Node(item, f"{self.where}[{index}]")) for index, item in enumerate(self.value))

    def optional(self, read: Callable[[_Node], T]) -> T | None:
        return None if self.value is None else read(self)

    def text(self) -> str:
        # what a stranger's bundle says is shown on terminals, which obey control characters
        if not isinstance(self.value, str) or not self.value.isprintable():
            self.fail("printable text")
        return self.value

    def matching(self, pattern: re.Pattern[str], expected: str) -> str:
        if not isinstance(self.value, str) or not pattern.fullmatch(self.value):
            self.fail(expected)
        return self.value

    def one_of(self, choices: Iterable[T]) -> T:
        known = tuple(choices)
        # compared as text alone: 1 == True == 1.0 otherwise
        if not isinstance(self.value, str) or self.value not in known:
            self.fail("one of " + ", ".join(map(str, known)))
        return known[known.index(self.value)]

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            self.fail("true or false")
        return self.value

    def integer(self, minimum: int = 0, maximum: int = _LARGEST) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not minimum <= self.value <= maximum:
            self.fail(f"an integer of at least {minimum}" + ("" if maximum == _LARGEST else f" and at most {maximum}"))
        return self.value

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self.fail("a number")
        if abs(self.value) > _LARGEST or not math.isfinite(self.value):
            self.fail("a finite number")
        return float(self.value)

    def positive(self) -> float:
        number = self.number()
        return number if number > 0 else self.fail("a number above zero")

    def scalar(self) -> Scalar:
        if isinstance(self.value, str):
            return self.text()
        if isinstance(self.value, bool) or self.value is None:
            return self.value
        number = self.number()
        return self.value if isinstance(self.value, int) else number

    def path(self) -> str:
        """Read a relative path whose parts are plain names, so that it stays in the folder on every system."""
        if not isinstance(self.value, str) or not all(NAME.fullmatch(part) for part in self.value.split("/")):
            self.fail("a path inside the bundle (names of letters, digits, '.', '_' and '-', joined by '/')")
        return self.value

    def created(self) -> str:
        text = self.matching(_CREATED, "a UTC time such as 2026-01-31T12:00:00Z")
        try:
            datetime.fromisoformat(text)
        except ValueError:
            self.fail("a UTC time such as 2026-01-31T12:00:00Z")
        return text


def _short(value: Any) -> str:
    try:
        found = json.dumps(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a huge integer"
    return found if len(found) <= 80 else found[:77] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing what two readers would read in two ways."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {_short(_repeated(key for key, _ in pairs))} stands twice in one object")
    return found


def _constant(name: str) -> Never:
    raise ValueError(f"{name} is not a JSON number")


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _manifest(root: _Node) -> Manifest:
    kind: Kind = root["kind"].one_of(get_args(Kind))
    manifest = Manifest(
        name=root["name"].text(),
        kind=kind,
        precision=_precision(root["precision"]),
        created=root["created"].created(),
        command=root["command"].text(),
        sdrt_version=root["sdrt_version"].text(),
        model=_model(root["model"]),
        backend=_backend(root["backend"]),
        latent=_latent(root["latent"]),
        text=_text(root["text"]),
        scheduler=_scheduler(root["scheduler"]),
        components=root["components"].tuple_of(_component),
        tokenizer=_file(root["tokenizer"]),
        tools=root["tools"].mapping(_Node.text),
    )
    names = [component.name for component in manifest.components]
    _refuse_repeated("components has the name", names)
    for name in REQUIRED_COMPONENTS:
        if name not in names:
            raise BundleCorruptError(f"bundle.json: components has no {name}")
    check_handover(manifest.components)
    # some file systems take bundle.json and Bundle.json for one file
    paths = [entry.path.lower() for entry in manifest.files]
    _refuse_repeated("components and tokenizer have the path", ["bundle.json", *paths])
    return manifest


def _refuse_repeated(what: str, names: Iterable[str]) -> None:
    if (name := _repeated(names)) is not None:
        raise BundleCorruptError(f"bundle.json: {what} {_short(name)} twice, expected once")


def _precision(node: _Node) -> Precision:
    choices: tuple[Precision, ...] = get_args(Precision)
    return node.one_of(choices)


def _model(node: _Node) -> Model:
    return Model(
        family=node["family"].text(),
        source=node["source"].text(),
        form=node["form"].text(),
        ema=node["ema"].boolean(),
    )


def _backend(node: _Node) -> Backend:
    return Backend(
        name=node["name"].matching(NAME, "a backend's name"),
        version=node["version"].text(),
        opset=node["opset"].optional(lambda opset: opset.integer(minimum=1)),
        compute_capabilities=node.lenient("compute_capabilities", _capabilities),
        platform=node["platform"].optional(_Node.text),
    )


def _capabilities(node: _Node) -> tuple[str, ...]:
    return node.tuple_of(lambda capability: capability.matching(_CAPABILITY, "a compute capability such as 8.6"))


def _latent(node: _Node) -> Latent:
    return Latent(
        channels=node["channels"].integer(minimum=1),
        scale_factor=node["scale_factor"].integer(minimum=1),
        scaling_factor=node["scaling_factor"].positive(),
        sample_size=node["sample_size"].integer(minimum=1),
    )


def _text(node: _Node) -> Text:
    layers = node["layers"].integer(minimum=1)
    return Text(
        embedding_width=node["embedding_width"].integer(minimum=1),
        layers=layers,
        # the first and the last are the beginning and the end of the text
        max_tokens=node["max_tokens"].integer(minimum=3),
        bos_token_id=node["bos_token_id"].integer(),
        eos_token_id=node["eos_token_id"].integer(),
        pad_token_id=node["pad_token_id"].integer(),
        clip_skip=node["clip_skip"].integer(maximum=layers - 1),
    )


def _scheduler(node: _Node) -> dict[str, Scalar | tuple[Scalar, ...]]:
    node["num_train_timesteps"].integer(minimum=1)
    node["beta_start"].positive()
    node["beta_end"].positive()
    node["beta_schedule"].text()
    node["prediction_type"].one_of(PREDICTION_TYPES)
    return node.mapping(_scheduler_value)


def _scheduler_value(node: _Node) -> Scalar | tuple[Scalar, ...]:
    return node.tuple_of(_Node.scalar) if isinstance(node.value, list) else node.scalar()


def _component(node: _Node) -> Component:
    component = Component(
        name=_component_name(node["name"]),
        precision=_precision(node["precision"]),
        files=node["files"].tuple_of(_file, at_least=1),
        inputs=node["inputs"].tuple_of(_tensor, at_least=1),
        outputs=node["outputs"].tuple_of(_tensor, at_least=1),
        parity=node["parity"].optional(_parity),
        profiles=node.lenient("profiles", lambda list_: list_.tuple_of(lambda profile: profile.mapping(_input_range))),
    )
    for what, tensors in (("inputs", component.inputs), ("outputs", component.outputs)):
        _refuse_repeated(f"{node.where}.{what} has the name", [tensor.name for tensor in tensors])
    return component


def _component_name(node: _Node) -> str:
    if isinstance(node.value, str) and (node.value == DECODER_HEAD or _STAGE.fullmatch(node.value)):
        return node.value
    return node.one_of(COMPONENT_NAMES)


def _input_range(node: _Node) -> InputRange:
    least, best, most = (node[key].tuple_of(lambda size: size.integer(minimum=1)) for key in ("min", "opt", "max"))
    if not len(least) == len(best) == len(most) or any(
        not a <= b <= c for a, b, c in zip(least, best, most, strict=True)
    ):
        node.fail("three shapes of equal length, min <= opt <= max")
    return InputRange(least, best, most)


def _file(node: _Node) -> FileEntry:
    return FileEntry(
        path=node["path"].path(),
        bytes=node["bytes"].integer(),
        sha256=node["sha256"].matching(_SHA256, "64 lower-case hexadecimal digits"),
    )


def _tensor(node: _Node) -> TensorSpec:
    return TensorSpec(
        name=node["name"].text(), dtype=node["dtype"].one_of(DTYPES), shape=node["shape"].tuple_of(_dimension)
    )


def _dimension(node: _Node) -> Dim:
    if not isinstance(node.value, dict):
        return node.integer(minimum=1)
    least = node["min"].integer(minimum=1)
    return DimRange(
        name=node["name"].text(),
        min=least,
        max=node["max"].integer(minimum=least),
        multiple_of=node["multiple_of"].integer(minimum=1),
    )


def _parity(node: _Node) -> Parity:
    choices: tuple[Metric, ...] = get_args(Metric)
    psnr = node["psnr"].optional(_Node.number)
    return Parity(
        max_abs=node["max_abs"].number(),
        relative_l2=node["relative_l2"].number(),
        psnr=math.inf if psnr is None else psnr,
        metric=node["metric"].one_of(choices),
        threshold=node["threshold"].number(),
        reference=node["reference"].text(),
    )
