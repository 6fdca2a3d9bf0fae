"""Text to image: tokenizer, text encoder, sampler over the U-Net, VAE decoder."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, Unpack, overload

import numpy as np

from ..engines import store
from ..engines.bundle import TOKENIZER
from ..errors import BackendError, InputError
from .backends import AUTO, choose, obstacle, open_engines
from .images import to_pil
from .noise import batch_noise
from .parameters import describe
from .request import Arguments, Request, make_request
from .session import Passage
from .tiling import check_tiling
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from ..engines.bundle import Bundle
    from .device_array import DeviceArray
    from .loop import Step
    from .session import Engines

OutputType = Literal["pil", "np", "latent"]
OUTPUT_TYPES = ("pil", "np", "latent")

StepCallback: TypeAlias = "Callable[[Pipeline, int, float, dict[str, Any]], dict[str, Any] | None]"
"""Called with the pipeline, the step's index, its timestep and ``{"latents": ...}``."""


def load(bundle: str | os.PathLike[str] | None = None, *, backend: str = AUTO) -> Pipeline:
    """Open a bundle and make it ready to generate.

    Parameters
    ----------
    bundle
        The name of a bundle in the store, or its path; None for the newest that this machine can run.
    backend
        As for `Pipeline`.

    Raises
    ------
    InputError
        There is no such backend.
    BundleNotFoundError
        There is none; the message lists those that exist.
    BundleCorruptError
        A file is missing, cut short or altered.
    BackendError
        This machine cannot run it; the message says why.

    """
    return Pipeline(store.resolve(bundle, obstacle=lambda found: obstacle(found, backend)), backend=backend)


class Pipeline:
    """A bundle that generates images.

    Engines are loaded when they are first needed and stay until `close`. Several threads may call one pipeline at
    once: each call has buffers of its own, and gives the images that it would give alone.

    Parameters
    ----------
    bundle
        An open bundle.
    backend
        What runs an ONNX bundle: ``onnxruntime``; ``openvino``, in bf16 where the CPU has instructions for it, which
        is faster and makes another picture than fp32; ``openvino:fp32``; or ``auto`` for the fastest of those
        installed that computes exactly. Engines have their own.

    Raises
    ------
    InputError
        There is no such backend.
    BackendError
        This machine cannot run the bundle with it.

    """

    def __init__(self, bundle: Bundle, *, backend: str = AUTO) -> None:
        if reason := obstacle(bundle, backend):
            raise BackendError(f"{bundle.folder} cannot be run here: {reason}")
        self.bundle = bundle
        self._asked = backend
        self._lock = threading.Lock()
        self._engines: Engines | None = None
        self._closed = False
        self.tokenizer = Tokenizer(bundle.folder / TOKENIZER)

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: Literal["pil"] = "pil",
        callback_on_step_end: StepCallback | None = None,
        **arguments: Unpack[Arguments],
    ) -> list[Image]: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: Literal["np", "latent"],
        callback_on_step_end: StepCallback | None = None,
        **arguments: Unpack[Arguments],
    ) -> list[NDArray[np.float32]]: ...

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        **arguments: Unpack[Arguments],
    ) -> list[Image] | list[NDArray[np.float32]]:
        """Generate images.

        Parameters
        ----------
        prompt
            What the image shall show, or a list of prompts. The model reads 75 tokens; the rest is dropped with an
            `SdrtWarning`.
        negative_prompt
            What it shall not show: one for all prompts, or one for each. Used where `guidance_scale` is beyond 1.
        num_inference_steps
            Steps of the sampler, 50 by default.
        guidance_scale
            Of classifier-free guidance, 7.5 by default; 1 or less turns it off and halves the work.
        seed
            The first image's; image i has ``seed + i``. The noise is that of torch's CPU generator, so a seed gives
            the image that diffusers gives. None draws one at random, which the image's ``info["parameters"]`` tells.
        height, width
            In pixels, multiples of 8; by default what the model was trained for.
        num_images_per_prompt
            1 by default.
        sampler
            ``ddpm``, ``ddim``, ``plms``, ``euler``, ``euler_a`` or ``dpmpp_2m``; by default the one that the model's
            folder names, as in diffusers, which for Stable Diffusion v1 is ``plms``.
        eta
            Share of ancestral noise of ``ddim``, 0 by default.
        timestep_spacing
            ``leading``, ``trailing`` or ``linspace``; by default the sampler's own, as in diffusers.
        clip_skip
            Last layers of the text encoder to leave out, as diffusers counts (A1111 counts one more) and, as there,
            for the prompt and not for the negative prompt; by default what the bundle was built with.
        latents
            Unit gaussian of shape (images, 4, height / 8, width / 8) to start from, instead of the seed's.
        guidance_interval
            An approximation: two noise levels (sigma, noise over signal, which for Stable Diffusion v1 falls from 14.6
            to 0.03) between which there is guidance, ``low < sigma <= high``. Outside, the prediction for the prompt
            is taken as it is, which is half the work (Kynkaanniemi et al. 2024, arXiv:2404.07724). By default
            everywhere.
        cache_interval
            An approximation: the whole U-Net once in so many steps, and in the others its outermost blocks alone, on
            the deep features of the last whole one (Ma et al. 2023, DeepCache, arXiv:2312.00858). 1, the default, is
            the whole in every step.
        encoder_interval
            An approximation: the U-Net's encoder once in so many of the steps that run the whole, and in the others its
            decoder alone, on the encoder's last features (Li et al. 2023, Faster Diffusion, arXiv:2312.09608).
        vae_tiling
            Whether images are decoded in tiles, which takes less memory and makes the same picture, to rounding. None,
            the default, does so beyond 768 x 768 pixels where the bundle has the graphs for it.
        output_type
            ``pil`` for PIL images, ``np`` for float32 arrays height x width x 3 in [0, 1], ``latent`` for float32
            arrays 4 x height / 8 x width / 8.
        callback_on_step_end
            Called as in diffusers with the pipeline, the step's index, its timestep and ``{"latents": ...}``; where it
            returns a dictionary with ``latents``, the loop goes on from those.

        Returns
        -------
        list
            One image for each prompt and copy, in that order.

        Raises
        ------
        InputError
            An argument makes no sense.
        BackendError
            An engine failed.

        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output type is {output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        request = make_request(self.bundle.manifest, prompt, **arguments)
        if callback_on_step_end is None:
            latents = self._ready(request.vae_tiling).latents(request, self._passages(request), self._noise(request))
        else:
            latents = self._watched(request, callback_on_step_end)
        if output_type == "latent":
            return list(latents)
        if output_type == "np":
            return self.decode(latents, vae_tiling=request.vae_tiling)
        return self.pictures(request, latents)

    def _watched(self, request: Request, callback: StepCallback) -> NDArray[np.float32]:
        """Run the loop with somebody who sees each step and may replace its latents."""
        loop = self.run(request)
        latents: NDArray[np.float32] | None = None
        sent = None
        with suppress(StopIteration):
            while True:
                step = loop.send(sent)
                latents, sent = step.latents, None
                returned = callback(self, step.index, step.timestep, {"latents": latents})
                replaced = (returned or {}).get("latents", latents)
                if replaced is not latents:
                    latents = sent = np.asarray(replaced, np.float32)
        assert latents is not None  # a table has at least one row
        return latents

    def steps(self, prompt: str | Sequence[str], **arguments: Unpack[Arguments]) -> Generator[Step]:
        """Generate step by step: the denoising loop as a generator, to be stopped at will.

        It takes the arguments of a call but for what concerns the finished image. Turn the latents of any step into
        images with `decode`.

        Yields
        ------
        Step
            Index, total, timestep, latents (float32, read-only, images x 4 x height / 8 x width / 8), seconds; and the
            model's estimate of the finished latents, to be asked for before the next step.

        """
        yield from self.run(make_request(self.bundle.manifest, prompt, **arguments))

    def run(self, request: Request) -> Generator[Step, NDArray[np.float32] | None]:
        """Run the denoising loop of a request; see `steps`. What is sent to the generator replaces the latents."""
        engines = self._ready(request.vae_tiling)
        return (yield from engines.denoise(request, self._passages(request), self._noise(request)))

    @staticmethod
    def _noise(request: Request) -> Callable[[], NDArray[np.float32]]:
        return batch_noise(request.seeds, request.latent_shape)

    def _passages(self, request: Request) -> list[Passage]:
        """Say what the U-Net is told: the negative prompts, where guided, then the prompts."""
        if not request.guided:
            return [self._passage(request.prompts, request.clip_skip)]
        if not request.clip_skip:
            return [self._passage((*request.negative_prompts, *request.prompts), 0)]
        # diffusers skips layers for the prompts alone; A1111 for both.
        return [self._passage(request.negative_prompts, 0), self._passage(request.prompts, request.clip_skip)]

    def _passage(self, texts: Sequence[str], clip_skip: int) -> Passage:
        distinct = list(dict.fromkeys(texts))
        rows = tuple(distinct.index(text) for text in texts)
        return Passage(self.tokenizer.encode(distinct), clip_skip, rows)

    def on_device(
        self,
        prompt: str | Sequence[str],
        *,
        output_type: Literal["image", "latent"] = "image",
        initial: Any = None,
        out: Any = None,
        stream: Any = None,
        **arguments: Unpack[Arguments],
    ) -> DeviceArray:
        """Generate on the GPU and hand the result over there: nothing is copied to the host, nor waited for.

        For programs that go on with the result on the GPU. It takes the arguments of a call, and these. The first
        request of a shape loads and allocates; later ones wait, at most, for the uploads of the one before.

        Parameters
        ----------
        prompt
            What the image shall show, or a list of prompts.
        output_type
            ``image`` for float32 of shape (images, 3, height, width) as the decoder gives it: around [-1, 1], to be
            clamped; ``latent`` for float32 of shape (images, 4, height / 8, width / 8).
        initial
            Unit gaussian to start from: an array on the GPU with ``__cuda_array_interface__``, float32 in C order.
        out
            Such an array for the result, its address a multiple of 256.
        stream
            The caller's CUDA stream, an integer or an object with ``__cuda_stream__``. What it holds comes before the
            generation, and what it is given afterwards finds the result. Without one, `DeviceArray` lets its consumers
            wait on the GPU.

        Returns
        -------
        DeviceArray
            A view of `out` if that is given. It goes to PyTorch, CuPy and others through DLPack, and outlives the
            pipeline.

        Raises
        ------
        InputError
            An argument makes no sense.
        BackendError
            The bundle runs on the CPU here, or an engine failed.

        """
        from .device_engines import DeviceEngines  # noqa: PLC0415 - for those who have a GPU
        from .device_handover import hand_over  # noqa: PLC0415

        engines = self._ready(arguments.get("vae_tiling"))
        if not isinstance(engines, DeviceEngines):
            raise BackendError(
                f"{self.bundle.folder} runs on the CPU here: on_device needs an NVIDIA GPU that it runs on"
            )
        if output_type not in {"image", "latent"}:
            raise InputError(f"output type is {output_type!r}: expected image or latent")
        request = make_request(self.bundle.manifest, prompt, **arguments)
        given = request, self._passages(request), self._noise(request)
        return hand_over(engines, *given, images=output_type == "image", initial=initial, out=out, stream=stream)

    @property
    def graph_obstacle(self) -> str | None:
        """Why steps were not replayed from one CUDA graph in the last request, in one line; None if they were.

        None too on the CPU, and before the first request.
        """
        obstacle_found: str | None = getattr(self._engines, "graph_obstacle", None)
        return obstacle_found

    def embed(self, texts: Sequence[str], *, clip_skip: int = 0) -> NDArray[np.float32]:
        """Encode prompts, each different one once.

        Parameters
        ----------
        texts
            The prompts; what goes beyond 75 tokens is dropped with an `SdrtWarning`.
        clip_skip
            Last layers of the text encoder to leave out.

        Returns
        -------
        float32 array of shape (len(texts), 77, width): what the U-Net's cross-attention reads.

        """
        return self._at_work().encode([self._passage(texts, clip_skip)])

    def decode(self, latents: NDArray[np.float32], *, vae_tiling: bool | None = None) -> list[NDArray[np.float32]]:
        """Turn latents into images.

        Parameters
        ----------
        latents
            float32 of shape (images, 4, h, w), as the sampler leaves them.
        vae_tiling
            As in a call.

        Returns
        -------
        list
            float32 arrays of shape (8h, 8w, 3) in [0, 1].

        Raises
        ------
        InputError
            Tiles are asked for, and the bundle has no graphs for them or runs on a GPU.

        """
        return [
            np.ascontiguousarray(np.clip(image.transpose(1, 2, 0) / 2 + 0.5, 0, 1))
            for image in self._ready(vae_tiling).decode(latents, vae_tiling=vae_tiling)
        ]

    def pictures(self, request: Request, latents: NDArray[np.float32]) -> list[Image]:
        """Decode a request's latents to PIL images whose ``info["parameters"]`` tells how they were made."""
        return [
            to_pil(array, describe(self.bundle, request, image))
            for image, array in enumerate(self.decode(latents, vae_tiling=request.vae_tiling))
        ]

    @property
    def backend(self) -> str:
        """What the bundle runs on, such as ``onnxruntime`` or ``openvino:fp32``."""
        return choose(self.bundle, self._asked)

    @property
    def engines(self) -> Engines:
        """The components at work; each is loaded when it is first needed."""
        return self._at_work()

    def _ready(self, vae_tiling: bool | None) -> Engines:
        """Give the engines, unless they shall decode in tiles and cannot."""
        engines = self._at_work()
        if check_tiling(vae_tiling, self.bundle.manifest) and not engines.tiles:
            raise InputError(
                f"{self.bundle.folder} runs on a GPU here, which decodes pictures whole: leave vae tiling out"
            )
        return engines

    def _at_work(self) -> Engines:
        with self._lock:
            if self._closed:
                raise InputError("this pipeline is closed: load the bundle again")
            if self._engines is None:
                self._engines = open_engines(self.bundle, self._asked)
            return self._engines

    def close(self) -> None:
        """Free all engines. Calls that are running in other threads must have ended."""
        with self._lock:
            self._closed = True
            engines, self._engines = self._engines, None
        if engines is not None:
            engines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
