"""Random Stable Diffusion v1 checkpoints, small or full-size, in each format that people hand around.

``python -m bench.checkpoints OUT --form diffusers|ldm|lightning --size tiny|full [--seed N] [--dtype float32] [--ema]``

The same seed gives the same weights in all three formats: each tensor has its own generator, seeded with its name.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import sys
import types
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import numpy as np
import torch

from sdrt.export.ldm import PREFIXES, PartName, ema_name, ldm_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Form = Literal["diffusers", "ldm", "lightning"]
Size = Literal["tiny", "full"]

_WIDTHS: Final[dict[Size, dict[str, Any]]] = {
    "tiny": {"unet": (32, 64, 64, 64), "vae": (32, 32, 64, 64), "text": 64, "text_layers": 2},
    "full": {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": 768, "text_layers": 12},
}
_DTYPES: Final = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "int64": ("I64", 8)}

SCHEDULER: Final[dict[str, Any]] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""``scheduler/scheduler_config.json`` of CompVis/stable-diffusion-v1-1."""


class Entry(NamedTuple):
    """One tensor of a file, made only when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], torch.Tensor]


def configs(size: Size) -> dict[PartName, dict[str, Any]]:
    """Return each part's ``config.json``, as a Stable Diffusion v1 repository has it."""
    widths = _WIDTHS[size]
    unet = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.2.2",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": list(widths["unet"]),
        "center_input_sample": False,
        "cross_attention_dim": widths["text"],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.2.2",
        "act_fn": "silu",
        "block_out_channels": list(widths["vae"]),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "out_channels": 3,
        "sample_size": 512,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    text = {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": widths["text"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * widths["text"],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": widths["text"] // 64,
        "num_hidden_layers": widths["text_layers"],
        "pad_token_id": 1,
        "vocab_size": 49408,
    }
    return {"text_encoder": text, "unet": unet, "vae": vae}


def _shapes(part: PartName, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import diffusers  # noqa: PLC0415 - two seconds that --help need not pay
    import transformers  # noqa: PLC0415

    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        if part == "text_encoder":
            module = transformers.CLIPTextModel(transformers.CLIPTextConfig(**arguments))
        elif part == "unet":
            module = diffusers.UNet2DConditionModel(**arguments)
        else:
            module = diffusers.AutoencoderKL(**arguments)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def _random(key: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Draw one tensor so that activations keep their size, and no two tensors or channels are alike."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key}/{name}".encode()))
    values = torch.randn(shape, generator=generator)
    if name.endswith("token_embedding.weight"):
        values *= 0.5
    elif "norm" in name or name.endswith((".bias", "position_embedding.weight")):
        values *= 0.1
        if "norm" in name and name.endswith(".weight"):
            values += 1.0
    else:
        values *= 1.0 / math.sqrt(math.prod(shape[1:]))
    return values.to(dtype)


def _part_entries(part: PartName, size: Size, seed: int, dtype: str, *, averaged: bool = False) -> list[Entry]:
    key = f"{seed}/{part}" + ("/averaged" if averaged else "")
    return [
        # "text_model." comes and goes with the version of transformers; the weights must not.
        Entry(name, shape, dtype, partial(_random, key, name, shape, getattr(torch, dtype)))
        for name, shape in sorted(
            (name.removeprefix("text_model."), shape) for name, shape in _shapes(part, configs(size)[part]).items()
        )
    ]


def _reshaped(make: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return make().reshape(shape)


def _position_ids(name: str) -> Entry:
    return Entry(name, (1, 77), "int64", partial(torch.unsqueeze, torch.arange(77), 0))


def _ldm_entries(size: Size, seed: int, dtype: str, *, ema: bool) -> list[Entry]:
    """Tensors of an original checkpoint, with its names and its 1x1 convolutions in the autoencoder's attention."""
    entries = []
    for part, config in configs(size).items():
        for averaged in (False, True) if ema and part == "unet" else (False,):
            own = _part_entries(part, size, seed, dtype, averaged=averaged)
            names = ldm_names(part, [entry.name for entry in own], config)
            for name, shape, kind, make in own:
                original = ema_name(names[name]) if averaged else names[name]
                convolution = part == "vae" and len(shape) == 2
                final = (*shape, 1, 1) if convolution else shape
                entries.append(Entry(original, final, kind, partial(_reshaped, make, final)))
    entries.append(_position_ids(PREFIXES["text_encoder"] + "embeddings.position_ids"))
    betas = np.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000, dtype=np.float64) ** 2
    for name, values in (("betas", betas), ("alphas_cumprod", np.cumprod(1.0 - betas))):
        entries.append(Entry(name, (1000,), "float32", partial(torch.tensor, values, dtype=torch.float32)))
    return entries


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write a .safetensors file tensor by tensor, holding one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype, _ in entries:
        code, width = _DTYPES[dtype]
        end = offset + width * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            file.write(entry.make().contiguous().view(torch.uint8).numpy().data)


@contextmanager
def _foreign_globals() -> Iterator[tuple[type, Any]]:
    """Stand in for the classes that original checkpoints name, so that pickle writes those names."""

    def scalar(*_: object) -> None:
        raise NotImplementedError

    scalar.__module__, scalar.__qualname__ = "numpy.core.multiarray", "scalar"
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    modules: dict[str, dict[str, Any]] = {
        "numpy.core.multiarray": {"scalar": scalar},
        callback.__module__: {"ModelCheckpoint": callback},
    }
    for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        modules[package] = {}
    before = {name: sys.modules.get(name) for name in modules}
    for name, members in modules.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(members, __path__=[])
    try:
        yield callback, scalar
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _write_lightning(path: Path, entries: Sequence[Entry]) -> None:
    """Write what PyTorch Lightning wrote for sd-v1-x: weights among callbacks, optimizer and a numpy scalar."""
    state = {entry.name: entry.make() for entry in entries}
    with _foreign_globals() as (callback, scalar):

        class Score:
            def __reduce__(self) -> tuple[Any, ...]:
                return scalar, (np.dtype("float64"), np.float64(0.1537).tobytes())

        contents = {
            "epoch": 26,
            "global_step": 470000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": state,
            "callbacks": {callback: {"monitor": "val/loss_simple_ema", "best_model_score": Score(), "dirpath": "logs"}},
            "optimizer_states": [
                {
                    "state": {0: {"step": 470000, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}},
                    "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}],
                }
            ],
            "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 470000, "_step_count": 470001}],
        }
        torch.save(contents, path, pickle_module=pickle)


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_diffusers(folder: Path, size: Size, seed: int, dtype: str, *, ema: bool) -> None:
    classes = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.2.2"}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    for part, name in classes.items():
        index[part] = ["transformers" if part == "text_encoder" else "diffusers", name]
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    for part, config in configs(size).items():
        _write_json(folder / part / "config.json", config)
        if part == "text_encoder":
            own = [entry._replace(name="text_model." + entry.name) for entry in _part_entries(part, size, seed, dtype)]
            own.append(_position_ids("text_model.embeddings.position_ids"))
            write_safetensors(folder / part / "model.safetensors", own)
            continue
        if ema and part == "unet":  # as in stable-diffusion-v1-5: the plain file is the averaged one
            plain = folder / part / "diffusion_pytorch_model.non_ema.safetensors"
            write_safetensors(plain, _part_entries(part, size, seed, dtype))
        main = folder / part / "diffusion_pytorch_model.safetensors"
        write_safetensors(main, _part_entries(part, size, seed, dtype, averaged=ema and part == "unet"))


def write_checkpoint(
    path: Path, form: Form, size: Size, seed: int = 0, dtype: str = "float32", *, ema: bool = False
) -> Path:
    """Write a checkpoint with random weights.

    Parameters
    ----------
    path
        The folder (``diffusers``) or file (``ldm``: .safetensors, ``lightning``: .ckpt) to write.
    form
        ``"diffusers"``, a folder as on the Hugging Face hub; ``"ldm"``, one .safetensors with the original names;
        ``"lightning"``, a pickle as the original training code wrote it.
    size
        ``"full"``, Stable Diffusion v1 itself (4.3 GB in float32); ``"tiny"``, the same architecture with few
        channels (17 MB).
    seed
        The same seed gives the same weights in all three forms.
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    ema
        Add averaged U-Net weights, which differ from the plain ones.

    Returns
    -------
    Path
        `path`.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "diffusers":
        _write_diffusers(path, size, seed, dtype, ema=ema)
    elif form == "ldm":
        write_safetensors(path, _ldm_entries(size, seed, dtype, ema=ema))
    else:
        _write_lightning(path, _ldm_entries(size, seed, dtype, ema=ema))
    return path


def main() -> None:
    """Write one checkpoint, as the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("path", type=Path, metavar="OUT", help="folder or file to write")
    parser.add_argument("--form", choices=get_args(Form), default="diffusers")
    parser.add_argument("--size", choices=get_args(Size), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--ema", action="store_true", help="add averaged U-Net weights")
    arguments = parser.parse_args()
    print(write_checkpoint(**vars(arguments)))


if __name__ == "__main__":
    main()
