"""The three networks of a checkpoint: their configurations checked, their weights matched to the modules.

Modules are built on torch's meta device, which allocates nothing, to learn the names and shapes that they expect.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from ..errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .ldm import PartName
    from .tensor_file import Stored

_LABELS: Final[dict[PartName, str]] = {"text_encoder": "text encoder", "unet": "U-Net", "vae": "VAE"}

_FLOATS: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_UNET_BLOCKS = frozenset({"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"})
_VAE_BLOCKS = frozenset({"DownEncoderBlock2D", "UpDecoderBlock2D"})


@dataclass(frozen=True)
class Part:
    """One network.

    Attributes
    ----------
    config
        Arguments of ``UNet2DConditionModel``, ``AutoencoderKL`` or ``CLIPTextConfig``.
    weights
        The module's ``state_dict()``, in the dtypes of the file; mapped from it wherever that can be.

    """

    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Field:
    """What a configuration may say: the type, and the range of a number or the choice of a text."""

    kind: type
    low: float = 1
    high: float = 16384
    choice: frozenset[str] = frozenset()
    length: int = 0
    """Most elements of a list; 0 for a single value."""

    def check(self, value: Any, where: str) -> Any:
        if self.length:
            if not isinstance(value, (list, tuple)) or not 0 < len(value) <= self.length:
                raise CheckpointError(f"{where} is {value!r:.60}, expected a list of 1 to {self.length}")
            return tuple(self.check_one(one, where) for one in value)
        return self.check_one(value, where)

    def check_one(self, value: Any, where: str) -> Any:
        if self.kind is float and type(value) is int:
            value = float(value)
        found = type(value)
        if found is not self.kind:
            raise CheckpointError(f"{where} is {value!r:.60}, expected {self.kind.__name__}")
        if self.kind is str and value not in self.choice:
            raise CheckpointError(f"{where} is {value!r:.60}, expected {' or '.join(sorted(self.choice))}")
        if found in {int, float} and not self.low <= value <= self.high:
            raise CheckpointError(f"{where} is {value!r:.60}, expected {self.low:g} to {self.high:g}")
        return value


_EPSILON: Final = _Field(float, 1e-12, 1.0)

_FIELDS: Final[dict[PartName, dict[str, _Field]]] = {
    "unet": {
        "in_channels": _Field(int),
        "out_channels": _Field(int),
        "block_out_channels": _Field(int, length=8),
        "layers_per_block": _Field(int, high=16),
        "cross_attention_dim": _Field(int),
        "attention_head_dim": _Field(int, high=1024),
        "down_block_types": _Field(str, choice=_UNET_BLOCKS, length=8),
        "up_block_types": _Field(str, choice=_UNET_BLOCKS, length=8),
        "act_fn": _Field(str, choice=frozenset({"silu"})),
        "norm_num_groups": _Field(int, high=1024),
        "norm_eps": _EPSILON,
        "flip_sin_to_cos": _Field(bool),
        "freq_shift": _Field(int, low=0, high=1),
        "use_linear_projection": _Field(bool),
        "sample_size": _Field(int, high=1024),
    },
    "vae": {
        "in_channels": _Field(int, high=64),
        "out_channels": _Field(int, high=64),
        "latent_channels": _Field(int, high=64),
        "block_out_channels": _Field(int, length=8),
        "layers_per_block": _Field(int, high=16),
        "down_block_types": _Field(str, choice=_VAE_BLOCKS, length=8),
        "up_block_types": _Field(str, choice=_VAE_BLOCKS, length=8),
        "act_fn": _Field(str, choice=frozenset({"silu"})),
        "norm_num_groups": _Field(int, high=1024),
        "scaling_factor": _Field(float, 1e-6, 1e6),
    },
    "text_encoder": {
        "vocab_size": _Field(int, high=1 << 20),
        "hidden_size": _Field(int),
        "intermediate_size": _Field(int, high=65536),
        "num_hidden_layers": _Field(int, high=128),
        "num_attention_heads": _Field(int, high=1024),
        "max_position_embeddings": _Field(int),
        "hidden_act": _Field(str, choice=frozenset({"quick_gelu", "gelu"})),
        "layer_norm_eps": _EPSILON,
    },
}

_DEFAULTS: Final[dict[PartName, dict[str, Any]]] = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 8,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "use_linear_projection": False,
        "sample_size": 64,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
"""What Stable Diffusion v1 has where a file does not say."""

_BLOCKS: Final = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types")

_REQUIRED: Final[dict[PartName, tuple[str, ...]]] = {
    "unet": (*_BLOCKS, "cross_attention_dim"),
    "vae": _BLOCKS,
    "text_encoder": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
}
"""What differs from one model to another, so that a guess would be wrong."""

_INDIFFERENT: Final = frozenset({"sample_size", "force_upcast", "upcast_attention", "dropout"})
"""Settings that change no result of the networks as they are traced here."""


def _factory(part: PartName) -> Any:
    if part == "text_encoder":
        from transformers import CLIPTextConfig, CLIPTextModel  # noqa: PLC0415 - seconds, after the cheap checks

        return lambda **config: CLIPTextModel(CLIPTextConfig(**config))
    import diffusers  # noqa: PLC0415

    return diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL


def check_config(part: PartName, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Reduce a configuration to what describes a network of Stable Diffusion v1.

    Raises
    ------
    CheckpointError
        If a value is of the wrong type, absurd, or asks for something that v1 does not have.

    """
    fields = _FIELDS[part]
    merged = _DEFAULTS[part] | {name: config[name] for name in fields if config.get(name) is not None}
    checked = {name: fields[name].check(value, f"{where}: {name}") for name, value in merged.items()}
    absent = [name for name in _REQUIRED[part] if name not in checked]
    if absent:
        raise CheckpointError(f"{where}: the configuration does not say {' and '.join(absent)}")
    if part == "text_encoder":
        width, heads = checked["hidden_size"], checked["num_attention_heads"]
        if width % heads:
            raise CheckpointError(f"{where}: hidden_size is {width}, which {heads} attention heads cannot share")
        return checked
    if len({len(checked[name]) for name in ("block_out_channels", "down_block_types", "up_block_types")}) > 1:
        raise CheckpointError(f"{where}: block_out_channels, down_block_types and up_block_types differ in length")
    _refuse_extras(part, config, where)
    return checked


def _refuse_extras(part: PartName, config: Mapping[str, Any], where: str) -> None:
    """Refuse settings that would change the network and are ignored here: a wrong picture is worse than none."""
    known = inspect.signature(_factory(part)).parameters
    for name, value in config.items():
        if name in _FIELDS[part] or name in _INDIFFERENT or name not in known or value is None:
            continue
        default = known[name].default
        if (tuple(value) if isinstance(value, list) else value) != default and bool(value) != bool(default):
            raise CheckpointError(f"{where}: {name} is {value!r:.60}, which Stable Diffusion v1 does not have")


def module_shapes(part: PartName, config: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a module of this configuration expects, without allocating it."""
    factory = _factory(part)
    try:
        with torch.device("meta"):
            module = factory(**config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise CheckpointError(f"{where}: no {_LABELS[part]} can be made of this configuration: {reason}") from None
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether the shapes agree, a 1x1 convolution being as good as the matrix that it is."""
    if found == expected:
        return True
    shorter, longer = sorted((found, expected), key=len)
    return len(shorter) == 2 and longer == (*shorter, 1, 1)


def _join(names: list[str]) -> str:
    return f"{names[0]!r:.120}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def match(
    part: PartName,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    names: Mapping[str, str],
    where: str,
) -> dict[str, Stored]:
    """Find the stored tensor for each that a module expects.

    Parameters
    ----------
    part
        Which network.
    expected
        The module's names and shapes.
    stored
        This part's tensors under the file's names, nothing else among them.
    names
        The file's name for each of the module's.
    where
        What to call the file in messages.

    Raises
    ------
    CheckpointError
        If tensors are missing, too many, of another shape, or quantised.

    """
    label = _LABELS[part]
    missing = [names[name] for name in expected if names[name] not in stored]
    if missing:
        raise CheckpointError(f"{where} is incomplete: its {label} lacks {len(missing)} tensors: {_join(missing)}")
    wrong = [name for name, shape in expected.items() if not _fits(stored[names[name]].shape, shape)]
    if wrong:
        found, shape = list(stored[names[wrong[0]]].shape), list(expected[wrong[0]])
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors of the {label} have another shape than expected: {names[wrong[0]]!r} is "
            f"{found}, expected {shape}"
        )
    extra = sorted(set(stored) - set(names.values()))
    if extra:
        raise CheckpointError(
            f"{where} is not Stable Diffusion v1: its {label} has {len(extra)} tensors too many: {_join(extra)}"
        )
    chosen = {name: stored[names[name]] for name in expected}
    for name, tensor in chosen.items():
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{where}: tensor {names[name]!r} is {kind}, expected float32, float16 or bfloat16")
    return chosen


def load(
    chosen: Mapping[str, Stored],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    advance: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    """Map the tensors and see that each is finite.

    Raises
    ------
    CheckpointError
        If one holds NaN or infinity; the message names it.

    """
    weights = {}
    for name, stored in chosen.items():
        tensor = stored.load().view(expected[name])
        if tensor.numel():
            low, high = torch.aminmax(tensor)  # NaN carries through both
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                kind = "NaN" if bool(low.isnan()) else "infinite values"
                raise CheckpointError(f"{where} holds {kind} in {name!r}: the weights are damaged")
        weights[name] = tensor
        advance(stored.nbytes)
    return weights


_OLD_ATTENTION: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the autoencoder's attention up to version 0.17."""


_CLIP_ONLY: Final = frozenset({"text_projection.weight", "logit_scale"})
"""What a text encoder carries along that was cut out of a whole CLIP."""


def modern_names(part: PartName, names: Iterable[str]) -> dict[str, str]:
    """Map today's diffusers and transformers names to those in a file, leaving out what is no weight."""
    renamed = {}
    for name in names:
        if name.endswith("position_ids") or (part == "text_encoder" and name in _CLIP_ONLY):
            continue
        modern = name
        if part == "vae":
            modern = re.sub(
                r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
                lambda found: f"{found[1]}{_OLD_ATTENTION[found[2]]}.",
                name,
            )
        elif part == "text_encoder":
            modern = name.removeprefix("text_model.")
        renamed[modern] = name
    return renamed
