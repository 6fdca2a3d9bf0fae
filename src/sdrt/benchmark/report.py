"""What was measured, for programs and for people."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.table import columns
from .contenders import FLOOR, OWN, PEERS
from .rounds import Record
from .settings import PARTS, PROMPT, SEED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .contender import Turn
    from .settings import Settings

_HEADS = {"text": "TEXT", "step": "STEP", "decode": "DECODE", "picture": "PICTURE"}


def facts(
    settings: Settings, records: Mapping[str, Record], starts: Mapping[str, Any] | None, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Put everything into one object.

    Parameters
    ----------
    settings
        What was measured.
    records
        From `compete`.
    starts
        From `measure_starts`; None if that was not measured.
    machine
        From `machine.describe`.

    Returns
    -------
    dict
        Times in seconds, memory in GB (10^9 bytes). A ratio is sdrt's median by the peer's, of the turns that they
        took in the same rounds: below 1, sdrt is faster.

    """
    own = records.get(OWN, Record())
    asked = dataclasses.asdict(settings)
    for name in ("bundle", "backend", "parts", "checkpoint", "step_flops", "no_floor"):
        del asked[name]
    if settings.guidance_interval is not None:  # JSON has no infinity
        asked["guidance_interval"] = [end if math.isfinite(end) else None for end in settings.guidance_interval]
    return {
        "bundle_folder": settings.bundle,
        "backend": settings.backend,
        "checkpoint": settings.checkpoint,
        "settings": {"prompt": PROMPT, "seed": SEED, **asked},
        "machine": dict(machine),
        "sdrt": _contender(own.turns, own.about) | _own(settings, own) | _starts(starts),
        "floor": _floor(settings, records.get(FLOOR, Record())),
        "peers": {name: _peer(record) for name, record in records.items() if name in PEERS},
    }


def _contender(turns: Mapping[str, Sequence[Turn]], about: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {name: value for name, value in about.items() if name != "peak"}
    found |= {part: summary(turn.seconds for turn in turns[part]) for part in PARTS if turns.get(part)}
    # of its process, in which everything that was asked for has run
    found["peak_gb"] = _gigabytes(about.get("peak"))
    return found


def _own(settings: Settings, record: Record) -> dict[str, Any]:
    """Tell of sdrt what nobody else is asked for."""
    found: dict[str, Any] = {}
    steps, pictures = record.turns.get("step", []), record.turns.get("picture", [])
    outside = [turn.more["outside"] for turn in steps if "outside" in turn.more]
    outside += [seconds for turn in pictures for seconds in turn.more["outside_each"]]
    if outside:
        found["outside_engine"] = summary(outside)
    if pictures:
        kinds = defaultdict(list)
        for turn in pictures:
            for kind, seconds in turn.more["kinds"]:
                kinds[kind].append(seconds)
        found["evaluations"] = {kind: summary(seconds) for kind, seconds in kinds.items()}
        found["loop"] = summary(turn.more["loop"] for turn in pictures)
        found["iterations_per_second"] = settings.steps / found["loop"]["median"]
    elif steps:
        found["iterations_per_second"] = 1 / statistics.median(turn.seconds for turn in steps)
    return found


def _starts(starts: Mapping[str, Any] | None) -> dict[str, Any]:
    if starts is None:
        return {}
    return {
        "start": {"cold": starts["cold"], "warm": summary(starts["warm"])},
        "process": {"seconds": starts["process"], "peak_gb": _gigabytes(starts["peak"])},
    }


def _floor(settings: Settings, record: Record) -> dict[str, Any]:
    """Tell what a step would take if it were nothing but the fastest multiplication of matrices."""
    if (reason := settings.no_floor or record.reason) is not None:
        return {"reason": reason}
    found: dict[str, Any] = {"step_flops": settings.step_flops}
    rates = defaultdict(list)
    for turn in record.turns.get("step", []):
        for precision, rate in turn.more["rates"].items():
            rates[precision].append(rate)
    for precision, seen in rates.items():
        rate = statistics.median(seen)
        found[precision] = {
            "gflops": rate / 1e9,
            "by": record.about.get(precision),
            "step": settings.step_flops and settings.step_flops / rate,
        }
    return found


def _peer(record: Record) -> dict[str, Any]:
    if record.reason is not None:
        return {"status": "skipped" if record.skipped else "failed", "reason": record.reason}
    ratios = {
        part: _median(record.own[part]) / _median(turns) for part, turns in record.turns.items() if record.own[part]
    }
    found = {"status": "done"} | _contender(record.turns, record.about) | {"ratio": ratios}
    if record.psnr is not None:  # null for equal pictures: JSON has no infinity
        found["psnr_db"] = record.psnr if math.isfinite(record.psnr) else None
    return found


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Give the median, the 95th percentile and all values, in their order."""
    seen = list(values)
    return {"median": statistics.median(seen), "p95": float(np.percentile(seen, 95)), "all": seen}


def _median(turns: Iterable[Turn]) -> float:
    return statistics.median(turn.seconds for turn in turns)


def _gigabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e9


def table(found: Mapping[str, Any]) -> str:
    """Lay out what `facts` has put together."""
    machine, asked, own = found["machine"], found["settings"], found["sdrt"]
    parts = [part for part in PARTS if part in own]
    images = f"{asked['batch']} images of " if asked["batch"] > 1 else ""
    again = f" of each of {asked['launches']} launches" if asked["launches"] > 1 else ""
    picture = f"{images}{asked['width']}x{asked['height']}, {asked['steps']} steps of {asked['sampler']}"
    how = f"guidance {asked['cfg_scale']:g}, {asked['rounds']} rounds{again}"
    load = f"load {machine['load_average']} before and {machine['load_average_after']} after"
    lines = [
        f"{found['bundle_folder']} on {found['backend']}: {picture}, {how}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {load}",
    ]
    if parts:
        lines += ["", columns(_rows(found, parts))]
    lines += ["", *_remarks(own), *_floor_lines(found["floor"])]
    lines += [
        f"{name} {peer['status']}: {peer['reason']}"
        for name, peer in found["peers"].items()
        if peer["status"] != "done"
    ]
    return "\n".join(lines)


def _rows(found: Mapping[str, Any], parts: Sequence[str]) -> list[tuple[str, ...]]:
    """Make a row of each contender: median and 95th percentile of each part, and sdrt's time by theirs."""
    compared = any(peer["status"] == "done" for peer in found["peers"].values())
    heads = ["", *(head for part in parts for head in (_HEADS[part], "P95", *(["RATIO"] if compared else [])))]
    pictures = compared and "picture" in parts
    rows = [(*heads, "PEAK", *(["PSNR"] if pictures else []))]
    done = {name: peer for name, peer in found["peers"].items() if peer["status"] == "done"}
    for name, figures in {OWN: found["sdrt"], **done}.items():
        cells = [name]
        for part in parts:
            cells += [_seconds(figures[part]["median"]), _seconds(figures[part]["p95"])]
            if compared:
                cells.append(f"{figures['ratio'][part]:.2f}" if "ratio" in figures else "")
        cells.append("" if figures["peak_gb"] is None else f"{figures['peak_gb']:.2f} GB")
        if pictures:
            cells.append(_decibels(figures))
        rows.append(tuple(cells))
    return rows


def _decibels(figures: Mapping[str, Any]) -> str:
    if "psnr_db" not in figures:
        return ""
    return "equal" if figures["psnr_db"] is None else f"{figures['psnr_db']:.0f} dB"


def _remarks(own: Mapping[str, Any]) -> list[str]:
    lines = []
    if "iterations_per_second" in own:
        lines.append(f"{own['iterations_per_second']:.3g} iterations per second")
    if len(own.get("evaluations", {})) > 1:
        kinds = (f"{kind} {_seconds(times['median'])}" for kind, times in own["evaluations"].items())
        lines.append(f"evaluations of the U-Net: {'; '.join(kinds)}")
    if "outside_engine" in own:
        times = own["outside_engine"]
        lines.append(f"outside the engine, a step: {_seconds(times['median'])}, p95 {_seconds(times['p95'])}")
    if "start" in own:
        start, process = own["start"], own["process"]
        lines.append(f"until the first step: {_seconds(start['warm']['median'])} warm, {_seconds(start['cold'])} cold")
        peak = "" if process["peak_gb"] is None else f", {process['peak_gb']:.2f} GB at its peak"
        lines.append(f"sdrt run in a process of its own: {_seconds(process['seconds'])}{peak}")
    return lines


def _floor_lines(floor: Mapping[str, Any]) -> list[str]:
    if "reason" in floor:
        return [f"no floor: {floor['reason']}"]
    return [
        f"floor in {precision}: {floor[precision]['gflops']:.0f} GFLOP/s ({floor[precision]['by']})"
        + ("" if floor[precision]["step"] is None else f", a step in {_seconds(floor[precision]['step'])}")
        for precision in ("bf16", "fp32")
        if precision in floor
    ]


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
