"""diffusers' own pipeline on a checkpoint's weights, to be measured beside sdrt; and what torch multiplies at most.

No hook of sdrt is in it: modules, attention, schedulers and the loop are those that users of diffusers have.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Literal

import diffusers
import numpy as np
import torch
import transformers

from .checkpoint import read_checkpoint
from .modules import load_model
from .vocabulary import END, read_merges, vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

Precision = Literal["fp32", "bf16"]

_DTYPES: Final[dict[Precision, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Diffusers:
    """``StableDiffusionPipeline`` on the CPU.

    Parameters
    ----------
    checkpoint
        As for `read_checkpoint`.
    scheduler
        The class of diffusers that steps.
    ema
        Take the averaged weights of a file that has both.
    clip_skip
        Last layers of the text encoder to leave out.
    precision
        ``fp32``; or ``bf16``, which goes with channels last in memory.
    compiled
        Compile U-Net and decoder with ``torch.compile`` when they are first used, which takes minutes.

    Raises
    ------
    SdrtError
        The checkpoint cannot be read.

    """

    def __init__(
        self, checkpoint: str, *, scheduler: str, ema: bool, clip_skip: int, precision: Precision, compiled: bool
    ) -> None:
        diffusers.utils.logging.set_verbosity_error()
        transformers.logging.set_verbosity_error()
        found = read_checkpoint(checkpoint, ema=ema)
        self._dtype = _DTYPES[precision]
        self._clip_skip = clip_skip
        parts: dict[str, Any] = {
            "unet": load_model("unet", found.unet),
            "vae": load_model("vae", found.vae),
            "text_encoder": load_model("text_encoder", found.text_encoder),
        }
        for part in parts.values():
            part.to(self._dtype)
            if precision == "bf16":
                part.to(memory_format=torch.channels_last)
        if clip_skip:
            # transformers 5 took away a level that diffusers still looks for when it skips layers.
            object.__setattr__(parts["text_encoder"], "text_model", parts["text_encoder"])
        config = {name: value for name, value in found.scheduler.items() if name != "sampler"}
        if scheduler == "PNDMScheduler":
            config["skip_prk_steps"] = True  # as Stable Diffusion does, also where a single file says nothing
        self._pipeline = diffusers.StableDiffusionPipeline(
            **parts,
            scheduler=getattr(diffusers, scheduler).from_config(config),
            tokenizer=transformers.CLIPTokenizer(
                vocab=vocabulary(),
                merges=[tuple(merge.split(" ")) for merge in read_merges()],
                pad_token=END,
                model_max_length=77,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        if compiled:
            self._pipeline.unet = torch.compile(self._pipeline.unet)
            self._pipeline.vae.decode = torch.compile(self._pipeline.vae.decode)
        self._latents = self._embeddings = torch.empty(0)

    @property
    def about(self) -> dict[str, Any]:
        """Tell the threads."""
        return {"threads": torch.get_num_threads()}

    def embed(self, prompt: str) -> None:
        """Encode one prompt."""
        with torch.inference_mode():
            self._pipeline.encode_prompt(
                prompt,
                torch.device("cpu"),
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                clip_skip=self._clip_skip or None,
            )

    def prepare(self, latents: NDArray[np.float32], embeddings: NDArray[np.float32]) -> None:
        """Take what `predict` works on.

        Parameters
        ----------
        latents
            float32 of shape (N, 4, height / 8, width / 8).
        embeddings
            float32 of shape (N, or 2N with guidance, 77, width).

        """
        self._latents = torch.from_numpy(latents).to(self._dtype)
        self._embeddings = torch.from_numpy(embeddings).to(self._dtype)

    @torch.inference_mode()
    def predict(self, timestep: float, guidance_scale: float) -> NDArray[np.float32]:
        """Run the U-Net for a step, with guidance if there are embeddings for it, and without the scheduler."""
        guided = len(self._embeddings) != len(self._latents)
        both = torch.cat([self._latents] * 2) if guided else self._latents
        (predicted,) = self._pipeline.unet(
            both, torch.tensor(timestep), encoder_hidden_states=self._embeddings, return_dict=False
        )
        if guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + guidance_scale * (conditional - unconditional)
        return _to_numpy(predicted)

    @torch.inference_mode()
    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode latents of the shape (N, 4, h, w) to images (N, 3, 8h, 8w), around [-1, 1]."""
        vae = self._pipeline.vae
        scaled = torch.from_numpy(latents).to(self._dtype) / vae.config.scaling_factor
        return _to_numpy(vae.decode(scaled, return_dict=False)[0])

    def generate(
        self, prompt: str, *, steps: int, guidance_scale: float, width: int, height: int, images: int, seed: int
    ) -> NDArray[np.float32]:
        """Make images of a prompt, the arguments as for `Pipeline.__call__` of sdrt.

        Returns
        -------
        float32 array of shape (N, height, width, 3) in [0, 1].

        """
        made = self._pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            width=width,
            height=height,
            num_images_per_prompt=images,
            generator=[torch.Generator().manual_seed(seed + image) for image in range(images)],
            clip_skip=self._clip_skip or None,
            output_type="np",
        )
        return np.asarray(made.images, np.float32)


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().numpy()
    return array


def multiplier(size: int, precision: Precision) -> Any:
    """Make a function that multiplies two random square matrices and returns the seconds that it took."""
    a, b = (torch.randn(size, size).to(_DTYPES[precision]) for _ in range(2))
    out = torch.empty(size, size, dtype=_DTYPES[precision])

    def multiply() -> float:
        began = time.perf_counter()
        torch.matmul(a, b, out=out)
        return time.perf_counter() - began

    return multiply
