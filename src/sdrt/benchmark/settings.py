"""What is measured: the same for everybody who takes part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Part = Literal["text", "step", "decode", "picture"]
PARTS: Final[tuple[Part, ...]] = ("text", "step", "decode", "picture")
"""One prompt to its embeddings, one guided step of the U-Net, latents to images, and a prompt to images."""

START: Final = "start"
"""Beside the parts: what a fresh process takes until its first step, and the memory of a whole picture."""

PROMPT: Final = "Great Wall photo"
SEED: Final = 42


@dataclass(frozen=True)
class Settings:
    """A picture, and how often it is made.

    Attributes
    ----------
    bundle
        The bundle's folder.
    backend
        sdrt's own, precision included.
    steps, width, height, batch, cfg_scale, guidance_interval, cache_interval, encoder_interval
        As in ``sdrt run``. The last three concern sdrt's whole pictures alone: a step is always a whole one.
    sampler
        A key of ``SAMPLERS``.
    rounds
        Turns that count of each process; one more comes first.
    launches
        How often everybody is started anew for as many rounds: one process can be faster than the next of the same
        program for as long as it lives.
    parts
        Of `PARTS`, what is measured.
    checkpoint
        Where peers that run PyTorch take their weights from, as for ``sdrt build --ckpt``; None if it is not known.
    step_flops
        Floating-point operations of a step; None if they are not known.
    no_floor
        Why there is no floor; None if there is one.

    """

    bundle: str
    backend: str
    steps: int
    width: int
    height: int
    batch: int
    sampler: str
    cfg_scale: float
    rounds: int
    launches: int
    guidance_interval: tuple[float, float] | None
    cache_interval: int
    encoder_interval: int
    parts: tuple[Part, ...]
    checkpoint: str | None
    step_flops: int | None
    no_floor: str | None

    @property
    def guided(self) -> bool:
        """Whether the U-Net runs on two rows an image."""
        return self.cfg_scale > 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Of all images: N, 4, height / 8, width / 8."""
        return (self.batch, 4, self.height // 8, self.width // 8)

    @property
    def loop_steps(self) -> int:
        """As many steps of one request as the turns take, those that do not count among them."""
        return self.rounds + 2

    def prompt(self, turn: int) -> str:
        """Give the prompt of a turn: another one each time, since embeddings are remembered."""
        return f"{PROMPT} {turn}"
