"""The programs of engines/README.md that make pictures of a bundle and a table without sdrt, run as written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from sdrt.cli import main
from sdrt.engines import demo
from sdrt.runtime.loop import denoise
from sdrt.runtime.noise import TorchGenerator
from sdrt.runtime.samplers import SAMPLERS, sampler_table
from sdrt.runtime.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

README = (Path(__file__).parents[1] / "engines" / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Making a picture\n")[2].partition("\n## Writing one\n")[0]
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
ONNXRUNTIME, OPENVINO = [code for language, code in SNIPPETS if language == "python"]
(CPP,) = [code for language, code in SNIPPETS if language == "cpp"]
LOAD = re.compile(r"^def load\(.*?(?=^\w)", re.DOTALL | re.MULTILINE)

PROMPT, NEGATIVE, SCALE, SEED, STEPS = "a large red star on a blue background", "green", "5.5", "42", "6"
ALONE = "\nassert not [name for name in sys.modules if name.partition('.')[0] in {'sdrt', 'torch', 'onnx'}]\n"


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.bundle_folder(tmp_path_factory.mktemp("enough"))


@pytest.fixture(scope="session")
def v_folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks, said to predict v: no picture of anything, yet one that depends on every number."""
    folder = tmp_path_factory.mktemp("v") / "demo"
    shutil.copytree(demo_folder, folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["scheduler"]["prediction_type"] = "v_prediction"
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


class Maker:
    """Both ways to one picture."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.capsys = place, capsys

    def run(self, bundle: Path, options: list[str], size: tuple[int, int], backend: str) -> Any:
        """Pixels of `sdrt run`."""
        output = str(self.place / "run.png")
        settings = ["-n", NEGATIVE, "--cfg-scale", SCALE, "--seed", SEED, "--steps", STEPS, "--backend", backend]
        shape = ["-W", str(size[0]), "-H", str(size[1])]
        assert main(["run", PROMPT, "--bundle", str(bundle), *settings, *shape, *options, "-o", output]) == 0
        return np.asarray(Image.open(output))

    def alone(self, bundle: Path, options: list[str], size: tuple[int, int], program: str) -> Any:
        """Pixels of a program that knows nothing of sdrt."""
        self.capsys.readouterr()
        assert main(["table", "--bundle", str(bundle), "--steps", STEPS, "--json", *options]) == 0
        (self.place / "table.json").write_text(self.capsys.readouterr().out)
        (self.place / "picture.py").write_text(program + ALONE)
        arguments = [bundle, "table.json", PROMPT, NEGATIVE, SCALE, SEED, *size, "alone.png"]
        command = [sys.executable, "picture.py", *map(str, arguments)]
        done = subprocess.run(command, cwd=self.place, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return np.asarray(Image.open(self.place / "alone.png"))


@pytest.fixture
def maker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Maker:
    return Maker(tmp_path, capsys)


def openvino_program() -> str:
    """The program with the other `load`."""
    program = ONNXRUNTIME.replace("import onnxruntime\n", "import openvino\n")
    importing, _, replacement = OPENVINO.partition("\n\n\n")
    changed = LOAD.sub(lambda _: f"{importing.removeprefix('import openvino')}\n\n{replacement}\n\n", program)
    assert "onnxruntime" not in changed
    return changed


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--sampler", "plms"], (128, 128)),
        (["--sampler", "euler_a"], (128, 128)),
        (["--sampler", "ddpm"], (104, 72)),  # 468 numbers, which are no whole blocks of noise
        (["--sampler", "ddim", "--eta", "0.7"], (128, 128)),
        (["--sampler", "dpmpp_2m", "--spacing", "trailing"], (128, 64)),
        (["--sampler", "euler", "--spacing", "linspace"], (128, 128)),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_with_onnxruntime_alone(maker: Maker, demo_folder: Path, options: list[str], size: tuple[int, int]) -> None:
    expected = maker.run(demo_folder, options, size, "onnxruntime")
    np.testing.assert_array_equal(maker.alone(demo_folder, options, size, ONNXRUNTIME), expected)


def test_of_a_model_that_predicts_v(maker: Maker, v_folder: Path) -> None:
    expected = maker.run(v_folder, [], (128, 128), "onnxruntime")
    np.testing.assert_array_equal(maker.alone(v_folder, [], (128, 128), ONNXRUNTIME), expected)


def test_with_openvino_alone(maker: Maker, demo_folder: Path) -> None:
    options = ["--sampler", "euler_a"]
    expected = maker.run(demo_folder, options, (128, 128), "openvino:fp32")
    np.testing.assert_array_equal(maker.alone(demo_folder, options, (128, 128), openvino_program()), expected)


def test_the_commands_are_those_that_there_are(
    maker: Maker, demo_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell's snippets, as a reader types them beside the program."""
    printing, making = [code for language, code in SNIPPETS if language == "sh"]
    monkeypatch.setenv("SDRT_HOME", str(demo_folder.parents[1]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    (maker.place / "picture.py").write_text(ONNXRUNTIME)
    for code in (printing, making):
        done = subprocess.run(["sh", "-ec", code], cwd=maker.place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (maker.place / "star.png").stat().st_size > 1000


HARNESS = r"""
#include <cstdio>
#include <iostream>
#include "snippet.hpp"

std::vector<double> numbers(std::size_t count) {
  std::vector<double> read(count);
  for (double& value : read) std::cin >> value;
  return read;
}

int main() {
  std::uint64_t seed;
  std::size_t count, rows, depth;
  Table table;
  std::cin >> seed >> count >> rows >> depth >> table.initial_scale;
  for (auto* column : {&table.timesteps, &table.p, &table.q, &table.a, &table.a_prev, &table.c})
    *column = numbers(rows);
  for (std::size_t i = 0; i < rows; ++i) table.b.push_back(numbers(depth));
  for (double drawn : numbers(rows)) table.draws_noise.push_back(drawn != 0);
  const std::vector<double> given = numbers(count);
  Gaussian gaussian(seed);
  for (int i = 0; i < 2; ++i)
    for (float value : gaussian.draw(count)) std::printf("%a\n", static_cast<double>(value));
  const auto predict = [](const std::vector<float>& x, float timestep) {
    std::vector<float> f = x;
    for (float& value : f) value = value * 0.75F + timestep * 0.001F;
    return f;
  };
  const auto noise = [&] { return std::vector<float>(given.begin(), given.end()); };
  for (float value : denoise(table, predict, noise)) std::printf("%a\n", static_cast<double>(value));
  return std::cin.fail();
}
"""


@pytest.fixture(scope="session")
def in_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """The snippet in a program that reads a table and prints noise and latents."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler: apt-get install g++")
    place = tmp_path_factory.mktemp("cpp")
    (place / "snippet.hpp").write_text(f"#pragma once\n{CPP}")
    (place / "harness.cpp").write_text(HARNESS)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    command = [compiler, *flags, "harness.cpp", "-o", "harness"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr

    def run(text: str) -> list[float]:
        ran = subprocess.run([place / "harness"], input=text, capture_output=True, text=True, check=True, timeout=60)
        return [float.fromhex(line) for line in ran.stdout.split()]

    return run


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("count", [64, 60])
def test_in_cpp(in_cpp: Callable[[str], list[float]], sampler: str, count: int) -> None:
    table = sampler_table(sampler, Schedule(prediction_type="v_prediction"), 7)
    given = TorchGenerator(3).randn((count,))
    columns = [table.timesteps, table.p, table.q, table.a, table.a_prev, table.c, table.b, table.draws_noise, given]
    head = [-(2**33) + 5 & 0xFFFFFFFFFFFFFFFF, count, *table.b.shape, table.initial_scale]
    numbers = [*head, *(float(value) for column in columns for value in column.ravel())]
    found = np.array(in_cpp(" ".join(map(repr, numbers))), np.float32)

    generator = TorchGenerator(5)
    drawn = np.concatenate([generator.randn((count,)), generator.randn((count,))])
    np.testing.assert_allclose(found[: 2 * count], drawn, atol=1e-6)

    def predict(x: Any, timestep: float) -> Any:
        return x * np.float32(0.75) + np.float32(timestep) * np.float32(0.001)

    *_, last = denoise(table, given, predict, lambda: given)
    np.testing.assert_array_equal(found[2 * count :], last.latents)
