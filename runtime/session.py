"""What every backend offers the pipeline: sessions, buffers bound to them, and all of a bundle at work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from .loop import Step
    from .request import Request


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

    def trim(self) -> None:
        """Give back what `run` holds beside buffers and weights, until it runs again: a matter of memory alone."""


class Session(Protocol):
    """A component of a bundle, loaded and ready to run. Sessions may be used by several threads at once."""

    def bind(self, shapes: Mapping[str, tuple[int, ...]], *, in_pairs: bool = False) -> Binding:
        """Make buffers for the inputs and for those outputs that `shapes` names, and bind them.

        With `in_pairs` the second half of the latents will always equal the first, as in guidance, and a session may
        use that; what it computes is the same.
        """

    def close(self) -> None:
        """Free what the session holds. It must not be used afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class DeviceBinding(Protocol):
    """Buffers in a GPU's memory, of fixed shapes, bound to a session."""

    @property
    def addresses(self) -> Mapping[str, int]:
        """Of all inputs and outputs, by name; they stay the same but for `place`."""

    @property
    def graph_obstacle(self) -> str | None:
        """Why `enqueue` cannot be captured into a CUDA graph, in one line; None if nothing speaks against it."""

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Enqueue the upload of an input, of the binding's shape; the array may change afterwards."""

    def prepare(self) -> int:
        """Do what cannot be captured, and return a number that changes when a captured graph is of no use any more."""

    def enqueue(self) -> None:
        """Enqueue the computation of the outputs from the inputs into the session's stream."""

    def place(self, name: str, address: int) -> None:
        """Let an output be written to another address from the next `enqueue` on; 0 for the binding's own buffer."""

    def close(self) -> None:
        """Free what the binding holds; the stream must be done with it."""


class DeviceSession(Protocol):
    """A component of a bundle, loaded onto a GPU. Its work is enqueued by one thread at a time."""

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> DeviceBinding:
        """Make buffers for the inputs and for those outputs that `shapes` names, and bind them.

        Raises
        ------
        InputError
            The engine takes no such shapes; the message lists those that it takes.
        BackendError
            The GPU failed, or has too little memory.

        """

    def keep(self) -> None:
        """Keep on disk what makes the next start faster, if there is anything new."""

    def close(self) -> None:
        """Free what the session holds; its bindings must be closed."""


@dataclass(frozen=True, eq=False)
class Passage:
    """One call of the text encoder, and what is made of it.

    Attributes
    ----------
    ids
        int64 of shape (texts, 77), each different text once.
    clip_skip
        Last layers to leave out.
    rows
        For each row of the U-Net's batch that this fills, which of the texts it is.

    """

    ids: NDArray[np.int64]
    clip_skip: int
    rows: tuple[int, ...]


class Engines(Protocol):
    """A bundle's components at work, on the host or on a GPU. Threads may share them."""

    @property
    def tiles(self) -> bool:
        """Whether they decode in tiles."""

    def encode(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        """Return the text embeddings, float32 of shape (rows of all passages, 77, width)."""

    def denoise(
        self, request: Request, passages: Sequence[Passage], draw_noise: Callable[[], NDArray[np.float32]]
    ) -> Generator[Step, NDArray[np.float32] | None]:
        """Run the denoising loop; see `.loop.denoise`."""

    def latents(
        self, request: Request, passages: Sequence[Passage], draw_noise: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Run the whole loop, of which nobody wants to see the steps, and return the last latents."""

    def decode(self, latents: NDArray[np.float32], *, vae_tiling: bool | None = None) -> NDArray[np.float32]:
        """Return the images, float32 of shape (N, 3, height, width), around [-1, 1]; see `.tiling` for the tiles."""

    def close(self) -> None:
        """Free everything. Nothing may be running."""
