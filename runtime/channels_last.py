"""Operations of ours one after the other without a change of type or order in between.

Each is put into a graph for itself, between conversions to bf16 and back and, for pictures, transpositions to channels
last and back. What stands between two of them is followed back here, through concatenations too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .kernels import CHANNELS_FIRST, CHANNELS_LAST, rounds

_OURS = "Sdrt"


def connect(model: Any) -> None:
    """Let operations of ours take what others give as it is, in an ``openvino.Model`` that is changed in place."""
    paths = _Paths()
    for node in model.get_ordered_ops():
        if not node.get_type_name().startswith(_OURS):
            continue
        for place in node.inputs():
            source = place.get_source_output()
            if _is_half(source):
                place.replace_source_output(paths.half(source))


def _is_half(output: Any) -> bool:
    return bool(output.element_type.to_string() == "bf16")


class _Paths:
    """Outputs of a graph in bf16, and with the channels last, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, bool], Any] = {}

    def half(self, output: Any, *, last: bool = False) -> Any:
        """Give an output in bf16; with `last`, one of [batch, channels, height, width] with the channels last."""
        key = output.get_node().friendly_name, output.get_index(), last
        if key not in self._made:
            self._made[key] = self._half(output, last)
        return self._made[key]

    def _half(self, output: Any, last: bool) -> Any:
        from openvino import opset13  # noqa: PLC0415 - imported already, by whoever made the model

        node = output.get_node()
        kind = node.get_type_name()
        if rounds(node):
            return self.half(node.input_value(0), last=last)
        if kind == "Transpose" and node.input_value(1).get_node().get_type_name() == "Constant":
            order = tuple(int(axis) for axis in node.input_value(1).get_node().data)
            if last and order == CHANNELS_FIRST:
                return self.half(node.input_value(0))
            if not last and order == CHANNELS_LAST:
                return self.half(node.input_value(0), last=True)
        if kind == "Reshape" and not last:
            return opset13.reshape(
                self.half(node.input_value(0)), np.array(list(output.shape)), special_zero=False
            ).output(0)
        if kind == "Concat":
            axis = node.get_attributes()["axis"] % len(output.shape)
            parts = [self.half(place.get_source_output(), last=last) for place in node.inputs()]
            return opset13.concat(parts, CHANNELS_LAST.index(axis) if last else axis).output(0)
        if last:
            output = opset13.transpose(output, np.array(CHANNELS_LAST)).output(0)
        return output if _is_half(output) else opset13.convert(output, "bf16").output(0)
