"""Pictures that were asked for, until they are made: a bounded queue, and the loops that work it off."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ..errors import SdrtError
from ..runtime.images import to_pil
from .turns import GivenUpError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

    from ..runtime.loop import Step
    from ..runtime.request import Request
    from .metrics import Metrics
    from .models import Model

_LONGEST_RETRY_S = 600
_WEIGHT = 0.2  # of the newest picture in the running mean of how long one takes


class QueueFullError(SdrtError):
    """There is no place for what was asked.

    Attributes
    ----------
    retry_after
        Seconds after which there probably is.

    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrainingError(SdrtError):
    """The server is about to end and takes nothing new."""


@dataclass(eq=False)
class Picture:
    """One picture on its way.

    Attributes
    ----------
    model, request
        What makes it, and how; the request is for one image.
    previews
        Steps, from 0, after which it is shown as the model takes it to become.
    show
        Called with those pictures, in order, by the thread that makes them.
    stepped
        Called by that thread with each step, when it is done.
    done
        The finished picture, or what went wrong. Cancelling it ends the work before the next step.
    seconds
        What took how long: ``queue``, ``prepare``, ``denoise`` and ``decode``, as `Metrics.phases` has them.

    """

    model: Model
    request: Request
    previews: frozenset[int] = frozenset()
    show: Callable[[Image], None] = lambda _: None
    stepped: Callable[[Step], None] = lambda _: None
    done: Future[Image] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)


class Scheduler:
    """The queue and its workers.

    Parameters
    ----------
    workers
        How many pictures are made at once.
    places
        How many may wait.
    metrics
        Where figures go.

    """

    def __init__(self, workers: int, places: int, metrics: Metrics) -> None:
        self._places = places
        self._metrics = metrics
        self._changed = threading.Condition()
        self._queue: deque[Picture] = deque()
        self._running = 0
        self._draining = False
        self._pace_s = 1.0
        metrics.queue_depth.set_function(lambda: self.depth)
        metrics.running.set_function(lambda: self._running)
        self._workers = [threading.Thread(target=self._work, daemon=True, name=f"loop-{n}") for n in range(workers)]
        for worker in self._workers:
            worker.start()

    @property
    def depth(self) -> int:
        """How many pictures wait."""
        with self._changed:
            return self._waiting()

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._draining

    def check_room(self, count: int) -> None:
        """Raise what `submit` would raise for so many pictures now."""
        with self._changed:
            self._check_room(count)

    def submit(self, pictures: Sequence[Picture]) -> None:
        """Queue pictures, all or none.

        Raises
        ------
        QueueFullError
            There are not enough places.
        DrainingError
            After `drain`.

        """
        with self._changed:
            self._check_room(len(pictures))
            self._queue.extend(pictures)
            self._changed.notify_all()
        for picture in pictures:
            picture.done.add_done_callback(partial(_wake, picture.model))

    def drain(self) -> None:
        """Take nothing new, and return when all is done that was taken."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    def _check_room(self, count: int) -> None:
        if self._draining:
            raise DrainingError("the server is about to end and takes nothing new: ask another, or this one later")
        waiting = self._waiting()
        # A worker that is free is a place as well, for a picture that will not wait.
        if waiting + count > self._places + max(0, len(self._workers) - self._running):
            # By then half of what waits is done, and there is room even if others come back as well.
            seconds = self._pace_s * max(count, waiting / 2)
            raise QueueFullError(
                f"{waiting} pictures wait and there are {self._places} places: try again later",
                min(max(math.ceil(seconds), 1), _LONGEST_RETRY_S),
            )

    def _waiting(self) -> int:
        """Count what waits, letting go of what nobody waits for any more."""
        if any(picture.done.cancelled() for picture in self._queue):
            self._queue = deque(picture for picture in self._queue if not picture.done.cancelled())
        return len(self._queue)

    def _work(self) -> None:
        while picture := self._take():
            try:
                began = time.perf_counter()
                self._observe(picture, "queue", began - picture.since)
                image = self._make(picture)
                self._learn(time.perf_counter() - began)
            except GivenUpError:
                pass
            except Exception as error:  # noqa: BLE001 - it is raised where the picture is waited for
                if picture.done.set_running_or_notify_cancel():
                    picture.done.set_exception(error)
            else:
                # A future that is neither running nor done can be cancelled at any time, and so up to here.
                if image is not None and picture.done.set_running_or_notify_cancel():
                    picture.done.set_result(image)
            with self._changed:
                self._running -= 1

    def _take(self) -> Picture | None:
        with self._changed:
            while not self._waiting():
                if self._draining:
                    return None
                self._changed.wait()
            self._running += 1
            return self._queue.popleft()

    def _make(self, picture: Picture) -> Image | None:
        """Make a picture; None if it was cancelled meanwhile."""
        model, request = picture.model, picture.request
        began = time.perf_counter()
        denoised = 0.0
        with model.at_work(picture.done.cancelled), closing(model.pipeline.run(request)) as loop:
            if picture.done.cancelled():  # while it waited for the GPU
                return None
            for step in loop:
                seconds = step.seconds  # which waits for the step on a GPU
                if not step.index:
                    self._observe(picture, "prepare", time.perf_counter() - began - seconds)
                denoised += seconds
                self._metrics.count_step(model.name)
                if picture.done.cancelled():
                    return None
                picture.stepped(step)
                if step.index in picture.previews:
                    (pixels,) = model.pipeline.decode(step.estimate)
                    picture.show(to_pil(pixels, ""))
                latents = step.latents
            ended = time.perf_counter()
            (image,) = model.pipeline.pictures(request, latents)
        self._observe(picture, "denoise", denoised)
        self._observe(picture, "decode", time.perf_counter() - ended)
        return image

    def _observe(self, picture: Picture, phase: str, seconds: float) -> None:
        picture.seconds[phase] = seconds
        self._metrics.phases.labels(picture.model.name, phase).observe(seconds)

    def _learn(self, seconds: float) -> None:
        """Keep a running mean of how often a picture is done."""
        with self._changed:
            self._pace_s += _WEIGHT * (seconds / max(self._running, 1) - self._pace_s)


def _wake(model: Model, _: Future[Image]) -> None:
    model.wake()
