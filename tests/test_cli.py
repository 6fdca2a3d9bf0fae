"""The command line, in process where that tells the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sdrt.cli import main
from sdrt.runtime.backends import fastest

PROMPT = "Great Wall photo"
QUICK = ["--steps", "2", "-W", "64", "-H", "64", "--seed", "42"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def store(own_home: Path, tiny_bundle: Path) -> Path:
    """A store that holds one bundle, called tiny."""
    bundles = own_home / "bundles"
    bundles.mkdir(parents=True)
    shutil.copytree(tiny_bundle, bundles / "tiny")
    return bundles


def failure(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    """Run a command that must end in one line on standard error and nothing on standard output."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sdrt: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_run_saves_a_png_that_says_how_it_was_made(here: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", PROMPT, "-n", "fog", *QUICK]) == 0
    out = capsys.readouterr().out
    (picture,) = here.iterdir()
    assert out == f"{picture.name} (seed 42)\n"
    assert picture.name == "great-wall-photo-42.png"
    with Image.open(picture) as image:
        assert image.size == (64, 64)
        assert len(image.getcolors(64 * 64) or []) > 100
    assert main(["inspect", str(picture)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        f"{PROMPT}\nNegative prompt: fog\nSteps: 2, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 64x64"
    )
    assert "RNG: CPU" in text
    assert main(["inspect", str(picture), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["Prompt"] == PROMPT
    assert facts["Negative prompt"] == "fog"
    assert facts["Seed"] == "42"


def test_json_is_all_of_standard_output(here: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", PROMPT, *QUICK, "-b", "2", "-o", "wall.png", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [image["seed"] for image in facts["images"]] == [42, 43]
    assert [Path(image["path"]).name for image in facts["images"]] == ["wall-0.png", "wall-1.png"]
    assert sorted(path.name for path in here.iterdir()) == ["wall-0.png", "wall-1.png"]
    assert facts["bundle"] == "tiny"
    assert facts["seconds"]["total"] > 0
    for command in (["list"], ["inspect", "tiny"], ["verify", "tiny"], ["doctor"]):
        assert main([*command, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_a_seed_gives_the_same_file_and_names_overwrite_nothing(here: Path, store: Path) -> None:
    assert main(["run", PROMPT, *QUICK]) == 0
    assert main(["run", PROMPT, *QUICK]) == 0
    first, second = sorted(here.iterdir())
    assert {first.name, second.name} == {"great-wall-photo-42.png", "great-wall-photo-42-2.png"}
    assert first.read_bytes() == second.read_bytes()


def test_a_random_seed_is_told(here: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", PROMPT, "--steps", "1", "-W", "64", "-H", "64"]) == 0
    match = re.fullmatch(r"(great-wall-photo-(\d+)\.png) \(seed (\d+)\)\n", capsys.readouterr().out)
    assert match is not None
    assert match[2] == match[3]


def test_options_are_environment_variables(
    here: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "STEPS": "3",
        "WIDTH": "64",
        "HEIGHT": "72",
        "SEED": "5",
        "SAMPLER": "euler",
        "OUTPUT": "e.png",
        "CFG_SCALE": "1",
        "JSON": "1",
        "BUNDLE": "tiny",
    }.items():
        monkeypatch.setenv(f"SDRT_RUN_{name}", value)
    assert main(["run", PROMPT]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["steps"], facts["height"], facts["sampler"], facts["cfg_scale"]) == (3, 72, "euler", 1.0)
    assert (here / "e.png").is_file()


def test_approximations_are_asked_for_by_name_and_told(
    here: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*QUICK, "--sampler", "ddim", "--steps", "6", "--json"]
    assert main(["run", PROMPT, *quick, "-o", "exact.png"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["guidance_interval"], facts["cache_interval"], facts["encoder_interval"]) == (None, 1, 1)
    options = ["--guidance-interval", "0.3,inf", "--cache-interval", "2", "--encoder-interval", "3"]
    assert main(["run", PROMPT, *quick, "-o", "a.png", *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["guidance_interval"], facts["cache_interval"], facts["encoder_interval"]) == ([0.3, None], 2, 3)
    assert main(["inspect", "a.png", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["Guidance interval"], told["Cache interval"], told["Encoder interval"]) == ("0.3,inf", "2", "3")
    monkeypatch.setenv("SDRT_RUN_GUIDANCE_INTERVAL", told["Guidance interval"])
    monkeypatch.setenv("SDRT_RUN_CACHE_INTERVAL", told["Cache interval"])
    monkeypatch.setenv("SDRT_RUN_ENCODER_INTERVAL", told["Encoder interval"])
    assert main(["run", PROMPT, *quick, "-o", "b.png"]) == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes() != (here / "exact.png").read_bytes()


def test_list_and_inspect_show_the_bundle(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert re.search(r"^tiny +onnx +fp32", capsys.readouterr().out, re.MULTILINE)
    assert main(["inspect", "tiny"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"unet .*latents batchx4xheightxwidth.*dB", out)
    assert main(["verify", "tiny"]) == 0
    assert "is whole" in capsys.readouterr().out


def test_an_empty_store_says_how_to_fill_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "sdrt build --ckpt v1-1" in capsys.readouterr().out


def test_doctor_names_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"onnxruntime +run ONNX bundles, on the CPU +\d+\.\d+.*CPU", out)
    assert re.search(r"openvino +run ONNX bundles, on the CPU +\d+\.\d+.*CPU in .*fp32", out)
    assert re.search(r"export +build bundles from checkpoints +2\.", out)
    assert re.search(rf"^ONNX bundles +run on {fastest()}$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-W", "100"], "width is 100: expected a multiple of 8"),
        (["-H", "-8"], "height is -8"),
        (["-H", "x"], "'x' is not a valid integer"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--steps", "-1"], "num_inference_steps is -1"),
        (["--cfg-scale", "nan"], "guidance scale is nan"),
        (["--cfg-scale", "strong"], "'strong' is not a valid float"),
        (["--sampler", "magic"], "sampler is 'magic'"),
        (["-b", "0"], "num_images_per_prompt is 0"),
        (["--seed", "1.5"], "'1.5' is not a valid integer"),
        (["--clip-skip", "9"], "clip skip is 9"),
        (["--guidance-interval", "5"], "'5' is no interval: expected two noise levels (sigma), such as 0.3,5"),
        (["--guidance-interval", "a,b"], "'a,b' is no interval"),
        (["--guidance-interval", "5,0.3"], "guidance interval is (5.0, 0.3): expected two noise levels"),
        (["--guidance-interval", "nan,5"], "guidance interval is (nan, 5.0)"),
        (["--cache-interval", "0"], "cache_interval is 0: expected a whole number of at least 1"),
        (["--cache-interval", "x"], "'x' is not a valid integer"),
        (["--encoder-interval", "0"], "encoder_interval is 0: expected a whole number of at least 1"),
        (["-o", "picture.jpg"], "expected a name that ends in .png"),
        (["-o", "nowhere/picture.png"], "there is no folder 'nowhere'"),
        (["--nonsense"], "No such option"),
        (["--bundle", "a/../../b\0"], "NUL"),
        (["-n", "nul\0"], "NUL character"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    here: Path, store: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in failure(capsys, "run", PROMPT, *options, code=2)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("prompt", "code"), [("", 0), ("🚀 over the 長城", 0), ("word " * 2000, 0), ("nul\0inside", 2), ("half \ud83d", 2)]
)
def test_prompts_are_handled_or_refused(
    here: Path, store: Path, capsys: pytest.CaptureFixture[str], prompt: str, code: int
) -> None:
    assert main(["run", prompt, "--steps", "1", "-W", "64", "-H", "64", "--seed", "0"]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert len(list(here.iterdir())) == (1 if code == 0 else 0)
    if len(prompt) > 1000:
        assert "sdrt: warning: the prompt is 2000 tokens long" in err
        assert err.count("\n") == 1


def test_a_missing_bundle_lists_those_that_exist(here: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = failure(capsys, "run", PROMPT, "--bundle", "v1-7", code=1)
    assert "tiny" in err
    assert "sdrt build" in err


@pytest.mark.parametrize("name", ["../../etc", "a b", "-x"])
def test_names_that_are_tricks_are_refused(store: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["inspect", "--", name]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_partly_copied_bundle_names_the_file(
    here: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    size = (copy / "unet.onnx.data").stat().st_size
    os.truncate(copy / "unet.onnx.data", 1000)
    err = failure(capsys, "run", PROMPT, "--bundle", str(copy), *QUICK, code=1)
    assert f"unet.onnx.data has 1000 bytes, expected {size}" in err
    (copy / "unet.onnx.data").unlink()
    assert "unet.onnx.data is missing" in failure(capsys, "run", PROMPT, "--bundle", str(copy), *QUICK, code=1)
    assert "unet.onnx.data is missing" in failure(capsys, "verify", str(copy), code=1)
    assert not list(here.iterdir())


def test_a_corrupted_bundle_names_the_file_and_both_hashes(
    here: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    with (copy / "vae_decoder.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"\0\1\2\3")
    for command in (["run", PROMPT, "--bundle", str(copy), *QUICK], ["verify", str(copy)]):
        assert re.search(r"vae_decoder\.onnx has SHA-256 \w{64}, expected \w{64}", failure(capsys, *command, code=1))
    assert not list(here.iterdir())


def test_a_manifest_that_leaves_the_folder_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["tokenizer"]["path"] = "../../secret.json"
    (copy / "bundle.json").write_text(json.dumps(manifest))
    err = failure(capsys, "inspect", str(copy), code=1)
    assert "tokenizer.path" in err


@pytest.mark.parametrize("what", ["missing.png", "text.png"])
def test_inspect_refuses_what_is_no_picture(here: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    (here / "text.png").write_text("no picture")
    assert what in failure(capsys, "inspect", what, code=2)


def test_a_picture_of_somebody_else_has_no_parameters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    assert "no 'parameters' text" in failure(capsys, "inspect", "plain.png", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "no/such/file.ckpt"], "no/such/file.ckpt"),
        (["--ckpt", "", "--name", "x"], "'' does not exist"),
        (["--ckpt", "v1-1", "--name", "../x"], "no name for a bundle"),
        (["--ckpt", "v1-1", "--precision", "fp8"], "'fp8' is not one of"),
        ([], "Missing option '--ckpt'"),
    ],
)
def test_builds_that_make_no_sense_are_refused(
    here: Path, own_home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["build", *arguments]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not list(here.iterdir())
    assert not list(own_home.rglob("bundle.json"))


def test_an_existing_bundle_is_replaced_only_with_force(
    here: Path, store: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = failure(capsys, "build", "--ckpt", str(tiny_checkpoint), "--name", "tiny", code=1)
    assert "--force" in err


def test_ctrl_c_ends_cleanly(here: Path, store: Path) -> None:
    command = [sys.executable, "-m", "sdrt", "run", PROMPT, "--steps", "900", "-W", "128", "-H", "128"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.strip().endswith("sdrt: interrupted")
    assert "Traceback" not in err
    assert not list(here.iterdir())


def test_python_m_sdrt_and_a_closed_pipe(store: Path) -> None:
    command = f"{sys.executable} -m sdrt list --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert done.stderr == ""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    from sdrt import __version__

    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    for command in ([], ["build"], ["run"], ["list"], ["inspect"], ["verify"], ["doctor"]):
        assert main([*command, "--help"]) == 0
        assert "Usage: sdrt" in capsys.readouterr().out
