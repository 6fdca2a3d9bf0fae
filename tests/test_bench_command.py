"""`sdrt bench`: real processes of sdrt and its peers on a small model; what they took is nobody's business here."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdrt.benchmark import rounds
from sdrt.benchmark.contenders import OWN, PEERS, reason_to_skip
from sdrt.benchmark.flops import graph_flops
from sdrt.benchmark.report import facts, table
from sdrt.benchmark.rounds import compete
from sdrt.benchmark.settings import Settings
from sdrt.benchmark.worker import Worker, WorkerError
from sdrt.cli import main
from sdrt.engines.bundle import Bundle
from sdrt.errors import BackendError
from sdrt.export.checkpoint import read_checkpoint
from sdrt.export.modules import unet

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["-W", "64", "-H", "64", "--steps", "3", "--rounds", "2", "--backend", "onnxruntime"]
EXACT = ["diffusers", "openvino-raw-fp32", "onnxruntime-raw"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are so small that a second thread costs torch more than it gives."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def settings(tiny_bundle: Path, tiny_checkpoint: Path) -> Settings:
    return Settings(
        bundle=str(tiny_bundle),
        backend="onnxruntime",
        steps=2,
        width=64,
        height=64,
        batch=1,
        sampler="ddim",
        cfg_scale=7.5,
        rounds=2,
        launches=1,
        guidance_interval=None,
        cache_interval=1,
        encoder_interval=1,
        parts=("step",),
        checkpoint=str(tiny_checkpoint),
        step_flops=None,
        no_floor="of no interest here",
    )


def measured(
    capsys: pytest.CaptureFixture[str], bundle: Path, *arguments: str, code: int = 0
) -> tuple[dict[str, Any], str]:
    """Run it and give its JSON and what is on standard error."""
    assert main(["bench", "--bundle", str(bundle), *SMALL, *arguments, "--json"]) == code
    out, err = capsys.readouterr()
    return json.loads(out), err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run what makes no sense and give its one line."""
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_all_make_the_same_pictures_in_turns(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    peers = [*EXACT, "diffusers-bf16"]
    found, err = measured(
        capsys, tiny_bundle, "--compare", ",".join(peers), "--ckpt", str(tiny_checkpoint), "--only", "step,picture"
    )
    assert list(found["peers"]) == peers
    for name, peer in found["peers"].items():
        assert peer["status"] == "done", peer
        # null is what JSON has for the infinite ratio of equal pictures
        psnr = math.inf if peer["psnr_db"] is None else peer["psnr_db"]
        assert psnr > (90 if name in EXACT else 25)
        for part in ("step", "picture"):
            assert len(peer[part]["all"]) == 2
            assert peer[part]["median"] == statistics.median(peer[part]["all"])
            # all in one group here, so sdrt's turns are those that it is compared by
            assert peer["ratio"][part] == pytest.approx(found["sdrt"][part]["median"] / peer[part]["median"])
    assert found["peers"]["diffusers-bf16"]["precision"] == "bf16"
    assert f"round 2 of 2: sdrt, floor, {', '.join(peers)}" in err
    shown = table(found)
    assert all(f"\n{name} " in shown for name in (OWN, *peers))


def test_sdrt_by_itself_is_measured_in_every_respect(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    found, _ = measured(capsys, tiny_bundle, "--cache-interval", "2", "--sampler", "euler")
    own = found["sdrt"]
    assert (found["backend"], own["backend"]) == ("onnxruntime", "onnxruntime")
    assert (found["bundle"], found["precision"]) == (tiny_bundle.name, "fp32")
    assert found["settings"]["sampler"] == "euler"
    assert found["settings"]["cache_interval"] == 2
    for part in ("text", "step", "decode", "picture"):
        assert 0 < own[part]["median"] <= own[part]["p95"] <= max(own[part]["all"])
    # 3 steps in each of 2 pictures: the whole U-Net in the first and the third
    assert {kind: len(times["all"]) for kind, times in own["evaluations"].items()} == {
        "whole, guided": 4,
        "shallow, guided": 2,
    }
    # of 2 steps by themselves, and of all steps of the pictures but their first
    assert len(own["outside_engine"]["all"]) == 2 + 2 * 2
    assert all(0 < seconds < own["picture"]["median"] for seconds in own["outside_engine"]["all"])
    assert own["iterations_per_second"] == pytest.approx(3 / own["loop"]["median"])
    assert own["start"]["cold"] > 0
    assert len(own["start"]["warm"]["all"]) == 2
    assert own["process"]["peak_gb"] > 0.03
    assert found["peers"] == {}
    for precision in ("bf16", "fp32"):
        floor = found["floor"][precision]
        assert floor["step"] == pytest.approx(found["floor"]["step_flops"] / (1e9 * floor["gflops"]))
    assert found["machine"]["cores"] >= 1
    assert "until the first step" in table(found)


def test_operations_are_those_that_torch_counts(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    model = unet(read_checkpoint(str(tiny_checkpoint)).unet, torch.float32)
    width = Bundle.open(tiny_bundle).manifest.text.embedding_width
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(2, 4, 12, 8), torch.ones(1), torch.zeros(2, 77, width))
    counted = graph_flops(tiny_bundle / "unet.onnx", {"batch": 2, "height": 12, "width": 8})
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_operations_of_a_quantised_graph_are_those_of_the_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    """Rounding is put before an input of a multiplication, and the shape of what it makes is written nowhere."""
    model = onnx.load(tiny_bundle / "unet.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    name = node.input[0]
    helper = onnx.helper
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", [name, "scale"], ["narrow"]),
            helper.make_node("DequantizeLinear", ["narrow", "scale"], ["wide"]),
        ]
    )
    node.input[0] = "wide"
    onnx.save(model, tmp_path / "unet.onnx")
    sizes = {"batch": 1, "height": 8, "width": 8}
    assert graph_flops(tmp_path / "unet.onnx", sizes) == graph_flops(tiny_bundle / "unet.onnx", sizes)


def test_a_graph_that_does_not_tell_its_shapes_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"unet\.onnx does not tell the shape of .*'height'"):
        graph_flops(tiny_bundle / "unet.onnx", {"batch": 2})


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--compare", "diffusers,foo"], "there is no peer 'foo' to compare with: expected some of diffusers, "),
        (["--only", "step,bar"], "there is no part 'bar' to measure: expected some of text, step, decode, picture, "),
        (["--only", "start", "--compare", "diffusers"], "--compare compares text, step, decode, picture, and --only"),
        (["--ckpt", "./nowhere"], "there is no checkpoint './nowhere': expected what sdrt build --ckpt takes"),
        (["--rounds", "0"], "'--rounds': 0 is not in the range"),
        (["--launches", "0"], "'--launches': 0 is not in the range"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["-W", "100"], "width is 100: expected a multiple of 8"),
        (["--backend", "quick"], "backend is 'quick': expected one of"),
        (["--guidance-interval", "5"], "'5' is no interval"),
    ],
)
def test_what_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, arguments: list[str], line: str
) -> None:
    assert line in refused(capsys, "--bundle", str(tiny_bundle), *arguments)


def test_the_help_names_every_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    text = "".join(capsys.readouterr().out.split())  # lines break at hyphens
    assert all(name in text for name in PEERS)


def test_a_peer_that_cannot_be_run_is_left_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason_to_skip("diffusers", settings) is None
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in {"openvino", "torch"} else known(name)
    )
    assert reason_to_skip("openvino-raw", settings) == "openvino not installed: run pip install 'sdrt[openvino]'"
    assert reason_to_skip("diffusers", settings) == "torch not installed: run pip install 'sdrt[export]'"


def test_compiling_needs_a_compiler(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert str(reason_to_skip("diffusers-compile", settings)).startswith("torch.compile needs a C++ compiler")


def test_a_peer_that_fails_stops_nobody(capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path) -> None:
    found, err = measured(
        capsys, tiny_bundle, "--only", "step", "--compare", "diffusers,onnxruntime-raw", "--ckpt", str(tmp_path)
    )
    failed = found["peers"]["diffusers"]
    assert failed["status"] == "failed"
    assert "is no diffusers folder: expected model_index.json" in failed["reason"]
    assert "diffusers failed" in err
    assert "diffusers failed" in table(found)
    assert found["peers"]["onnxruntime-raw"]["status"] == "done"


def test_weights_come_from_what_the_bundle_was_built_of(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def asked(command: str) -> Any:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_bundle, folder)
        manifest = json.loads((folder / "bundle.json").read_text())
        (folder / "bundle.json").write_text(json.dumps(manifest | {"command": command}))
        found, _ = measured(capsys, folder, "--only", "text")
        return found["checkpoint"]

    assert asked(f"sdrt build --ckpt {tiny_checkpoint} --force") == str(tiny_checkpoint)
    assert asked(f"sdrt build --ckpt={tiny_checkpoint}") == str(tiny_checkpoint)
    assert asked("sdrt build --ckpt /nowhere/at/all") is None


def test_without_weights_peers_that_need_them_are_left_out(settings: Settings) -> None:
    without = Settings(**(vars(settings) | {"checkpoint": None}))
    assert "give it with --ckpt" in str(reason_to_skip("diffusers-bf16", without))
    assert reason_to_skip("onnxruntime-raw", without) is None


def test_what_memory_does_not_hold_at_once_is_measured_in_groups(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "available_memory", lambda: 0)
    told: list[str] = []
    records = compete(settings, ["onnxruntime-raw", "openvino-raw-fp32"], told.append)
    assert [line for line in told if line.startswith("round 1")] == [
        "round 1 of 2: sdrt, onnxruntime-raw",
        "round 1 of 2: sdrt, openvino-raw-fp32",
    ]
    own = records[OWN].turns["step"]
    assert len(own) == 4
    assert records["onnxruntime-raw"].own["step"] == own[:2]
    assert records["openvino-raw-fp32"].own["step"] == own[2:]
    found = facts(settings, records, None, {"load_average": None})
    peer = found["peers"]["openvino-raw-fp32"]
    assert peer["ratio"]["step"] == pytest.approx(
        np.median([turn.seconds for turn in own[2:]]) / peer["step"]["median"]
    )
    assert found["floor"] == {"reason": "of no interest here"}


def test_all_are_started_anew_at_each_launch(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path
) -> None:
    peers = ["--compare", "onnxruntime-raw,diffusers", "--ckpt", str(tmp_path)]
    found, err = measured(capsys, tiny_bundle, "--only", "step", "--launches", "2", *peers)
    for figures in (found["sdrt"], found["peers"]["onnxruntime-raw"]):
        assert len(figures["step"]["all"]) == 4
    told = [line.removeprefix("sdrt: ") for line in err.splitlines()]
    assert told.count("launch 2 of 2") == 1
    assert told.count("sdrt: loading") == told.count("round 2 of 2: sdrt, floor, onnxruntime-raw") == 2
    assert told.count("diffusers: loading") == 1, "what has failed is not tried again"
    assert "2 rounds of each of 2 launches" in table(found)


def test_a_process_that_is_killed_is_told_of(settings: Settings) -> None:
    with Worker("onnxruntime-raw", settings) as worker:
        assert worker.turn("step", 1).seconds > 0
        os.kill(worker._process.pid or 0, signal.SIGKILL)
        with pytest.raises(WorkerError, match="its process was killed, for want of memory perhaps"):
            worker.turn("step", 2)


def test_sdrt_failing_ends_it(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    data = bytearray((broken / "unet.onnx.data").read_bytes())
    data[-1] ^= 1
    (broken / "unet.onnx.data").write_bytes(data)
    assert main(["bench", "--bundle", str(broken), *SMALL, "--only", "step"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "unet.onnx.data" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_gpu_is_not_compared_with_a_cpu(
    capsys: pytest.CaptureFixture[str], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdrt.benchmark.bench.nvidia_gpus", lambda: ["a GPU"])
    line = refused(capsys, "--bundle", str(tiny_bundle), *SMALL, "--compare", "diffusers")
    assert "runs on an NVIDIA GPU: set CUDA_VISIBLE_DEVICES= to have it on the CPU" in line
