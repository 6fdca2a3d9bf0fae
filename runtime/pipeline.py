"""Text to image: tokenizer, text encoder, sampler over the U-Net, VAE decoder."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, Unpack, overload

import numpy as np

from ..engines import store
from ..engines.bundle import TOKENIZER
from ..engines.verified import verify_once
from ..errors import BackendError, InputError
from .backends import obstacle, open_session
from .images import to_pil
from .loop import denoise
from .noise import batch_noise
from .parameters import describe
from .request import Arguments, Request, make_request
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from ..engines.bundle import Bundle
    from .loop import Step
    from .session import Session

OutputType = Literal["pil", "np", "latent"]
OUTPUT_TYPES = ("pil", "np", "latent")

StepCallback: TypeAlias = "Callable[[Pipeline, int, float, dict[str, Any]], dict[str, Any] | None]"
"""Called with the pipeline, the step's index, its timestep and ``{"latents": ...}``."""


def load(bundle: str | os.PathLike[str] | None = None) -> Pipeline:
    """Open a bundle and make it ready to generate.

    Parameters
    ----------
    bundle
        The name of a bundle in the store, or its path; None for the newest that this machine can run.

    Raises
    ------
    BundleNotFoundError
        There is none; the message lists those that exist.
    BundleCorruptError
        A file is missing, cut short or altered.
    BackendError
        This machine cannot run it; the message says why.

    """
    return Pipeline(store.resolve(bundle, obstacle=obstacle))


class Pipeline:
    """A bundle that generates images.

    Engines are loaded when they are first needed and stay until `close`. Several threads may call one pipeline at
    once: each call has buffers of its own, and gives the images that it would give alone.

    Parameters
    ----------
    bundle
        An open bundle.

    """

    def __init__(self, bundle: Bundle) -> None:
        if reason := obstacle(bundle):
            raise BackendError(f"{bundle.folder} cannot be run here: {reason}")
        self.bundle = bundle
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._stack = ExitStack()
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
            ``ddpm``, ``ddim``, ``plms`` (the default), ``euler``, ``euler_a`` or ``dpmpp_2m``.
        eta
            Share of ancestral noise of ``ddim``, 0 by default.
        timestep_spacing
            ``leading``, ``trailing`` or ``linspace``; by default the sampler's own, as in diffusers.
        clip_skip
            Last layers of the text encoder to leave out, as diffusers counts (A1111 counts one more) and, as there,
            for the prompt and not for the negative prompt; by default what the bundle was built with.
        latents
            Unit gaussian of shape (images, 4, height / 8, width / 8) to start from, instead of the seed's.
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
        loop = self.run(request)
        latents: NDArray[np.float32] | None = None
        sent = None
        with suppress(StopIteration):
            while True:
                step = loop.send(sent)
                latents, sent = step.latents, None
                if callback_on_step_end is not None:
                    returned = callback_on_step_end(self, step.index, step.timestep, {"latents": latents})
                    replaced = (returned or {}).get("latents", latents)
                    if replaced is not latents:
                        latents = sent = np.asarray(replaced, np.float32)
        assert latents is not None  # a table has at least one row
        if output_type == "latent":
            return list(latents)
        return self.decode(latents) if output_type == "np" else self.pictures(request, latents)

    def steps(self, prompt: str | Sequence[str], **arguments: Unpack[Arguments]) -> Generator[Step]:
        """Generate step by step: the denoising loop as a generator, to be stopped at will.

        It takes the arguments of a call but for what concerns the finished image. Turn the latents of any step into
        images with `decode`.

        Yields
        ------
        Step
            Index, total, timestep, latents (float32, read-only, images x 4 x height / 8 x width / 8), seconds.

        """
        yield from self.run(make_request(self.bundle.manifest, prompt, **arguments))

    def run(self, request: Request) -> Generator[Step, NDArray[np.float32] | None]:
        """Run the denoising loop of a request; see `steps`. What is sent to the generator replaces the latents."""
        shape = (len(request.seeds), *request.latent_shape)
        draw_noise = batch_noise(request.seeds, request.latent_shape)
        initial = draw_noise() if request.latents is None else request.latents
        predict = self._predictor(request, shape)
        return (yield from denoise(request.table, initial, predict, draw_noise))

    def _predictor(
        self, request: Request, shape: tuple[int, ...]
    ) -> Callable[[NDArray[np.float32], float], NDArray[np.float32]]:
        """Bind the U-Net, put in the text embeddings, and return the guided prediction as a function of x and t."""
        embeddings = self._condition(request)
        images, rows = shape[0], len(embeddings)
        batch = (rows, *shape[1:])
        binding = self._session("unet").bind(
            {"latents": batch, "timestep": (1,), "text_embeddings": embeddings.shape, "prediction": batch}
        )
        binding.inputs["text_embeddings"][...] = embeddings
        latents, timestep, output = binding.inputs["latents"], binding.inputs["timestep"], binding.outputs["prediction"]

        def plain(x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
            latents[...] = x
            timestep[0] = t
            binding.run()
            return output

        unconditional, conditional = output[:images], output[-images:]
        guided_output = np.empty(shape, np.float32)
        scale = np.float32(request.guidance_scale)

        def guided(x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
            latents[:images] = x
            latents[images:] = x
            timestep[0] = t
            binding.run()
            np.subtract(conditional, unconditional, out=guided_output)
            np.multiply(guided_output, scale, out=guided_output)
            np.add(guided_output, unconditional, out=guided_output)
            return guided_output

        return guided if request.guided else plain

    def _condition(self, request: Request) -> NDArray[np.float32]:
        """Embed what the U-Net is told: the negative prompts, where guided, then the prompts."""
        if not request.guided:
            return self.embed(request.prompts, clip_skip=request.clip_skip)
        if not request.clip_skip:
            return self.embed((*request.negative_prompts, *request.prompts))
        # diffusers skips layers for the prompts alone; A1111 for both.
        return np.concatenate(
            [self.embed(request.negative_prompts), self.embed(request.prompts, clip_skip=request.clip_skip)]
        )

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
        distinct = list(dict.fromkeys(texts))
        text = self.bundle.manifest.text
        shape = (len(distinct), text.max_tokens)
        ids = self.tokenizer.encode(distinct)
        binding = self._session("text_encoder").bind(
            {"input_ids": shape, "clip_skip": (1,), "text_embeddings": (*shape, text.embedding_width)}
        )
        binding.inputs["input_ids"][...] = ids
        binding.inputs["clip_skip"][0] = clip_skip
        binding.run()
        return binding.outputs["text_embeddings"][[distinct.index(text) for text in texts]]

    def decode(self, latents: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Turn latents into images.

        Parameters
        ----------
        latents
            float32 of shape (images, 4, h, w), as the sampler leaves them.

        Returns
        -------
        list
            float32 arrays of shape (8h, 8w, 3) in [0, 1].

        """
        _, channels, height, width = latents.shape
        # One image after the other: the decoder's activations are the largest thing in memory.
        binding = self._session("vae_decoder").bind(
            {"latents": (1, channels, height, width), "image": (1, 3, 8 * height, 8 * width)}
        )
        images = []
        for image_latents in latents:
            binding.inputs["latents"][0] = image_latents
            binding.run()
            pixels = binding.outputs["image"][0].transpose(1, 2, 0)
            images.append(np.ascontiguousarray(np.clip(pixels / 2 + 0.5, 0, 1)))
        return images

    def pictures(self, request: Request, latents: NDArray[np.float32]) -> list[Image]:
        """Decode a request's latents to PIL images whose ``info["parameters"]`` tells how they were made."""
        return [
            to_pil(array, describe(self.bundle, request, image)) for image, array in enumerate(self.decode(latents))
        ]

    def _session(self, name: str) -> Session:
        with self._lock:
            if self._closed:
                raise InputError("this pipeline is closed: load the bundle again")
            if name not in self._sessions:
                verify_once(self.bundle, name)
                self._sessions[name] = self._stack.enter_context(open_session(self.bundle, name))
            return self._sessions[name]

    def close(self) -> None:
        """Free all engines. Calls that are running in other threads must have ended."""
        with self._lock:
            self._closed = True
            self._sessions.clear()
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
