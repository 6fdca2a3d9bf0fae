"""The U-Net with its guidance, as the denoising loop of the host calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..engines.manifest import DEEP_FEATURES, UNET_HALVES, DimRange
from ..errors import BundleCorruptError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ..engines.manifest import Component, TensorSpec
    from .request import Request
    from .session import Binding
    from .work import Work


_LATENTS, _TIMESTEP, _TEXT, _PREDICTION = "latents", "timestep", "text_embeddings", "prediction"
_LEVELS = 10  # a U-Net of so many levels would halve the longest side that there is to one


def component_names(request: Request, work: Work) -> tuple[str, ...]:
    """Name the components that make an evaluation, in order."""
    if not work.whole:
        return ("unet_shallow",)
    if work.reuses_encoder:
        return ("unet_decoder",)
    return UNET_HALVES if request.keeps_encoder else ("unet",)


def evaluation_shapes(request: Request, work: Work, component: Component) -> dict[str, tuple[int, ...]]:
    """Give the shapes of what a component reads and writes in an evaluation, by name.

    Deep features are not among those that it writes where the request does not keep them.

    Parameters
    ----------
    request, work
        The request, and which of its kinds of work.
    component
        Of the U-Net's.

    Raises
    ------
    BundleCorruptError
        It has a dimension that no U-Net has.

    """
    _, *sides = request.latent_shape
    sizes = {"batch": len(request.seeds) * (2 if work.guided else 1)}
    for name, side in zip(("height", "width"), sides, strict=True):
        sizes[name] = side
        sizes |= {f"{name}_{2**level}": -(-side // 2**level) for level in range(1, _LEVELS)}

    def shape(spec: TensorSpec) -> tuple[int, ...]:
        for dim in spec.shape:
            if isinstance(dim, DimRange) and dim.name not in sizes:
                raise BundleCorruptError(
                    f"bundle.json: {spec.name} of {component.name} has a dimension {dim.name!r}, expected batch, "
                    "height, width, or one of these sides on a level of the U-Net, such as height_2"
                )
        return tuple(sizes[dim.name] if isinstance(dim, DimRange) else dim for dim in spec.shape)

    written = [spec for spec in component.outputs if spec.name != DEEP_FEATURES or request.keeps_features]
    return {spec.name: shape(spec) for spec in (*component.inputs, *written)}


class Predictor:
    """The guided prediction as a function of x and t, to be called for each evaluation of a request in turn.

    Parameters
    ----------
    request
        Whose `work` says what each evaluation comes to.
    embeddings
        float32 of shape (rows, 77, width); with guidance those of the negative prompts, then those of the prompts.
    bindings
        Of the components of `component_names`, in the shapes of `evaluation_shapes`, for each kind of the request's
        work.

    """

    def __init__(
        self, request: Request, embeddings: NDArray[np.float32], bindings: Mapping[Work, Sequence[Binding]]
    ) -> None:
        for each in bindings.values():
            for binding in each:
                told = binding.inputs[_TEXT]
                told[...] = embeddings[-len(told) :]
        self._bindings = bindings
        self._shape = (len(request.seeds), *request.latent_shape)
        self._scale = np.float32(request.guidance_scale)
        self._work = iter(request.work)
        # Features by name, where the last binding left them that gave any: nothing writes there before it does again.
        self._features: dict[str, NDArray[np.float32]] = {}
        self._supplied: set[tuple[str, int]] = set()
        self._guided = np.empty(self._shape, np.float32)

    def __call__(self, x: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        """Predict; `.loop.denoise` says what is given and what is taken."""
        work = next(self._work)
        for binding in self._bindings[work]:
            self._tell(binding, x, t)
            binding.run()
            self._keep(binding)
        output = binding.outputs[_PREDICTION]
        return self._guide(output) if work.guided else output

    def _tell(self, binding: Binding, x: NDArray[np.float32], t: float) -> None:
        """Fill the inputs: features of more rows than are wanted come with those of the prompts last."""
        for name, target in binding.inputs.items():
            if name == _LATENTS:
                target.reshape(-1, *self._shape)[...] = x
            elif name == _TIMESTEP:
                target[0] = t
            elif name != _TEXT and (name, id(binding)) not in self._supplied:
                target[...] = self._features[name][-len(target) :]
                self._supplied.add((name, id(binding)))

    def _keep(self, binding: Binding) -> None:
        """Remember where the features are that a binding gave."""
        given = {name: array for name, array in binding.outputs.items() if name != _PREDICTION}
        self._features |= given
        self._supplied = {(name, reader) for name, reader in self._supplied if name not in given}

    def _guide(self, output: NDArray[np.float32]) -> NDArray[np.float32]:
        """Go from the prediction without the prompt towards the one with it, and beyond (Ho & Salimans 2022)."""
        unconditional, conditional = output.reshape(2, *self._shape)
        np.subtract(conditional, unconditional, out=self._guided)
        np.multiply(self._guided, self._scale, out=self._guided)
        np.add(self._guided, unconditional, out=self._guided)
        return self._guided
