"""The U-Net with its guidance, as the denoising loop of the host calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..engines.manifest import DEEP_FEATURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from .request import Request
    from .session import Binding
    from .work import Work


def evaluation_shapes(
    request: Request, work: Work, embedding: tuple[int, int], feature_channels: int
) -> dict[str, tuple[int, ...]]:
    """Give the shapes of what an evaluation of the U-Net reads and writes, by name.

    Parameters
    ----------
    request, work
        The request, and which of its kinds of work.
    embedding
        Tokens and width of the text embeddings.
    feature_channels
        Of the deep features, where the request's work needs any.

    """
    rows = len(request.seeds) * (2 if work.guided else 1)
    batch = (rows, *request.latent_shape)
    shapes = {"latents": batch, "timestep": (1,), "text_embeddings": (rows, *embedding), "prediction": batch}
    if request.keeps_features:
        shapes[DEEP_FEATURES] = (rows, feature_channels, *request.latent_shape[1:])
    return shapes


class Predictor:
    """The guided prediction as a function of x and t, to be called for each evaluation of a request in turn.

    Parameters
    ----------
    request
        Whose `work` says what each evaluation comes to.
    embeddings
        float32 of shape (rows, 77, width); with guidance those of the negative prompts, then those of the prompts.
    bindings
        Of the U-Net or its outermost blocks, in the shapes of `evaluation_shapes`, for each kind of the request's work.

    """

    def __init__(self, request: Request, embeddings: NDArray[np.float32], bindings: Mapping[Work, Binding]) -> None:
        for binding in bindings.values():
            told = binding.inputs["text_embeddings"]
            told[...] = embeddings[-len(told) :]
        self._bindings = bindings
        self._shape = (len(request.seeds), *request.latent_shape)
        self._scale = np.float32(request.guidance_scale)
        self._work = iter(request.work)
        self._keeps_features = request.keeps_features
        # Where the last whole evaluation left them: nothing writes there before the next one.
        self._features: NDArray[np.float32] | None = None
        self._supplied: set[Work] = set()
        self._guided = np.empty(self._shape, np.float32)

    def __call__(self, x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        """Predict; `.loop.denoise` says what is given and what is taken."""
        work = next(self._work)
        binding = self._bindings[work]
        binding.inputs["latents"].reshape(-1, *self._shape)[...] = x
        binding.inputs["timestep"][0] = t
        if not work.whole:
            self._supply(work, binding.inputs)
        binding.run()
        if work.whole and self._keeps_features:
            self._features = binding.outputs[DEEP_FEATURES]
            self._supplied.clear()
        output = binding.outputs["prediction"]
        return self._guide(output) if work.guided else output

    def _supply(self, work: Work, inputs: Mapping[str, NDArray[np.float32]]) -> None:
        """Put in the deep features of the last whole evaluation, those of the prompts' rows being its last."""
        assert self._features is not None  # the first evaluation is a whole one
        if work not in self._supplied:
            target = inputs[DEEP_FEATURES]
            target[...] = self._features[-len(target) :]
            self._supplied.add(work)

    def _guide(self, output: NDArray[np.float32]) -> NDArray[np.float32]:
        """Go from the prediction without the prompt towards the one with it, and beyond (Ho & Salimans 2022)."""
        unconditional, conditional = output.reshape(2, *self._shape)
        np.subtract(conditional, unconditional, out=self._guided)
        np.multiply(self._guided, self._scale, out=self._guided)
        np.add(self._guided, unconditional, out=self._guided)
        return self._guided
