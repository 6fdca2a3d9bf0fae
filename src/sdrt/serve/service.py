"""What all handlers of the server share."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Literal

from ..errors import InputError
from .http import RefusalError, later
from .metrics import Metrics
from .models import Model, check_names
from .scheduler import Scheduler
from .shared_memory import Regions
from .turns import Turns

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from ..runtime.pipeline import Pipeline

State = Literal["loading", "ready", "draining"]

_SIDES = 2
"""The largest picture is, unless set, so many times as high and as wide as those that the model was trained on."""


class Service:
    """The models that are served, the queue before them, and the figures about both.

    Parameters
    ----------
    pipelines
        Of the bundles; the first is for requests that name none.
    loop
        Of the HTTP side.
    most_at_once
        How many pictures are made at once.
    places
        How many may wait.
    largest
        Width and height of the largest picture; None for twice what each model was trained on. A picture of the same
        area in another shape is as well.
    allow_shared_memory
        Whether clients may register regions of it.

    Raises
    ------
    InputError
        Two bundles have one name.

    """

    def __init__(
        self,
        pipelines: Sequence[Pipeline],
        loop: asyncio.AbstractEventLoop,
        *,
        most_at_once: int,
        places: int,
        largest: tuple[int, int] | None,
        allow_shared_memory: bool = False,
    ) -> None:
        self.loop = loop
        self.metrics = Metrics()
        turns = Turns(most_at_once, self.metrics.batch.observe)
        self.models = [Model(pipeline, turns) for pipeline in pipelines]
        check_names(self.models)
        self.scheduler = Scheduler(most_at_once, places, self.metrics)
        self.regions = Regions(allowed=allow_shared_memory)
        self._largest = largest
        self._warm = False
        self.metrics.ready.set_function(lambda: self.state == "ready")

    @property
    def state(self) -> State:
        """Whether pictures are made."""
        if self.scheduler.draining:
            return "draining"
        return "ready" if self._warm else "loading"

    def warm_up(self) -> None:
        """Make every model ready; takes seconds to minutes.

        Raises
        ------
        SdrtError
            A bundle does not run here.

        """
        for model in self.models:
            model.warm_up()
        # What is there now stays. Out of the collector's sight it costs no pause of all threads any more, and what
        # requests leave behind goes sooner: the collector weighs it against all that it sees. Nobody waits yet.
        gc.collect()
        gc.freeze()
        self._warm = True

    def check_ready(self) -> None:
        """Refuse a request as long as models are being loaded."""
        if self.state == "loading":
            raise later("the models are being loaded: try again in a moment", "loading")

    def model(self, name: str | None) -> Model:
        """Find a model by its name; None is the first."""
        if name is None:
            return self.models[0]
        for model in self.models:
            if model.name == name:
                return model
        known = ", ".join(each.name for each in self.models)
        raise RefusalError(
            404, f"there is no model {name[:100]!r}: expected one of {known}", param="model", code="model_not_found"
        )

    def check_size(self, model: Model, width: int, height: int) -> None:
        """Refuse sizes that would take more memory than the server is meant to use.

        Raises
        ------
        InputError
            It is too large.

        """
        most_wide, most_high = self._largest or (_SIDES * model.side, _SIDES * model.side)
        if width * height > most_wide * most_high:
            raise InputError(f"size is {width}x{height}: expected at most {most_wide}x{most_high}, or the same area")
