"""What both stages of the training share: learning rates, moving averages, states that resume, sample grids."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["Average", "Run", "cosine_rate", "save_grid", "trapezoid_rate"]


def cosine_rate(step: int, steps: int, warm_up: int = 100) -> float:
    """Share of the peak learning rate at a step: a linear rise, then half a cosine down to a hundredth."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def trapezoid_rate(step: int, steps: int, warm_up: int = 100, falling: float = 0.35) -> float:
    """Share of the peak learning rate at a step: a linear rise, constant, and a linear fall over the last part.

    Up to the fall it does not depend on `steps`, so that a run can be made longer while it is under way.
    """
    return max(0.01, min(1.0, (step + 1) / warm_up, (steps - step) / (falling * steps)))


class Average:
    """Exponential moving average of parameters, with a decay that grows from 0 so that the start is soon forgotten."""

    def __init__(self, parameters: Iterable[torch.Tensor], decay: float) -> None:
        self._live = list(parameters)
        self._decay = decay
        self.values = [p.detach().clone() for p in self._live]

    def update(self, step: int) -> None:
        """Take in the parameters' values after `step`."""
        decay = min(self._decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.values, self._live, 1 - decay)

    def swap(self) -> None:
        """Exchange the parameters with their averages; a second call restores them."""
        with torch.no_grad():
            for live, value in zip(self._live, self.values, strict=True):
                held = live.detach().clone()
                live.copy_(value)
                value.copy_(held)


class Run:
    """One stage's state on disk: module, optimisers, averages, and the number of steps done.

    Parameters
    ----------
    path
        The state's file.
    module
        What is trained.
    optimisers
        Their learning rates are the peaks of the course.
    average
        Averaged parameters of the module.

    """

    def __init__(
        self, path: Path, module: torch.nn.Module, optimisers: list[torch.optim.Optimizer], average: Average
    ) -> None:
        self.path, self.module, self.optimisers, self.average = path, module, optimisers, average
        self.step = 0
        self.notes: dict[str, float] = {}
        self._peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]

    def save(self) -> None:
        """Write the state beside its place, then rename, so that an interruption leaves the last one whole."""
        state = {
            "step": self.step,
            "module": self.module.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "average": self.average.values,
            "notes": self.notes,
        }
        beside = self.path.with_suffix(".part")
        torch.save(state, beside)
        beside.replace(self.path)

    def resume(self) -> bool:
        """Load the state if there is one; tell whether there was."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(state["module"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for value, saved in zip(self.average.values, state["average"], strict=True):
            value.copy_(saved)
        self.step, self.notes = state["step"], state["notes"]
        return True

    def rate(self, share: float) -> None:
        """Set the learning rates to a share of their peaks."""
        for optimiser, peaks in zip(self.optimisers, self._peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * share

    def advance(self) -> None:
        """Clip the gradients, take a step, and take it into the average."""
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.average.update(self.step)
        self.step += 1

    def note(self, *, seconds: float, **losses: float) -> None:
        """Add up the time, and smooth the losses."""
        self.notes["seconds"] = self.notes.get("seconds", 0.0) + seconds
        for name, value in losses.items():
            self.notes[name] = 0.99 * self.notes.get(name, value) + 0.01 * value


def save_grid(images: npt.NDArray[np.uint8], columns: int, path: Path) -> None:
    """Write (N, H, W, 3) uint8 images as one PNG, row by row."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    Image.fromarray(sheet).save(path)
