"""The bundles that a server offers, each with its pipeline."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from ..engines.manifest import DimRange
from ..errors import InputError
from ..runtime.host import HostEngines
from ..runtime.onnx import OnnxSession
from .shared import SharedSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..engines.manifest import TensorSpec
    from ..runtime.pipeline import Pipeline
    from ..runtime.session import Session
    from .turns import Turns

_GUIDED = 2  # rows of the U-Net's batch for a guided picture
_PREDICTION = "prediction"
_STEPPED = frozenset({"unet", "unet_shallow", "unet_encoder", "unet_decoder"})


class Model:
    """One bundle, which clients call by its name.

    Parameters
    ----------
    pipeline
        Its engines are loaded by `warm_up`, and by nobody before.
    turns
        Where the calls of all models wait for each other.

    """

    def __init__(self, pipeline: Pipeline, turns: Turns) -> None:
        self.pipeline = pipeline
        self.name = pipeline.bundle.name
        self.created = int(datetime.fromisoformat(pipeline.bundle.manifest.created).timestamp())
        self._turns = turns
        self._alone = threading.Lock()
        self._on_host = False
        self._unet: SharedSession | None = None

    @property
    def side(self) -> int:
        """Height and width in pixels of the pictures that the model was trained on."""
        latent = self.pipeline.bundle.manifest.latent
        return latent.scale_factor * latent.sample_size

    @property
    def joins(self) -> bool:
        """Whether pictures share calls of the U-Net."""
        return self._unet is not None and self._unet.joined

    @contextmanager
    def at_work(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Make one picture with the pipeline inside: in turns with others on the host, alone on a GPU.

        `given_up` and what it leads to are those of `Turns.taking_part`.
        """
        if self._on_host:
            with self._turns.taking_part(given_up):
                yield
        else:
            with self._alone:
                yield

    def wake(self) -> None:
        """Say that a picture may have been given up."""
        self._turns.wake()

    def warm_up(self) -> None:
        """Load all that a picture needs, make one of one step, and find out whether pictures may share calls.

        Raises
        ------
        SdrtError
            The bundle does not run here.

        """
        engines = self.pipeline.engines
        if isinstance(engines, HostEngines):
            engines.wrap_sessions(self._wrap)
            self._on_host = True
        with self.at_work():
            self.pipeline("", num_inference_steps=1, seed=0)
        if self._unet is not None and self._turns.most > 1:
            self._unet.joined = isinstance(self._unet.session, OnnxSession) and self._is_exact(self._unet)

    def _wrap(self, name: str, session: Session) -> Session:
        component = self.pipeline.bundle.component(name)
        shared = SharedSession(self._turns, session, component, stepped=name in _STEPPED)
        if name == "unet":
            self._unet = shared
        return shared

    def _is_exact(self, unet: SharedSession) -> bool:
        component = self.pipeline.bundle.component("unet")
        side = self.pipeline.bundle.manifest.latent.sample_size
        outputs = [spec for spec in component.outputs if spec.name == _PREDICTION]
        shapes = {spec.name: _shape(spec, side) for spec in (*component.inputs, *outputs)}
        return unet.is_exact(shapes, self._turns.most)


def _shape(spec: TensorSpec, side: int) -> tuple[int, ...]:
    """Choose the shape of a tensor for one guided picture of the model's own size."""
    sizes = {"batch": _GUIDED, "height": side, "width": side}
    return tuple(sizes[dim.name] if isinstance(dim, DimRange) else dim for dim in spec.shape)


def check_names(models: Sequence[Model]) -> None:
    """Refuse two bundles that clients could not tell apart."""
    names = [model.name for model in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        folders = " and ".join(str(model.pipeline.bundle.folder) for model in models if model.name == twice)
        raise InputError(f"{folders} are both called {twice!r}: give bundles with names of their own")
