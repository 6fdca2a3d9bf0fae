"""sdrt itself, through its pipeline as its users have it, with a clock at each of its sessions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import numpy as np

from ..runtime.host import HostEngines
from ..runtime.pipeline import load
from ..runtime.request import make_request
from .contender import Turn
from .settings import SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from numpy.typing import NDArray

    from ..runtime.loop import Step
    from ..runtime.request import Request
    from ..runtime.session import Binding, Session
    from ..runtime.work import Work
    from .settings import Settings

T = TypeVar("T")


class EngineClock:
    """Adds up the time that the engines take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, _name: str, session: Session) -> Session:
        """Put the clock at a session; for `HostEngines.wrap_sessions`."""
        return _TimedSession(session, self)


class _TimedSession:
    def __init__(self, session: Session, clock: EngineClock) -> None:
        self._session, self._clock = session, clock

    def bind(self, shapes: Mapping[str, tuple[int, ...]], *, in_pairs: bool = False) -> Binding:
        return cast("Binding", _TimedBinding(self._session.bind(shapes, in_pairs=in_pairs), self._clock))

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TimedBinding:
    def __init__(self, binding: Binding, clock: EngineClock) -> None:
        self._binding, self._clock = binding, clock

    def __getattr__(self, name: str) -> Any:
        """Leave to the binding all but what is timed."""
        return getattr(self._binding, name)

    def run(self) -> None:
        began = time.perf_counter()
        self._binding.run()
        self._clock.seconds += time.perf_counter() - began


class Sdrt:
    """A contender: the pipeline of `sdrt.load`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pipe = load(settings.bundle, backend=settings.backend)
        self._clock: EngineClock | None = None
        engines = self._pipe.engines
        if isinstance(engines, HostEngines):  # on a GPU work is enqueued, and its time is not the host's
            self._clock = EngineClock()
            engines.wrap_sessions(self._clock.wrap)
        self._latents = np.random.default_rng(SEED).standard_normal(settings.latent_shape, np.float32)
        self._steps = self._endless()
        self._images: list[NDArray[np.float32]] = []

    @property
    def about(self) -> dict[str, Any]:
        """Tell the backend."""
        return {"backend": self._pipe.backend}

    def text(self, turn: int) -> Turn:
        """Encode one prompt."""
        return self._timed(lambda: self._pipe.embed([self._settings.prompt(turn)]))[0]

    def step(self, _turn: int) -> Turn:
        """Make the next step of a request without approximations."""
        return self._timed(lambda: _next(self._steps))[0]

    def decode(self, _turn: int) -> Turn:
        """Decode latents."""
        return self._timed(lambda: self._pipe.decode(self._latents))[0]

    def picture(self, turn: int) -> Turn:
        """Make images as asked, step by step."""
        settings = self._settings
        began = time.perf_counter()
        request = self._request(
            turn,
            settings.steps,
            guidance_interval=settings.guidance_interval,
            cache_interval=settings.cache_interval,
            encoder_interval=settings.encoder_interval,
        )
        steps = self._pipe.run(request)
        kinds: list[tuple[str, float]] = []
        outside: list[float] = []
        for work in request.work:
            turn_taken, step = self._timed(lambda: _next(steps))
            kinds.append((_kind(work), step.seconds))
            if len(kinds) > 1:  # text and loading come before the first
                outside += turn_taken.more.values()
        looped = time.perf_counter()
        self._images = self._pipe.decode(step.latents)
        ended = time.perf_counter()
        return Turn(
            ended - began,
            {
                "loop": sum(seconds for _, seconds in kinds),
                "decode": ended - looped,
                "kinds": kinds,
                "outside_each": outside,
            },
        )

    def pixels(self) -> NDArray[np.float32]:
        """Give the last images."""
        return np.stack(self._images)

    def _request(self, turn: int, steps: int, **approximations: Any) -> Request:
        settings = self._settings
        return make_request(
            self._pipe.bundle.manifest,
            settings.prompt(turn),
            num_inference_steps=steps,
            guidance_scale=settings.cfg_scale,
            seed=SEED,
            height=settings.height,
            width=settings.width,
            num_images_per_prompt=settings.batch,
            sampler=settings.sampler,
            **approximations,
        )

    def _endless(self) -> Generator[Step]:
        """Give steps for as long as they are wanted."""
        while True:
            yield from self._pipe.run(self._request(0, self._settings.loop_steps))

    def _timed(self, work: Callable[[], T]) -> tuple[Turn, T]:
        inside = self._clock.seconds if self._clock else 0.0
        began = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - began
        if self._clock is None:
            return Turn(seconds), result
        return Turn(seconds, {"outside": seconds - (self._clock.seconds - inside)}), result


def _next(steps: Generator[Step, Any]) -> Step:
    """Give the next step once it is done: on a GPU, who asks for its time waits for it."""
    step = next(steps)
    _ = step.seconds
    return step


def _kind(work: Work) -> str:
    part = "decoder" if work.reuses_encoder else "whole" if work.whole else "shallow"
    return f"{part}, {'guided' if work.guided else 'unguided'}"
