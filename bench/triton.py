"""Ask a real Triton Inference Server what `bench.oip_answers` asks, keep its answers, and compare another server's.

    python -m bench.triton --python PYTHON          # the interpreter of an environment with nvidia-pytriton in it
    python -m bench.triton --http 127.0.0.1:7860 --grpc 127.0.0.1:8001

The first starts the Triton that the wheel nvidia-pytriton brings, with a model of the same tensors as sdrt's and black
pictures, and writes `tests/serve/triton.json`; it needs no GPU. The interpreter has to be the very one whose libpython
the system has: on Debian /usr/bin/python3 made the environment. The second prints how a server's answers differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdrt.serve.oip_model import INPUTS, OUTPUTS

from .oip_answers import answers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdrt.serve.oip_tensors import TensorMetadata

RECORDED = Path(__file__).parents[1] / "tests" / "serve" / "triton.json"
_PATIENCE_S = 60.0
_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer({each.name(): each.as_numpy() for each in request.inputs()}) for request in requests]

    def answer(self, given):
        count, height, width = len(given["prompt"]), int(given["height"][0]), int(given["width"][0])
        first = int(given["seed"][0]) if "seed" in given else 0
        image = pb_utils.Tensor("image", np.zeros((count, height, width, 3), np.uint8))
        seed = pb_utils.Tensor("seed", np.arange(first, first + count, dtype=np.int64))
        return pb_utils.InferenceResponse([image, seed])
"""
"""Of Triton's Python backend, run by the wheel's own interpreter."""


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--http")
    parser.add_argument("--grpc")
    given = parser.parse_args()
    if given.python is not None:
        with triton(given.python) as (http, grpc):
            found = answers(http, grpc)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(answer)}" for name, answer in found.items())
        RECORDED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        print(f"{len(found)} answers are in {RECORDED}")
    elif given.http is not None and given.grpc is not None:
        theirs, ours = json.loads(RECORDED.read_text(encoding="utf-8")), answers(given.http, given.grpc)
        for name in theirs:
            if theirs[name] != ours[name]:
                print(f"{name}\n  Triton: {json.dumps(theirs[name])}\n  here:   {json.dumps(ours[name])}")
        print(f"{sum(theirs[name] == ours[name] for name in theirs)} of {len(theirs)} are alike")
    else:
        parser.error("give --python, or --http and --grpc")


@contextmanager
def triton(python: Path) -> Iterator[tuple[str, str]]:
    """Run Triton, and give its addresses for HTTP and gRPC."""
    code = "import pathlib, pytriton; print(pathlib.Path(pytriton.__file__).parent)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    server = Path(found.stdout.strip()) / "tritonserver"
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        backends, model = Path(folder, "backends"), Path(folder, "models", "demo")
        shutil.copytree(server / "backends", backends)
        shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
        (model / "1").mkdir(parents=True)
        (model / "1" / "model.py").write_text(_MODEL)
        (model / "config.pbtxt").write_text(_configuration())
        http, grpc = _free_port(), _free_port()
        command: list[Any] = [server / "bin" / "tritonserver", "--model-repository", model.parent]
        command += ["--backend-directory", backends, "--allow-metrics", "false"]
        command += ["--http-address", "127.0.0.1", "--http-port", str(http)]
        command += ["--grpc-address", "127.0.0.1", "--grpc-port", str(grpc)]
        environment = {
            **os.environ,
            "PATH": f"{python.parent}:{os.environ['PATH']}",  # where the backend finds the interpreter's packages
            "LD_LIBRARY_PATH": str(server.parents[1] / "nvidia_pytriton.libs"),
        }
        with (
            Path(folder, "log").open("w+") as log,
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as process,
        ):
            try:
                _wait(f"http://127.0.0.1:{http}/v2/health/ready", process, Path(log.name))
                yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
            finally:
                process.terminate()


def _configuration() -> str:
    lines = ['name: "demo"', 'backend: "python"', "max_batch_size: 0", "instance_group [{ kind: KIND_CPU }]"]
    lines += [f"input {_tensor(each)}" for each in INPUTS]
    lines += [f"output {_tensor(each)}" for each in OUTPUTS]
    return "\n".join(lines)


def _tensor(tensor: TensorMetadata) -> str:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    optional = " optional: true" if tensor.optional else ""
    return f'[{{ name: "{tensor.name}" data_type: TYPE_{kind} dims: {list(tensor.shape)}{optional} }}]'


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - of this machine
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    sys.exit(f"Triton does not answer:\n{log.read_text(encoding='utf-8')[-5000:]}")


if __name__ == "__main__":
    main()
