"""Engines from the command line, with the real builder on graphs that take it a moment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sdrt.cli import main
from sdrt.engines import build as build_module
from sdrt.engines import publish, store, targets, tensorrt
from sdrt.engines.bundle import Bundle
from sdrt.engines.devices import Gpu
from sdrt.runtime.backends import obstacle

from .engines import small_graphs

if TYPE_CHECKING:
    from sdrt.engines.manifest import Precision

BUILDER_ONLY = """
import importlib.abc, sys
class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime"}:
            raise ModuleNotFoundError(f"{name} is not there for this test", name=name)
sys.meta_path.insert(0, Nothing())
from sdrt.cli import main
sys.exit(main(sys.argv[1:]))
"""
SIZE = ("--size", "64x64")


def write(folder: Path, precision: Precision = "fp16", **given: str) -> Path:
    folder.mkdir(parents=True)
    small_graphs.fill(folder, precision, **given)
    return folder


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp16 ONNX bundle."""
    return write(tmp_path_factory.mktemp("graphs") / "v1-1-fp16")


@pytest.fixture(scope="module")
def built(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Engines of it, built where nothing of PyTorch and ONNX can be imported, and what was said."""
    folder = tmp_path_factory.mktemp("engines") / "v1-1-rtx"
    wanted = ["--target", "rtx3090, sm89", "--target", "RTX 5090", *SIZE, "--size", "128x64", "--images", "1"]
    command = ["build", "--from", str(graphs), *wanted, "--images", "2", "-o", str(folder), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", BUILDER_ONLY, *command], capture_output=True, text=True, check=False, timeout=300
    )
    return folder, done


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch)


def set_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    import sdrt.build
    import sdrt.show

    for module in (build_module, targets, tensorrt, sdrt.build, sdrt.show):
        monkeypatch.setattr(module, "nvidia_gpus", lambda: gpus)


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the export, which takes a minute and is tested elsewhere: small graphs, published as it does."""
    import sdrt.export.build as export_module

    made = []

    def build(ckpt: str, *, output: Path | None, name: str | None, precision: str, force: bool, **_: Any) -> Bundle:
        title = name or (output.name if output else Path(ckpt).name)
        chosen: Precision = "fp16" if precision == "fp16" else "fp32"
        with publish.publishing(output or store.place(title), force=force) as folder:
            small_graphs.fill(folder, chosen, name=title)
        made.append(f"{title} {chosen}")
        return Bundle.open(output or store.place(title))

    monkeypatch.setattr(export_module, "build", build)
    return made


def held(home: Path) -> list[str]:
    """All that is in the store, hidden folders too, but for locks."""
    return sorted(path.name for path in (home / "bundles").iterdir() if not path.name.endswith("-lock"))


def failure(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    """Run a command that must end in one line on standard error and nothing on standard output."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert err.startswith("sdrt: ")
    return err


def test_engines_are_built_without_torch(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = built
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["path"], facts["also_built"]) == (str(folder), [])
    assert facts["manifest"]["backend"]["compute_capabilities"] == ["8.6", "8.9", "12.0"]
    profiles = Bundle.open(folder).component("unet").profiles
    assert [profile["latents"].opt for profile in profiles] == [
        *[(batch, 4, 8, 8) for batch in (2, 4, 1)],
        *[(batch, 4, 8, 16) for batch in (2, 4, 1)],
    ]
    told = done.stderr.splitlines()
    assert told[0] == "sdrt: building engines with tensorrt-rtx (--backend and --target choose)"
    assert [line for line in told if line.endswith("done")] == [
        f"{part}: done" for part in ("text encoder", "U-Net", "VAE decoder", "VAE encoder")
    ]
    assert len(told) == len(set(told))


def test_list_and_inspect_tell_targets_backend_and_profiles(
    built: tuple[Path, subprocess.CompletedProcess[str]], own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(built[0], own_home / "bundles" / "mine")
    assert main(["list"]) == 0
    assert re.search(
        r"^mine +tensorrt-rtx +fp16 +sm86, sm89, sm120 at 64x64, 128x64 ", capsys.readouterr().out, re.MULTILINE
    )
    assert main(["inspect", "mine"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^targets +sm86 \(8\.6\), sm89 \(8\.9\), sm120 \(12\.0\)$", out, re.MULTILINE)
    assert re.search(r"^backend +tensorrt-rtx \d[0-9.]+, \w+$", out, re.MULTILINE)
    assert re.search(r"^unet +1 +latents 4x4x8x8, timestep 1, text_embeddings 4x77x8$", out, re.MULTILINE)
    assert re.search(r"^text_encoder +0 +input_ids 1\.\.4x77, clip_skip 1$", out, re.MULTILINE)
    assert main(["verify", "mine"]) == 0


def test_layers_are_listed_for_people_and_for_programs(
    built: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(built[0]), "--layers"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("COMPONENT")
    assert re.search(r"^unet +5 +\d+ ", out, re.MULTILINE)
    assert main(["inspect", str(built[0]), "--layers", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["layers"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert all(layer["name"] in out for layer in facts["layers"]["unet"]["layers"])
    assert facts["manifest"]["kind"] == "engine"


def test_a_build_for_engines_keeps_the_graphs_under_their_own_name(
    own_home: Path, export: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["--backend", "tensorrt-rtx", "--target", "rtx3090", *SIZE]
    assert main(["build", "--ckpt", "v1-1", *wanted]) == 0
    out, err = capsys.readouterr()
    assert export == ["v1-1-fp16 fp16"]
    assert held(own_home) == ["v1-1-fp16", "v1-1-rtx-sm86"]
    engines, graphs = out.splitlines()
    assert re.search(r"built .*/v1-1-rtx-sm86 \(.*\): engines for sm86 \(8\.6\): copy them to a machine", engines)
    assert graphs.endswith("graphs for engines for other GPUs: sdrt build --from v1-1-fp16 --target NAME")
    assert "sdrt:" not in err
    # As the last line says.
    assert main(["build", "--from", "v1-1-fp16", "--target", "rtx4090", *SIZE]) == 0
    assert held(own_home) == ["v1-1-fp16", "v1-1-rtx-sm86", "v1-1-rtx-sm89"]
    capsys.readouterr()
    err = failure(capsys, "build", "--ckpt", "v1-1", "--backend", "tensorrt-rtx", "--target", "5090", *SIZE, code=1)
    assert "v1-1-fp16 exists already: build engines of it with --from v1-1-fp16" in err
    assert "--force" in failure(capsys, "build", "--ckpt", "v1-1", *wanted, code=1)
    assert main(["build", "--ckpt", "v1-1", *wanted, "--force"]) == 0
    assert store.resolve(None, obstacle=obstacle).name == "v1-1-fp16"


def test_name_and_output_are_those_of_the_engines(
    own_home: Path, export: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--ckpt", "v1-1", "--target", "rtx3090", *SIZE, "--name", "mine", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], [also["name"] for also in facts["also_built"]]) == ("mine", ["mine-fp16"])
    assert main(["build", "--ckpt", "v1-1", "--target", "rtx3090", *SIZE, "-o", str(tmp_path / "there")]) == 0
    assert held(own_home) == ["mine", "mine-fp16", "v1-1-fp16"]
    assert Bundle.open(tmp_path / "there").manifest.kind == "engine"


def test_where_nobody_asks_for_engines_a_machine_without_a_gpu_gets_what_it_can_run(
    own_home: Path, export: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_trained_size", lambda _source: (64, 64))
    assert main(["build", "--ckpt", "v1-1"]) == 0
    out, err = capsys.readouterr()
    assert held(own_home) == ["v1-1", "v1-1-rtx-sm86"]
    assert export == ["v1-1 fp32", "v1-1 fp16"]
    assert "sdrt: there is no NVIDIA GPU here: building engines for the rtx3090" in err
    first, second = out.splitlines()
    assert re.search(r'/v1-1 \(.*\): sdrt run "Great Wall photo"$', first)
    assert "/v1-1-rtx-sm86 (" in second
    chosen = store.resolve(None, obstacle=obstacle)
    assert (chosen.name, chosen.manifest.precision) == ("v1-1", "fp32")


def test_where_nobody_asks_for_engines_output_is_what_this_machine_can_run(
    own_home: Path, export: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--ckpt", "v1-1", "-o", str(tmp_path / "here"), "--precision", "fp16"]) == 0
    assert export == ["here fp16"]
    assert Bundle.open(tmp_path / "here").manifest.kind == "onnx"
    assert Bundle.open(tmp_path / "here-rtx-sm86").manifest.kind == "engine"
    assert f'sdrt run "Great Wall photo" --bundle {tmp_path / "here"}' in capsys.readouterr().out


@pytest.mark.parametrize("asked", [["--backend", "onnx"], ["--precision", "fp32"]])
def test_graphs_alone_are_had_by_asking(own_home: Path, export: list[str], asked: list[str]) -> None:
    assert main(["build", "--ckpt", "v1-1", *asked]) == 0
    assert held(own_home) == ["v1-1"]


def test_without_a_builder_the_graphs_are_built_and_the_extra_is_named(
    own_home: Path, export: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_module, "find_spec", lambda _name: None)
    assert main(["build", "--ckpt", "v1-1"]) == 0
    assert held(own_home) == ["v1-1"]
    capsys.readouterr()
    for wanted in (["--ckpt", "v1-2", "--target", "rtx3090"], ["--from", "v1-1"]):
        err = failure(capsys, "build", *wanted, code=1)
        assert "tensorrt_rtx is not installed and building engines needs it: run pip install 'sdrt[rtx]'" in err


def test_what_is_missing_is_told_once_the_build_has_begun(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real export, stopped at its first stage."""
    import sdrt.export.build as export_module

    monkeypatch.setattr(build_module, "find_spec", lambda _name: None)
    monkeypatch.setattr(export_module, "_components", lambda *arguments: arguments[3].stage("U-Net: tracing") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["build", "--ckpt", str(tiny_checkpoint), "--name", "it"])
    err = capsys.readouterr().err
    assert "sdrt: building ONNX graphs alone: for engines for NVIDIA GPUs, pip install 'sdrt[rtx]'\n" in err


def test_engines_that_fail_leave_the_graphs_and_nothing_else(
    own_home: Path, export: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = small_graphs.fill

    def fill(folder: Path, precision: Precision, **given: str) -> object:
        if precision == "fp16":
            monkeypatch.setitem(small_graphs._NETWORKS, "vae_encoder", broken)
        return original(folder, precision, **given)

    whole = small_graphs._NETWORKS["vae_encoder"]
    broken = whole._replace(nodes=[("Magic" if node[0] == "Exp" else node[0], *node[1:]) for node in whole.nodes])
    monkeypatch.setattr(small_graphs, "fill", fill)
    monkeypatch.setattr(build_module, "_trained_size", lambda _source: (64, 64))
    assert main(["build", "--ckpt", "v1-1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^sdrt: tensorrt-rtx does not take vae_encoder\.onnx at node 3 \(Magic\): ", err, re.MULTILINE)
    assert held(own_home) == ["v1-1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "rtx9999"], "'rtx9999' is no known target: expected"),
        (["--target", "rtx3090,h100"], "h100 has compute capability 9.0, for which this TensorRT builds no engines"),
        (["--target", "native"], "the CUDA driver shows none"),
        (["--target", ","], "there is no target"),
        (["--size", "500x512"], "the width of 500x512 is 500: expected a multiple of 8 from 8 to 4096"),
        (["--size", "0x64"], "the width of 0x64 is 0"),
        (["--size", "64x-8"], "the height of 64x-8 is -8"),
        (["--size", "8192x512"], "the width of 8192x512 is 8192"),
        (["--size", "512"], "'512' is no size: expected width and height in pixels, such as 512x768"),
        (["--images", "0"], "0 images at once: expected 1 to 32"),
        (["--images", "33"], "33 images at once"),
        (["--images", "x"], "'x' is not a valid integer"),
        (["--dynamic"], "one of each is given: give another size or count too"),
        (["--dynamic", *SIZE, *SIZE, "--images", "2"], "or leave --dynamic out"),
        (["--optimization-level", "9"], "the optimization level is 9: expected 0 to 5"),
        (["--hardware-compatible"], "name several targets instead"),
        (["--version-compatible"], "no engines that load in other versions"),
        (["--refit"], "build without refit"),
        (["--backend", "cuda"], "'cuda' is not one of"),
        (["--backend", "onnx", "--target", "rtx3090"], "give --backend tensorrt-rtx or tensorrt"),
        (["--name", "../x"], "no name for a bundle"),
        (["-o", "nowhere/engines"], "expected a folder to put engines in: make it first"),
    ],
)
@pytest.mark.parametrize("of", ["--ckpt", "--from"])
def test_what_makes_no_sense_is_refused_before_anything_is_built(
    own_home: Path,
    graphs: Path,
    export: list[str],
    capsys: pytest.CaptureFixture[str],
    of: str,
    options: list[str],
    message: str,
) -> None:
    source = {"--ckpt": "v1-1", "--from": str(graphs)}[of]
    backend = [] if "--backend" in options else ["--backend", "tensorrt-rtx"]
    err = failure(capsys, "build", of, source, *backend, *options, code=2)
    assert message in err or ("onnx" in options and of == "--from" and "--from builds engines" in err)
    assert export == []
    assert not list(own_home.rglob("bundle.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--ckpt' or '--from'"),
        (["--ckpt", "v1-1", "--from", "v1-1"], "--ckpt and --from exclude each other"),
        (["--from", "graphs", "--ema"], "--ema is decided when graphs are made"),
        (["--from", "graphs", "--clip-skip", "0"], "--clip-skip is decided when graphs are made"),
        (["--from", "graphs", "--precision", "fp32"], "holds fp16 graphs, and --precision is fp32"),
        (["--from", "single"], "holds fp32 graphs, of which engines would be slow and large"),
        (["--from", "engines"], "holds tensorrt-rtx engines, expected ONNX graphs"),
        (["--from", "a b"], "no name for a bundle"),
    ],
)
def test_sources_that_make_no_sense_are_refused(
    own_home: Path,
    graphs: Path,
    built: tuple[Path, object],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    for name, folder in {"graphs": graphs, "engines": built[0]}.items():
        shutil.copytree(folder, own_home / "bundles" / name)
    write(own_home / "bundles" / "single", "fp32")
    assert message in failure(capsys, "build", *arguments, code=2)
    assert held(own_home) == ["engines", "graphs", "single"]


def test_what_cannot_be_had_here_fails(
    graphs: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rtx = ("build", "--from", str(graphs), "--backend", "tensorrt-rtx", *SIZE)
    assert "there is no bundle 'v1-9'" in failure(capsys, "build", "--from", "v1-9", code=1)
    err = failure(capsys, "build", "--from", str(graphs), "--backend", "tensorrt", code=1)
    assert "tensorrt builds engines on the GPU that will run them, and the CUDA driver shows none here" in err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_rtx", None)
        assert "tensorrt_rtx is not installed" in failure(capsys, *rtx, code=1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", None)
        set_gpus(patch, Gpu(0, "NVIDIA H200", "9.0", 139 * 2**30))
        err = failure(capsys, "build", "--from", str(graphs), "--backend", "tensorrt", code=1)
        assert (
            "tensorrt is not installed and building engines for tensorrt needs it: run pip install 'sdrt[trt]'" in err
        )
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")  # noqa: PYI024 - as shutil's own
        patch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 1000, 1000))
        assert "bytes and the disk has 1000 bytes free" in failure(capsys, *rtx, code=1)
    assert not list(own_home.rglob("*building*"))


def test_layers_are_those_of_engines(graphs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = failure(capsys, "inspect", str(graphs), "--layers", code=2)
    assert "has no list of layers, since it holds ONNX graphs: build engines of it with sdrt build --from" in err
    assert "--layers lists those of engines" in failure(capsys, "inspect", "wall.png", "--layers", code=2)


def test_fp32_engines_are_had_by_asking(
    tmp_path: Path, own_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_BUILD_FROM", str(write(tmp_path / "single", "fp32")))
    monkeypatch.setenv("SDRT_BUILD_TARGET", "rtx3090 rtx4090")
    monkeypatch.setenv("SDRT_BUILD_SIZE", "64x64")
    assert main(["build", "--precision", "fp32"]) == 0
    assert held(own_home) == ["single-rtx-sm86-sm89"]
    assert store.resolve("single-rtx-sm86-sm89").manifest.precision == "fp32"


def test_engines_for_the_gpu_here_can_be_run_here(
    graphs: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engines are real; the GPU is not: nothing runs on it."""
    set_gpus(monkeypatch, Gpu(0, "NVIDIA GeForce RTX 3090", "8.6", 24 * 2**30))
    monkeypatch.setattr(build_module, "find_spec", lambda name: name if name == "tensorrt_rtx" else None)
    monkeypatch.setattr(build_module, "_trained_size", lambda _source: (64, 64))
    assert main(["build", "--from", str(graphs)]) == 0
    out, err = capsys.readouterr()
    assert out.endswith('): sdrt run "Great Wall photo"\n')
    assert "building engines with tensorrt-rtx for the NVIDIA GeForce RTX 3090 (compute capability 8.6)" in err
    assert held(own_home) == ["v1-1-rtx-sm86"]


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no signal there")
def test_ctrl_c_cancels_the_build_and_leaves_nothing_behind(tiny_fp16_bundle: Path, own_home: Path) -> None:
    """At the real U-Net, which takes seconds: the small graphs would be done before the signal arrives."""
    command = [sys.executable, "-m", "sdrt", "build", "--from", str(tiny_fp16_bundle), "--backend", "tensorrt-rtx"]
    with subprocess.Popen([*command, *SIZE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if re.match(r"U-Net: (?!verifying|reading)", line):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, ""), "".join([*told, err])
    # click puts an empty line after the terminal's ^C
    assert err.splitlines()[-3:] == ["U-Net: cancelling", "", "sdrt: interrupted"]
    assert "Traceback" not in err
    assert held(own_home) == []


def test_doctor_tells_what_engines_can_be_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^tensorrt-rtx +build engines .*\d+\.\d+.* for sm75, .*sm86", out, re.MULTILINE)
    assert re.search(r"^tensorrt +build engines for the NVIDIA GPU of this machine", out, re.MULTILINE)
