"""Draw what `bench.cpu` has measured: ``python -m bench.plots`` writes ``peers`` and ``growth`` as PNG and SVG.

Bars: a guided step of the U-Net, and a whole picture, for sdrt and its peers, with a line where a step would be that is
nothing but the fastest multiplication of matrices. Curves: seconds against steps, images and pixels, with their fits.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from bench.cpu import RESULTS, read_results

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN, OTHER = "#1f6fb4", "#b8bcc2"
FLOORS: Final = {"bf16": "#c0392b", "fp32": "#7d6608"}
STEP_ROWS: Final = ("step openvino", "step openvino:fp32", "step onnxruntime")
#: Of the results' axis: its title, and how many of its units a size is.
AXES: Final = {"steps": ("steps", 1), "batch": ("images at once", 1), "side": ("pixels", 2)}


def figures(results: Mapping[str, Any], row: str) -> dict[str, Any] | None:
    """Give a row's figures if it was measured."""
    outcome = results["rows"].get(row, {})
    found: dict[str, Any] | None = outcome.get("figures") if outcome.get("status") == "done" else None
    return found


def bars(results: Mapping[str, Any], rows: tuple[str, ...], part: str) -> dict[str, tuple[float, bool]]:
    """Collect the medians of a part by name, sdrt's with their backend, and whether it is sdrt; the fastest first."""
    found: dict[str, tuple[float, bool]] = {}
    for row in rows:
        if (measured := figures(results, row)) is None:
            continue
        found[f"sdrt, {measured['backend']}"] = measured["sdrt"][part]["median"], True
        for name, peer in measured["peers"].items():
            if peer["status"] == "done":
                label = f"{name}, {peer['precision']}" if name == "openvino-raw" else name
                found.setdefault(label, (peer[part]["median"], False))
    return dict(sorted(found.items(), key=lambda bar: bar[1][0]))


def draw_bars(axes: Axes, found: Mapping[str, tuple[float, bool]], title: str) -> None:
    """Draw bars with their seconds, the fastest on top."""
    seconds = [value for value, _ in found.values()]
    drawn = axes.barh([*found], seconds, color=[OWN if own else OTHER for _, own in found.values()])
    axes.bar_label(drawn, [f"{value:.3g}" for value in seconds], padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title=title, xlim=(0, 1.15 * max(seconds)))
    axes.spines[["top", "right"]].set_visible(False)


def draw_floors(axes: Axes, results: Mapping[str, Any]) -> None:
    """Draw a line for the floor of each precision, as it was measured beside sdrt's own step in that precision."""
    for precision, row in (("bf16", "step openvino"), ("fp32", "step openvino:fp32")):
        floor = (figures(results, row) or {}).get("floor", {}).get(precision)
        if floor is not None and floor["step"] is not None:
            label = f"floor in {precision}: {floor['gflops']:.0f} GFLOP/s, {floor['step']:.3g} s"
            axes.axvline(floor["step"], color=FLOORS[precision], linestyle="--", label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", frameon=False)


def peers(results: Mapping[str, Any]) -> Figure | None:
    """Draw sdrt and its peers; None if nothing was measured."""
    steps, pictures = bars(results, STEP_ROWS, "step"), bars(results, ("picture openvino",), "picture")
    panels = [bar for bar in (steps, pictures) if bar]
    if not panels:
        return None
    figure, grid = plt.subplots(
        len(panels),
        1,
        squeeze=False,
        figsize=(9, 1.6 + 0.42 * sum(map(len, panels)) + 0.6 * len(panels)),
        height_ratios=[len(panel) + 1 for panel in panels],
        layout="constrained",
    )
    cells = iter(grid[:, 0])
    if steps:
        axes = next(cells)
        draw_bars(axes, steps, "A guided step of the U-Net")
        draw_floors(axes, results)
    if pictures:
        asked = (figures(results, "picture openvino") or {})["settings"]
        title = f"A picture of {asked['width']}x{asked['height']} in {asked['steps']} steps, from prompt to pixels"
        draw_bars(next(cells), pictures, title)
    return figure


def growth(results: Mapping[str, Any]) -> Figure | None:
    """Draw how time grows; None if nothing was measured."""
    rows = [found for name in ("steps", "batch", "pixels") if (found := figures(results, f"growth {name}"))]
    if not rows:
        return None
    figure, grid = plt.subplots(1, len(rows), squeeze=False, figsize=(4.2 * len(rows), 3.8), layout="constrained")
    for axes, row in zip(grid[0], rows, strict=True):
        title, power = AXES[row["axis"]]
        sizes = [point[row["axis"]] ** power for point in row["points"]]
        for name, colour in (("picture", OTHER), ("loop", OWN)):
            fit = row["fits"][name]
            label = f"{name}: exponent {fit['exponent']:.2f}"
            axes.plot(
                sizes, [statistics.median(point[name]) for point in row["points"]], "o", color=colour, label=label
            )
            axes.axline((0, fit["intercept"]), slope=fit["slope"], color=colour, linewidth=1)
        axes.set(xlabel=title, xlim=(0, None), ylim=(0, None))
        if row["axis"] != "steps":
            axes.set_xticks(sizes, [f"{point[row['axis']]}{'²' if power == 2 else ''}" for point in row["points"]])
        axes.legend(loc="upper left", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("seconds")
    figure.suptitle(f"sdrt on {rows[0]['backend']}: measured, and the straight line through it")
    return figure


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__.split(":", maxsplit=1)[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder for the pictures")
    options = parser.parse_args()
    results = read_results(options.results)
    if not results:
        parser.error(f"there is no {options.results}: python -m bench.cpu makes it")
    options.output.mkdir(parents=True, exist_ok=True)
    for name, figure in (("peers", peers(results)), ("growth", growth(results))):
        if figure is None:
            print(f"{name}: nothing was measured yet")
            continue
        for suffix in ("png", "svg"):
            path = options.output / f"cpu-{name}.{suffix}"
            figure.savefig(path, dpi=120)
            print(path)
        plt.close(figure)


if __name__ == "__main__":
    main()
