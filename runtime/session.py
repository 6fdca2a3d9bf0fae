"""What every backend offers the pipeline: a session for each component, and buffers bound to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


class Binding(Protocol):
    """Buffers of fixed shapes, bound to a session once and used for every step.

    Attributes
    ----------
    inputs
        By name; write to them before `run`.
    outputs
        By name; they hold the last run's results, and the next run overwrites them.

    """

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]

    def run(self) -> None:
        """Compute the outputs from the inputs."""


class Session(Protocol):
    """A component of a bundle, loaded and ready to run. Sessions may be used by several threads at once."""

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Binding:
        """Make buffers for inputs and outputs, all of them named in `shapes`, and bind them."""

    def close(self) -> None:
        """Free what the session holds. It must not be used afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
