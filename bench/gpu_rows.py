"""The rows of `bench.gpu`, each run as ``python -m bench.gpu_rows ROW --work DIR``; the last line out is JSON.

Times on the GPU are from CUDA events, after warm-up; latencies are from the host's clock, the result on the host.
Weights are random, so that pictures are noise; shapes, arithmetic and memory are those of the real model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdrt.runtime.device_engines import DeviceEngines
    from sdrt.runtime.pipeline import Pipeline

PROMPT, NEGATIVE, SEED = "Great Wall photo", "blurry", 42
BATCHES, STEPS, MARKS = (1, 4), (20, 50), (1, 20, 50)
# Of one guided step at 512 x 512: 401.6 GMAC for each of two samples.
STEP_TFLOP = 4 * 401.6e9 / 1e12
REPEATS = 3


def checkpoint(work: Path, size: Any) -> dict[str, Any]:
    """Write random weights."""
    from bench.checkpoints import write_checkpoint  # noqa: PLC0415 - torch, which not every row needs

    folder = work / "checkpoint"
    if not folder.exists():
        write_checkpoint(folder, "diffusers", size, dtype="float16")
    return {}


def onnx(work: Path, _size: Any) -> dict[str, Any]:
    """Export them."""
    from sdrt.export.build import build  # noqa: PLC0415 - torch

    if not (work / "onnx").exists():
        build(str(work / "checkpoint"), output=work / "onnx", precision="fp16")
    return {}


def engines(backend: Any, work: Path) -> dict[str, Any]:
    """Build engines of one backend for this GPU."""
    from sdrt.engines.build import build_engines  # noqa: PLC0415 - what the row is about
    from sdrt.engines.bundle import Bundle  # noqa: PLC0415

    if not (work / backend).exists():
        source = Bundle.open(work / "onnx")
        build_engines(source, backend=backend, targets=("native",), images=BATCHES, output=work / backend)
    return {"bundle_gb": round(Bundle.open(work / backend).size / 1e9, 2)}


def matmul(_work: Path, _size: Any) -> dict[str, Any]:
    """Measure the rate of large fp16 matrix multiplications, which nothing else can beat."""
    import torch  # noqa: PLC0415 - what the row is about

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    seconds = statistics.median(_timed_torch(lambda: a @ b) for _ in range(20))
    rate = 2 * 8192**3 / seconds / 1e12
    return {"tflops": round(rate, 1), "floor_ms": round(1000 * STEP_TFLOP / rate, 2)}


def _timed_torch(work: Callable[[], object]) -> float:
    import torch  # noqa: PLC0415

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000


def diffusers(work: Path, _size: Any, *, compiled: bool = False) -> dict[str, Any]:
    """Measure diffusers' own pipeline in fp16; the first to come leaves its latents for the others' parity."""
    import torch  # noqa: PLC0415 - what the row is about

    began = time.perf_counter()
    pipeline = _diffusers_pipeline(work / "checkpoint")
    torch.backends.cudnn.benchmark = True
    if compiled:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True)

    def run(images: int, steps: int, **more: Any) -> Any:
        generators = [torch.Generator().manual_seed(SEED + image) for image in range(images)]
        return pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=steps,
            num_images_per_prompt=images,
            generator=generators,
            **more,
        )

    run(1, 2, output_type="np")
    first = time.perf_counter() - began
    # Compiled code is of one shape: another batch would be compiled for minutes more.
    latency = _latencies(lambda images, steps: run(images, steps, output_type="np"), (1,) if compiled else BATCHES)
    latents = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.float16)
    embeddings = torch.randn(2, 77, pipeline.text_encoder.config.hidden_size, device="cuda", dtype=torch.float16)
    ids = torch.zeros(2, 77, device="cuda", dtype=torch.long)
    kept: dict[str, Any] = {}

    def keep(_pipe: Any, index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index + 1 in MARKS:
            kept[str(index + 1)] = values["latents"].float().cpu().numpy()
        return values

    with torch.inference_mode():
        figures = {
            "step_ms": _median_ms(lambda: pipeline.unet(latents, 500, embeddings, return_dict=False)),
            "text_ms": _median_ms(lambda: pipeline.text_encoder(ids)),
            "vae_ms": _median_ms(lambda: pipeline.vae.decode(latents[:1], return_dict=False)),
        }
    if not compiled:
        run(1, max(MARKS), output_type="latent", callback_on_step_end=keep)
        np.savez(work / "reference.npz", **kept)
    return figures | {
        "latency_s": latency,
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "start_s": {"cold": round(first, 2)},
    }


def _median_ms(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    return round(1000 * statistics.median(_timed_torch(work) for _ in range(20)), 3)


def _diffusers_pipeline(folder: Path) -> Any:
    import diffusers as library  # noqa: PLC0415 - what the row is about
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    from sdrt.export.vocabulary import read_merges, vocabulary  # noqa: PLC0415 - beside torch

    half = {"torch_dtype": torch.float16}
    pipeline = library.StableDiffusionPipeline(
        unet=library.UNet2DConditionModel.from_pretrained(folder / "unet", **half),
        vae=library.AutoencoderKL.from_pretrained(folder / "vae", **half),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", **half),
        scheduler=library.DDIMScheduler.from_pretrained(folder / "scheduler"),
        tokenizer=transformers.CLIPTokenizer(
            vocab=vocabulary(),
            merges=[tuple(merge.split(" ")) for merge in read_merges()],
            pad_token="<|endoftext|>",  # noqa: S106 - of CLIP's vocabulary
            model_max_length=77,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda")


def _latencies(run: Callable[[int, int], object], batches: tuple[int, ...]) -> dict[str, float]:
    """Measure the seconds from prompt to images: the best of some, after one that does not count."""
    found = {}
    for images in batches:
        run(images, 2)
        for steps in STEPS:
            times = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                run(images, steps)
                times.append(time.perf_counter() - began)
            found[f"{images}x{steps}"] = round(min(times), 4)
    return found


def start(bundle: Path) -> dict[str, Any]:
    """Make a first image in a process that has done nothing else, and tell the seconds since it began."""
    import sdrt  # noqa: PLC0415 - its time is measured

    began = time.perf_counter()
    with sdrt.load(bundle) as pipe:
        pipe(PROMPT, num_inference_steps=1, seed=SEED, sampler="ddim")
    return {"seconds": time.perf_counter() - began}


def _starts(bundle: Path) -> dict[str, float]:
    """Start twice: with nothing that an earlier start left, and with all of it. The files themselves are in memory."""
    seconds = {}
    for kind in ("cold", "warm"):
        command = [sys.executable, "-m", "bench.gpu_rows", "start", "--work", str(bundle)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds[kind] = round(json.loads(done.stdout.strip().splitlines()[-1])["seconds"], 2)
    return seconds


def sdrt_on(bundle: Path, work: Path) -> dict[str, Any]:
    """Measure sdrt with one bundle."""
    home = work / f"home-{bundle.name}"
    shutil.rmtree(home, ignore_errors=True)
    os.environ["SDRT_HOME"] = str(home)
    starts = _starts(bundle)
    import sdrt  # noqa: PLC0415 - after SDRT_HOME
    from sdrt.runtime.cuda import Device  # noqa: PLC0415

    with Device() as device, _peak(device) as peak, sdrt.load(bundle) as pipe:

        def run(images: int, steps: int) -> object:
            return pipe(
                PROMPT,
                negative_prompt=NEGATIVE,
                num_inference_steps=steps,
                num_images_per_prompt=images,
                seed=SEED,
                sampler="ddim",
                output_type="np",
            )

        latency = _latencies(run, BATCHES)
        figures = _parts(pipe) | {"latency_s": latency, "start_s": starts, "graph_obstacle": pipe.graph_obstacle}
        reference = work / "reference.npz"
        if reference.exists():
            figures["psnr_db"] = _parity(pipe, reference)
    return figures | {"peak_gb": round(peak[0] / 1e9, 2)}


def _parts(pipe: Pipeline) -> dict[str, Any]:
    """Measure single steps, what the host does for each, the text encoder and the decoder."""
    from sdrt.runtime.cuda import Event  # noqa: PLC0415
    from sdrt.runtime.device_array import DeviceArray  # noqa: PLC0415
    from sdrt.runtime.request import make_request  # noqa: PLC0415

    request = make_request(pipe.bundle.manifest, PROMPT, num_inference_steps=50, seed=SEED, sampler="ddim")
    steps, host = [], []
    loop = pipe.run(request)
    for _ in range(50):
        began = time.perf_counter()
        steps.append(next(loop))
        host.append(time.perf_counter() - began)
    loop.close()
    at_work: DeviceEngines = pipe._at_work()  # type: ignore[assignment]  # noqa: SLF001 - it runs on a GPU
    passages = pipe._passages(request)  # noqa: SLF001 - what no caller needs, a bench has to see
    shape = (1, *request.latent_shape)

    def timed(work: Callable[[], None]) -> float:
        times = []
        with at_work.device.current(), Event(at_work.device) as began, Event(at_work.device) as ended:
            for _ in range(23):
                at_work.stream.record(began)
                work()
                at_work.stream.record(ended)
                ended.wait()
                times.append(ended.seconds_since(began))
        return round(1000 * statistics.median(times[3:]), 3)

    with at_work.device.current():
        latents = DeviceArray(at_work.device, shape)
        image = DeviceArray(at_work.device, (1, 3, request.height, request.width))
        text = pipe.bundle.manifest.text
        embeddings = DeviceArray(at_work.device, (2, text.max_tokens, text.embedding_width))
    return {
        "step_ms": round(1000 * statistics.median(step.seconds for step in steps[3:]), 3),
        "host_us": round(1e6 * statistics.median(host[3:]), 1),
        "text_ms": timed(lambda: at_work._encode(passages, embeddings.pointer)),  # noqa: SLF001
        "vae_ms": timed(lambda: at_work._decode(latents.pointer, shape, image.pointer)),  # noqa: SLF001
    }


def _parity(pipe: Pipeline, reference: Path) -> dict[str, float]:
    """Compare the latents after some steps with diffusers', in decibels; the reference's range is the peak."""
    found = {}
    with np.load(reference) as kept:
        for step in pipe.steps(
            PROMPT, negative_prompt=NEGATIVE, num_inference_steps=max(MARKS), seed=SEED, sampler="ddim"
        ):
            mark = str(step.index + 1)
            if mark in kept:
                wanted = kept[mark].astype(np.float64)
                square = float(np.mean((step.latents - wanted) ** 2))
                peak = float(wanted.max() - wanted.min())
                found[mark] = round(10 * math.log10(peak**2 / square), 1) if square else math.inf
    return found


@contextmanager
def _peak(device: Any) -> Iterator[list[int]]:
    """Watch how much of the GPU's memory is taken at most, beyond what is now, every five milliseconds."""
    most, ended = [0], threading.Event()
    with device.current():
        before, _ = device.memory()

    def watch() -> None:
        with device.current():
            while not ended.wait(0.005):
                most[0] = max(most[0], before - device.memory()[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def measure(row: str, work: Path, size: str) -> dict[str, Any]:
    """Run one row by its name."""
    simple = {"checkpoint": checkpoint, "onnx": onnx, "matmul": matmul, "diffusers": diffusers}
    if row in simple:
        return simple[row](work, size)
    if row == "diffusers-compiled":
        return diffusers(work, size, compiled=True)
    if row == "start":
        return start(work)
    if row.endswith("-build"):
        return engines(row.removesuffix("-build"), work)
    if row == "onnxruntime-cuda":
        import onnxruntime  # noqa: PLC0415 - what the row is about

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            sys.exit("onnxruntime is installed without its CUDA provider: pip install onnxruntime-gpu")
    return sdrt_on(work / ("onnx" if row == "onnxruntime-cuda" else row), work)


def main() -> None:
    """Run one row and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_rows", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("row")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", default="full")
    given = parser.parse_args()
    print(json.dumps(measure(given.row, given.work, given.size)))


if __name__ == "__main__":
    main()
