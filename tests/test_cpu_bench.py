"""The measurements behind the figures about speed, on a model that takes no time."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from bench import cpu, growth, plots
from matplotlib import pyplot as plt
from PIL import Image

import sdrt

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ("-W", "64", "-H", "64", "--rounds", "1")


def step_row(backend: str, seconds: float, **peers: float) -> dict[str, Any]:
    """What a row of steps says, cut down to what is read of it."""
    return {
        "status": "done",
        "figures": {
            "backend": backend,
            "sdrt": {"step": {"median": seconds}, "peak_gb": 4.0},
            "floor": {"bf16": {"gflops": 500.0, "step": 4.0}, "fp32": {"gflops": 200.0, "step": 8.0}},
            "peers": {
                name.replace("_", "-"): {
                    "status": "done",
                    "precision": "bf16",
                    "step": {"median": taken},
                    "ratio": {"step": seconds / taken},
                }
                for name, taken in peers.items()
            },
        },
    }


def test_rows_are_kept_one_by_one_and_measured_anew_where_asked(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "step onnxruntime": cpu._bench("onnxruntime", "step", *SMALL, "--compare", "onnxruntime-raw"),
        "growth steps": cpu.Row("bench.growth", ("steps", "--backend", "onnxruntime", "--points", "1", "2")),
    }
    monkeypatch.setattr(cpu, "ROWS", rows)
    output = tmp_path / "deep" / "cpu.json"
    told: list[str] = []
    results = cpu.run_all(["step onnxruntime"], tiny_bundle, output, {}, told.append)
    assert told[0] == "step onnxruntime (1 of 1)"
    assert json.loads(output.read_text()) == results
    first = results["rows"]["step onnxruntime"]
    assert first["status"] == "done"
    assert first["figures"]["peers"]["onnxruntime-raw"]["status"] == "done"
    both = cpu.run_all(["growth steps"], tiny_bundle, output, {}, told.append)
    assert both["rows"]["step onnxruntime"] == first
    assert [point["steps"] for point in both["rows"]["growth steps"]["figures"]["points"]] == [1, 2]
    shown = cpu.judgement(both)
    assert "onnxruntime by its plain graph" in shown
    assert "not measured" in shown


def test_a_row_that_fails_is_told_and_stops_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    outcome = cpu.run_row(cpu._bench("onnxruntime", "step", "-W", "100"), tiny_bundle)
    assert (outcome["status"], outcome["reason"]) == ("failed", "exit code 2")


def test_results_of_one_model_take_no_figures_of_another(tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "cpu.json"
    output.write_text(json.dumps({"model": {"sha256": "of another"}}))
    with pytest.raises(SystemExit, match="give another --output"):
        cpu.run_all([], tiny_bundle, output, {}, print)


def test_time_is_measured_against_each_axis(tiny_bundle: Path) -> None:
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        for axis, points in (("steps", (1, 2)), ("batch", (1, 2)), ("side", (64, 96))):
            found = growth.measure(pipe, axis, points, rounds=1, steps=1)
            assert [point[axis] for point in found] == list(points)
            for point in found:
                assert all(0 < loop < whole for loop, whole in zip(point["loop"], point["picture"], strict=True))
            assert {*growth.fits(axis, found)} == {"loop", "picture"}


def test_growth_is_the_exponent_of_a_power_law() -> None:
    quadratic = growth.fit([1, 2, 4, 8], [3, 12, 48, 192])
    assert quadratic["exponent"] == pytest.approx(2)
    line = growth.fit([1, 2, 4], [5, 7, 11])
    assert (line["intercept"], line["slope"], line["r2"]) == pytest.approx((3, 2, 1))
    points = [{"side": 10, "loop": [1.0, 9.0, 2.0], "picture": [4.0]}, {"side": 20, "loop": [8.0], "picture": [16.0]}]
    assert growth.fits("side", points)["loop"]["exponent"] == pytest.approx(1)  # four times the pixels, four the time


def judged(rows: dict[str, Any]) -> dict[str, str]:
    """By what is aimed at: the bound, what was measured, and the verdict."""
    shown = cpu.judgement({"rows": rows}).splitlines()
    assert shown[0].split() == ["AIM", "MEASURED"]
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in shown[1:])
    return {what: " ".join(rest.split()) for what, rest in lines.items()}


def test_what_was_aimed_at_stands_beside_what_was_measured() -> None:
    rows = {
        "step openvino": step_row("openvino:bf16", 4.2, openvino_raw=4.2, diffusers=12.0, diffusers_bf16=5.0),
        "growth steps": {"status": "done", "figures": {"fits": {"loop": {"exponent": 0.97}}}},
        "picture openvino": {"status": "failed"},
    }
    lines = judged(rows)
    assert lines["step by the bf16 floor"] == "<= 1.1 1.05 met"
    assert lines["step by openvino-raw"] == "<= 1.03 1 met"
    assert lines["step by diffusers bf16"] == "<= 0.75 0.84 missed"
    assert lines["exponent of steps"] == "<= 1 0.97 met"
    assert lines["picture by the best diffusers"] == "<= 0.7 failed"
    assert lines["exponent of batch"] == "<= 1 not measured"
    picture = {"sdrt": {"outside_engine": {"median": 0.001}}, "peers": {}}
    lines = judged({"picture openvino": {"status": "done", "figures": picture}})
    assert lines["outside the engine, ms a step"] == "<= 2 1 met"


def test_the_best_of_the_peers_is_the_fastest() -> None:
    found = step_row("openvino:bf16", 4.0, diffusers_bf16=8.0, diffusers_compile=5.0)["figures"]
    found["peers"]["diffusers"] = {"status": "skipped", "reason": "not installed"}
    assert cpu._ratio("step", "diffusers-bf16", "diffusers-compile", "diffusers")(found) == pytest.approx(0.8)
    assert cpu._ratio("step", "diffusers")(found) is None


def test_plots_are_drawn_of_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [{"steps": n, "loop": [2.0 * n], "picture": [2.0 * n + 1]} for n in (1, 2, 4)]
    rows = {
        "step openvino": step_row("openvino:bf16", 4.2, openvino_raw=4.1, diffusers=12.0),
        "growth steps": {
            "status": "done",
            "figures": {
                "axis": "steps",
                "backend": "openvino:bf16",
                "points": points,
                "fits": growth.fits("steps", points),
            },
        },
    }
    results = {"rows": rows}
    assert plots.bars(results, plots.STEP_ROWS, "step") == {
        "openvino-raw, bf16": (4.1, False),
        "sdrt, openvino:bf16": (4.2, True),
        "diffusers": (12.0, False),
    }
    figure = plots.peers(results)
    assert figure is not None
    axes: Any = figure.axes[0]
    assert len(figure.axes) == 1
    assert [bar.get_width() for bar in axes.patches] == [4.1, 4.2, 12.0]
    assert [line.get_xdata()[0] for line in axes.lines] == [4.0]
    plt.close(figure)
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["plots", "--results", str(tmp_path / "cpu.json"), "--output", str(tmp_path)])
    plots.main()
    assert len(capsys.readouterr().out.splitlines()) == 4
    for name in ("cpu-peers", "cpu-growth"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 200
        assert (tmp_path / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    assert plots.peers({"rows": {}}) is None
    assert plots.growth({"rows": {}}) is None
