"""The commands of engines/README.md as they stand there, on small bundles."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from sdrt.engines.bundle import Bundle

from . import small_graphs

README = Path(__file__).parents[2] / "engines" / "README.md"
SECTION = README.read_text(encoding="utf-8").partition("\n## With polygraphy\n")[2]
INSPECT, REDUCE, COMPARE, COMPARE_ENGINE = (
    [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if not line.startswith("export ")]
    for block in re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
)
VARIABLES = dict(re.findall(r"^export (\w+)=(\w+)$", SECTION, re.MULTILINE))


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    for name, precision in (("v1-1", "fp32"), ("v1-1-fp16", "fp16")):
        (tmp_path / name).mkdir()
        small_graphs.fill(tmp_path / name, precision)  # type: ignore[arg-type]  # one of the two
    return tmp_path


def run(command: list[str], folder: Path, *, code: int = 0) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=os.environ | VARIABLES | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def break_encoder(bundles: Path) -> None:
    """Put an operator into the fp16 graph that is ONNX's and that TensorRT does not have."""
    path = bundles / "v1-1-fp16" / "vae_encoder.onnx"
    model = onnx.load(path, load_external_data=False)
    exp = next(node for node in model.graph.node if node.op_type == "Exp")
    model.graph.node.append(onnx.helper.make_node("Bernoulli", ["before"], list(exp.output), "node_bernoulli"))
    exp.output[0] = "before"
    onnx.save(model, path)


def test_a_graph_is_shown_and_taken(bundles: Path) -> None:
    model, capability = (run(command, bundles) for command in INSPECT)
    assert "{prediction [dtype=float32, shape=('batch', 4, 'height', 'width')]}" in model
    assert "[Op: ReduceMean]" in model
    assert "Graph is fully supported by TensorRT" in capability


def test_what_tensorrt_does_not_take_is_named_and_cut_out(bundles: Path) -> None:
    break_encoder(bundles)
    told = run([word.replace("unet", "vae_encoder") for word in INSPECT[1]], bundles)
    assert re.search(r"\| Bernoulli +\| node_bernoulli +\|", told)
    (reduce,) = REDUCE
    run(reduce, bundles)
    assert [node.name for node in onnx.load(bundles / "reduced.onnx").graph.node] == ["node_bernoulli"]


def test_precisions_are_compared(tiny_bundle: Path, tiny_fp16_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "v1-1").symlink_to(tiny_bundle)
    (tmp_path / "v1-1-fp16").symlink_to(tiny_fp16_bundle)
    reference, compare = COMPARE
    width = Bundle.open(tiny_bundle).manifest.text.embedding_width
    run([word.replace("77,768]", f"77,{width}]") for word in reference], tmp_path)
    assert re.search(r"PSNR: \d+\.\d+ dB \(min required: 50 dB\) \| PASSED", run(compare, tmp_path))
    assert "FAILED" in run([word.replace("50", "500") for word in compare], tmp_path, code=1)


def test_an_engine_would_be_compared(bundles: Path) -> None:
    """There is no GPU here: the command is turned into the program that it stands for, which does not run."""
    (compare,) = COMPARE_ENGINE
    run([*compare, "--gen-script", "compare.py"], bundles)
    program = (bundles / "compare.py").read_text(encoding="utf-8")
    assert "TrtRunner(deserialize_engine, optimization_profile=0, allocation_strategy='profile')" in program
    assert "BytesFromPath('v1-1-rtx-sm86/unet.plan')" in program
