"""A component of a bundle that many loops use at once, several of their calls as one where that changes no bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..engines.manifest import DimRange

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from numpy.typing import NDArray

    from ..engines.manifest import Component, TensorSpec
    from ..runtime.session import Session
    from .turns import Turns

_BATCH = "batch"


class SharedSession:
    """A session whose calls wait for their turn.

    Parameters
    ----------
    turns
        Where they wait.
    session
        The one that is at work.
    component
        What the manifest says of it: inputs and outputs whose first dimension is called ``batch`` are laid one after
        the other when calls become one; in all others the calls have to be equal.
    stepped
        Whether it is called at every step, and then in the order of the loops; if not, it comes before those that are.
    joined
        Whether calls may become one.

    """

    def __init__(
        self, turns: Turns, session: Session, component: Component, *, stepped: bool, joined: bool = False
    ) -> None:
        self.turns = turns
        self.session = session
        self.stepped = stepped
        self.joined = joined
        self.batched = frozenset(spec.name for spec in (*component.inputs, *component.outputs) if _is_batched(spec))

    def bind(self, shapes: Mapping[str, tuple[int, ...]], *, in_pairs: bool = False) -> SharedBinding:
        """Make buffers for inputs and outputs, all of them named in `shapes`, and bind them."""
        return SharedBinding(self, shapes, in_pairs=in_pairs)

    def is_exact(self, shapes: Mapping[str, tuple[int, ...]], copies: int) -> bool:
        """Tell whether calls give to the last bit the same alone and as one, by trying it on random numbers.

        A library is free to sum in another order where the batch is larger. The first and the last call are compared.
        """
        random = np.random.default_rng(0)
        calls = [self.bind(shapes) for _ in range(copies)]
        for call in calls:
            for name, array in call.inputs.items():
                array[...] = random.standard_normal(array.shape) if name in self.batched else 1
        expected = []
        for call in (calls[0], calls[-1]):
            call.alone()
            expected.append({name: array.copy() for name, array in call.outputs.items()})
            for array in call.outputs.values():
                array.fill(np.nan)
        calls[0].together(calls)
        return all(
            np.array_equal(call.outputs[name], array)
            for call, outputs in zip((calls[0], calls[-1]), expected, strict=True)
            for name, array in outputs.items()
        )

    def close(self) -> None:
        """Free what the session holds."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SharedBinding:
    """Buffers for one loop, which are those of the session itself whenever a call is run alone."""

    def __init__(self, shared: SharedSession, shapes: Mapping[str, tuple[int, ...]], *, in_pairs: bool) -> None:
        self._shared = shared
        self._shapes = shapes
        self._own = shared.session.bind(shapes, in_pairs=in_pairs)
        self.inputs: Mapping[str, NDArray[Any]] = self._own.inputs
        self.outputs: Mapping[str, NDArray[Any]] = self._own.outputs

    def run(self) -> None:
        """Compute the outputs from the inputs, when it is this call's turn."""
        self._shared.turns.run(self)

    def trim(self) -> None:
        """Give back what the session holds beside buffers and weights, unless a call of it runs just now."""
        self._own.trim()

    @property
    def joins(self) -> bool:
        """Whether it may become one with other calls of its key."""
        return self._shared.joined

    def key(self) -> Hashable | None:
        """Give the session, the shapes but for the batch, and what the whole batch has in common."""
        if not self._shared.stepped:
            return None
        if not self._shared.joined:
            return id(self)
        batched = self._shared.batched
        shapes = tuple((name, shape[1:]) for name, shape in self._shapes.items() if name in batched)
        common = tuple((name, array.tobytes()) for name, array in self.inputs.items() if name not in batched)
        return (id(self._shared), shapes, common)

    def alone(self) -> None:
        """Run this call."""
        self._own.run()

    def together(self, calls: Sequence[SharedBinding]) -> None:
        """Run calls of the same key, this one among them, as one."""
        batched = self._shared.batched & self._shapes.keys()  # an output may be left out
        shapes = dict(self._shapes)
        for name in batched & shapes.keys():
            rows = sum(call._shapes[name][0] for call in calls)  # noqa: SLF001 - of this class
            shapes[name] = (rows, *shapes[name][1:])
        joint = self._shared.session.bind(shapes)
        for name, array in joint.inputs.items():
            if name in batched:
                np.concatenate([call.inputs[name] for call in calls], out=array)
            else:
                array[...] = self.inputs[name]
        joint.run()
        for name, array in joint.outputs.items():
            begin = 0
            for call in calls:
                end = begin + len(call.outputs[name])
                call.outputs[name][...] = array[begin:end]
                begin = end


def _is_batched(spec: TensorSpec) -> bool:
    first = spec.shape[0]
    return isinstance(first, DimRange) and first.name == _BATCH
