"""What the bench for GPUs does where something is missing: it says so, and goes on."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from bench import gpu
from bench.gpu import Row, reason_to_skip, run_all, run_row, table

from sdrt.engines.devices import Gpu

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "nvidia_gpus", lambda: (Gpu(0, "NVIDIA Made Up", "8.6", 2**34),))


def test_rows_are_skipped_for_what_is_missing(there_is_a_gpu: None) -> None:
    row = Row("mine", ("json", "no_such_package", "no.such.module"), ("other",), most=60)
    assert reason_to_skip(row, {}, 60) == "not installed: no_such_package, no.such.module"
    row = Row("mine", ("json",), ("other",), most=60)
    assert reason_to_skip(row, {"other": {"status": "skipped"}}, 60) == "it needs other"
    assert reason_to_skip(row, {"other": {"status": "done"}}, 19) == "19 seconds are left"
    assert reason_to_skip(row, {"other": {"status": "done"}}, 21) is None


def test_without_a_gpu_every_row_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "nvidia_gpus", tuple)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    gpu.main()
    out = capsys.readouterr().out
    assert out.count("skipped: no NVIDIA GPU: the CUDA driver shows none") == len(gpu.ROWS)
    assert not (tmp_path / "results").exists()


def rows_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Let rows be this code instead of the measurements."""
    package = tmp_path / "bench"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "gpu_rows.py").write_text(code)
    monkeypatch.chdir(tmp_path)


def test_a_row_that_fails_tells_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows_that(monkeypatch, tmp_path, "import sys\nprint('noise')\nsys.exit('first\\nno engines for sm90')")
    outcome = run_row(Row("mine", ()), [], 60)
    assert (outcome["status"], outcome["reason"]) == ("failed", "no engines for sm90")


def test_a_row_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows_that(monkeypatch, tmp_path, "import time\ntime.sleep(60)")
    assert run_row(Row("mine", ()), [], 1) == {"status": "failed", "reason": "it took more than 1 seconds"}


def test_rows_follow_each_other_and_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there_is_a_gpu: None
) -> None:
    figures: dict[str, Any] = {
        "step_ms": 25.0,
        "latency_s": {"1x20": 0.6},
        "psnr_db": {"1": 50.5},
        "start_s": {"cold": 9.0, "warm": 2.0},
    }
    code = f"import sys\nprint('noise')\nprint({json.dumps(figures)!r} if sys.argv[1] == 'b' else '{{\"tflops\": 70}}')"
    rows_that(monkeypatch, tmp_path, code)
    told: list[str] = []
    done = run_all((Row("a", ()), Row("b", (), ("a",)), Row("c", (), ("none",))), [], 600, told.append)
    assert told == ["a: done", "b: done", "c: skipped it needs none"]
    text = table(done)
    assert [line.split() for line in text.splitlines() if line.startswith("b ")] == [
        ["b", "25", "40", "0.6", "9/2", "50.5"]
    ]
    assert "a: tflops 70 (" in text
    assert "c skipped: it needs none" in text
