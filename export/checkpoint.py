"""From what a user names to the three networks of a Stable Diffusion v1 checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ..engines import demo as shipped
from ..engines.store import home
from ..errors import CheckpointError, InputError
from . import demo
from .folder import INDEX, choose_files
from .hub import HubSpec, fetch, parse_hub_spec
from .identify import recognise, recognise_pipeline, refuse_variant, sniff
from .json_object import read_json_object
from .ldm import EMA_PREFIX, PREFIXES, PartName, ema_name, ldm_names
from .parts import Part, check_config, load, match, modern_names, module_shapes
from .pickles import read_pickle, refuse_raw_pickle
from .scheduler import V1_SCHEDULER, check_scheduler
from .shapes import DIFFUSERS_PREFIXES, infer_configs
from .tensor_file import Stored, read_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Progress = Callable[[str, int, int], None]

__all__ = ["Checkpoint", "Part", "read_checkpoint"]

_SUFFIXES: Final = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

_TRAINING_ONLY: Final = re.compile(
    r"first_stage_model\.(loss|model_ema)\.|cond_stage_model\..*(logit_scale|projection)"
)
"""What original checkpoints keep beside the networks."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole Stable Diffusion v1 model, its weights mapped from disk.

    Attributes
    ----------
    name
        A name for a bundle, safe as a file name: ``"v1-1"``, the repository's, the folder's or the file's.
    source
        What it was read from: ``"CompVis/stable-diffusion-v1-1@<commit>"``, or the path's last part.
    form
        ``"diffusers"`` or ``"ldm"``, the original names.
    text_encoder, unet, vae
        The networks.
    scheduler
        ``num_train_timesteps``, ``beta_schedule``, ``beta_start``, ``beta_end``, ``prediction_type``,
        ``steps_offset``, ``set_alpha_to_one``, ``clip_sample`` and what else the folder says.

    """

    name: str
    source: str
    form: Literal["diffusers", "ldm"]
    text_encoder: Part
    unet: Part
    vae: Part
    scheduler: Mapping[str, Any]


@dataclass(frozen=True)
class _Draft:
    """One part before its weights are touched."""

    part: PartName
    config: Mapping[str, Any]
    expected: Mapping[str, tuple[int, ...]]
    chosen: Mapping[str, Stored]
    where: str


def read_tensors(path: Path) -> tuple[dict[str, Stored], frozenset[str]]:
    """Find the tensors of one file, of whatever format, and the names at the top of a pickle."""
    container = sniff(path)
    if container == "safetensors":
        return read_safetensors(path), frozenset()
    if container == "pickle":
        refuse_raw_pickle(path)
    pickled = read_pickle(path)
    return dict(pickled.tensors), pickled.names


def _draft_diffusers(part: PartName, config: Mapping[str, Any], tensors: Mapping[str, Stored], where: str) -> _Draft:
    """Match a part whose tensors have diffusers' names, of whichever version."""
    checked = check_config(part, config, where)
    expected = module_shapes(part, checked, where)
    modern = modern_names(part, tensors)
    keep = {name: tensors[name] for name in modern.values()}
    names = {name: modern.get(name.removeprefix("text_model."), name) for name in expected}
    return _Draft(part, checked, expected, match(part, expected, keep, names, where), where)


def _read_folder(folder: Path, *, ema: bool) -> tuple[list[_Draft], dict[str, Any]]:
    files = {path.relative_to(folder).as_posix() for path in folder.glob("*") if path.is_file()}
    files |= {path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file()}
    layout = choose_files(files, str(folder), ema=ema)
    recognise_pipeline(read_json_object(folder / INDEX), str(folder / INDEX))
    scheduler = check_scheduler(read_json_object(folder / layout.scheduler), str(folder / layout.scheduler))
    drafts = []
    for part in PREFIXES:
        config = read_json_object(folder / layout.configs[part])
        if part == "unet":
            refuse_variant(config.get("in_channels"), config.get("cross_attention_dim"), str(folder))
        tensors: dict[str, Stored] = {}
        for name in layout.weights[part]:
            tensors |= read_tensors(folder / name)[0]
        drafts.append(_draft_diffusers(part, config, tensors, str(folder / part)))
    return drafts, scheduler


def _with_text_model(tensors: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """Put in the ``text_model.`` that some conversions of the text encoder leave out."""
    bare = prefix.removesuffix("text_model.")
    return {
        prefix + name.removeprefix(bare) if name.startswith(bare) and not name.startswith(prefix) else name: stored
        for name, stored in tensors.items()
    }


def _draft_ldm(tensors: Mapping[str, Stored], where: str, *, ema: bool) -> list[_Draft]:
    tensors = _with_text_model(tensors, PREFIXES["text_encoder"])
    averaged = {name for name in tensors if name.startswith(EMA_PREFIX)}
    if ema and not averaged:
        raise CheckpointError(f"{where} has no averaged weights (no tensor named {EMA_PREFIX}*): leave --ema away")
    configs = infer_configs({name: stored.shape for name, stored in tensors.items()}, "ldm", where)
    drafts = []
    for part, config in configs.items():
        checked = check_config(part, config, where)
        expected = module_shapes(part, checked, where)
        names = ldm_names(part, expected, checked)
        own = {
            name: stored
            for name, stored in tensors.items()
            if name.startswith(PREFIXES[part]) and not name.endswith("position_ids") and not _TRAINING_ONLY.match(name)
        }
        if ema and part == "unet":
            names = {name: ema_name(original) for name, original in names.items()}
            own = {name: tensors[name] for name in averaged if not name.endswith((".decay", ".num_updates"))}
        drafts.append(_Draft(part, checked, expected, match(part, expected, own, names, where), where))
    return drafts


def _draft_prefixed(tensors: Mapping[str, Stored], where: str) -> list[_Draft]:
    """Match one file that holds the three diffusers modules."""
    tensors = _with_text_model(tensors, DIFFUSERS_PREFIXES["text_encoder"])
    configs = infer_configs({name: stored.shape for name, stored in tensors.items()}, "diffusers", where)
    return [
        _draft_diffusers(
            part,
            config,
            {
                name.removeprefix(f"{part}."): stored
                for name, stored in tensors.items()
                if name.startswith(DIFFUSERS_PREFIXES[part])
            },
            where,
        )
        for part, config in configs.items()
    ]


def _read_file(path: Path, *, ema: bool) -> tuple[list[_Draft], Literal["diffusers", "ldm"], dict[str, Any]]:
    tensors, top = read_tensors(path)
    form = recognise({name: stored.shape for name, stored in tensors.items()}, str(path), top)
    scheduler = dict(V1_SCHEDULER)
    if "v_pred" in tensors:  # the mark that some trainers leave in the weights
        scheduler["prediction_type"] = "v_prediction"
    if form == "ldm":
        return _draft_ldm(tensors, str(path), ema=ema), form, scheduler
    if ema:
        raise CheckpointError(f"{path} has one set of weights, so there are no averaged ones: leave --ema away")
    return _draft_prefixed(tensors, str(path)), form, scheduler


def _safe_name(text: str) -> str:
    """Make a bundle's name of a repository's or a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:64].strip(".-") or "checkpoint"


def _named(spec: str) -> tuple[Path | HubSpec, str]:
    """Tell what `spec` names, without a look inside, and the name for a bundle of it."""
    path = Path(spec).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError):
        raise InputError(f"{spec!r:.80} can be neither a path nor a Hugging Face repository") from None
    if exists and spec:
        resolved = path.resolve()
        return path, _safe_name(resolved.stem if path.is_file() else resolved.name)
    if spec == shipped.NAME:
        # A checkout holds the checkpoint itself; an installed sdrt holds it packed.
        return demo.model_folder() if demo.model_folder().is_dir() else shipped.checkpoint_folder(home()), spec
    hub = parse_hub_spec(spec)
    if hub is None:
        raise InputError(
            f"{spec!r:.120} does not exist: expected a file, a folder, v1-1 to v1-5, demo, or a Hugging Face "
            "repository such as CompVis/stable-diffusion-v1-1"
        )
    return hub, _safe_name(hub.name)


def checkpoint_name(spec: str) -> str:
    """Tell what a checkpoint will be called, before anything of it is read or downloaded.

    Raises
    ------
    InputError
        If `spec` names nothing.

    """
    return _named(spec)[1]


def _find(spec: str, progress: Progress, *, ema: bool) -> tuple[Path, str, str]:
    """Bring what was named onto this machine: its path, the bundle's name and the source."""
    found, name = _named(spec)
    if isinstance(found, Path):
        return found, name, found.resolve().name if Path(spec).expanduser().exists() else name
    fetched = fetch(found, ema=ema, progress=progress)
    return fetched.path, name, fetched.source


def read_checkpoint(
    spec: str, *, ema: bool = False, progress: Callable[[str, int, int], None] | None = None
) -> Checkpoint:
    """Find, download where needed, check and map a Stable Diffusion v1 checkpoint.

    Nothing in it is executed. Its weights are mapped, not copied, so that memory holds them once at most.

    Parameters
    ----------
    spec
        ``v1-1`` to ``v1-5``; a Hugging Face repository ``owner/name``, with ``:file.ckpt`` for an original file in
        it, and ``@revision``; a diffusers folder; an original .ckpt or .pt; a .safetensors of either naming; ``demo``,
        the small model that comes with sdrt. A path that exists wins over all other readings of its name.
    ema
        Take the averaged weights of a file that has both.
    progress
        Called with what is being done, bytes done, and bytes in all.

    Returns
    -------
    Checkpoint
        The model.

    Raises
    ------
    InputError
        If `spec` names nothing.
    CheckpointError
        If it is damaged, unsafe, or not Stable Diffusion v1.
    DownloadError, DiskSpaceError
        If the hub does not give it, or it does not fit on the disk.

    """
    report = progress or (lambda _what, _done, _total: None)
    path, name, source = _find(spec, report, ema=ema)
    form: Literal["diffusers", "ldm"] = "diffusers"
    if path.is_dir():
        drafts, scheduler = _read_folder(path, ema=ema)
    else:
        drafts, form, scheduler = _read_file(path, ema=ema)
    total = sum(stored.nbytes for draft in drafts for stored in draft.chosen.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(f"Checking the weights of {name}", done, total)

    parts = {
        draft.part: Part(draft.config, load(draft.chosen, draft.expected, draft.where, advance)) for draft in drafts
    }
    return Checkpoint(name, source, form, parts["text_encoder"], parts["unet"], parts["vae"], scheduler)
