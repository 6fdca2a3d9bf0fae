"""`sdrt run --backend`: what it takes, what it says, and how it starts."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from sdrt.cli import main
from sdrt.engines import demo, store
from sdrt.runtime.backends import fastest
from sdrt.runtime.kernels import kernels
from sdrt.runtime.openvino import default_precision

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "a large red star on a blue background"
QUICK = ["--bundle", "demo", "--steps", "2", "-W", "64", "-H", "64", "--seed", "1"]
REMARK = "sdrt: running on openvino:fp32; --backend openvino is faster, in bf16"


@pytest.fixture(scope="module")
def unpacked_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    demo.bundle_folder(folder)
    return folder


@pytest.fixture(autouse=True)
def here(unpacked_home: Path, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, and let the command choose."""
    shutil.copytree(unpacked_home, own_home, dirs_exist_ok=True)
    monkeypatch.delenv("SDRT_RUN_BACKEND")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """Run it and give its JSON and what is on standard error."""
    assert main(["run", PROMPT, *QUICK, *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_what_ran_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    facts, err = run(capsys, "--backend", "openvino:fp32")
    assert (facts["backend"], err) == ("openvino:fp32", "")
    assert 0 < facts["seconds"]["open"] < facts["seconds"]["until_first_step"] < facts["seconds"]["total"]
    facts, err = run(capsys, "--backend", "openvino")
    assert (facts["backend"], err) == (f"openvino:{default_precision()}", "")
    monkeypatch.setenv("SDRT_RUN_BACKEND", "onnxruntime")
    facts, err = run(capsys)
    assert (facts["backend"], err) == ("onnxruntime", "")


def test_auto_says_what_would_be_faster(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("sdrt.runtime.openvino.default_precision", lambda: "bf16")
    facts, err = run(capsys)
    assert facts["backend"] == fastest() == "openvino:fp32"
    assert err.startswith(REMARK)
    assert err.count("\n") == 1
    monkeypatch.setattr("sdrt.runtime.openvino.default_precision", lambda: "fp32")
    assert run(capsys)[1] == ""
    assert main(["run", PROMPT, *QUICK, "-o", "star.png"]) == 0
    assert capsys.readouterr() == ("star.png (seed 1)\n", "")


def test_a_second_run_compiles_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def kept() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in (store.home() / "compiled").rglob("*.blob")}

    run(capsys, "--backend", "openvino:fp32")
    first = kept()
    assert sorted(name.partition("-")[0] for name in first) == ["text_encoder", "unet", "vae_decoder"]
    run(capsys, "--backend", "openvino:fp32")
    assert kept() == first


@pytest.mark.parametrize("backend", ["openvino:int4", "cuda"])
def test_a_backend_that_does_not_exist_is_a_wrong_usage(capsys: pytest.CaptureFixture[str], backend: str) -> None:
    assert main(["run", PROMPT, *QUICK, "--backend", backend]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sdrt: backend is {backend!r}: expected one of auto, onnxruntime, openvino")
    assert err.count("\n") == 1


def test_a_damaged_graph_is_one_line(
    here: Path, unpacked_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever thread it is that loads it."""
    for name in ("text_encoder", "unet", "vae_decoder"):
        copy = here / name
        shutil.copytree(demo.bundle_folder(unpacked_home), copy)
        with (copy / f"{name}.onnx").open("r+b") as file:
            file.seek(100)
            file.write(b"\0\1\2\3")
        arguments = ["--bundle", str(copy), "--backend", "openvino:fp32"]
        assert main(["run", PROMPT, *QUICK, *arguments]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert f"{name}.onnx has SHA-256" in err
        assert err.count("\n") == 1


def test_doctor_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend"] == fastest()
    cpu, *more = facts["parts"]["openvino"]["devices"]
    assert cpu == ("CPU in bf16 and fp32" if default_precision() == "bf16" else "CPU in fp32")
    assert more == (["own kernels on AMX"] if kernels() else [])
