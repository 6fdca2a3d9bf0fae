"""Post-training quantisation of a U-Net's graph: ranges by NNCF, and layers that harm the prediction left in fp32."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import ExportError
from .deviation import deviation
from .manifest import Parity
from .quantizers import LAYERS, groups, make_unsigned, weighted_layers, without
from .sensitivity import Search

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from .quantizers import Group

Sample = Mapping[str, "NDArray[np.float32]"]
"""What the U-Net reads in one step of denoising, by name: first the row without the prompt, then the one with it."""

LARGEST_ERROR: Final = 0.05
"""Of the prediction, relative L2 over the steps that are held out; bench/README.md tells how it was chosen."""

_PREDICTION = "prediction"
# The search looks at the prompt's row alone, and of large latents at so many rows and columns, which is a noisy picture
# as well: a layer's rounding is much the same share of what it computes at every size.
_CROP = 32
# Layers are left alone for a little more than the bound asks, since squares of errors do not add up exactly.
_MARGIN = 0.9
_MOST_LEFT_ALONE = 0.5


@dataclass(frozen=True)
class Samples:
    """Steps of denoising, all of one shape.

    Attributes
    ----------
    seen
        Layers get the ranges that occur in these.
    held_out
        The error is measured on these.

    """

    seen: Sequence[Sample]
    held_out: Sequence[Sample]


class QuantizedUnet:
    """A U-Net's graph with quantisers at all layers with weights, of which some can be left alone.

    Parameters
    ----------
    graph
        The fp32 ``.onnx`` file, with its weights in a file beside it.
    samples
        From the model's own denoising.
    tell
        Called with what is being done, and how many samples more are done.

    Raises
    ------
    ExportError
        NNCF does not quantise the graph.

    """

    def __init__(self, graph: Path, samples: Samples, tell: Callable[[str, int], None]) -> None:
        self._folder = graph.parent
        self._held_out = samples.held_out
        self._tell = tell
        self._full = _with_quantizers(graph, samples.seen, tell)
        self._groups = groups(self._full.graph)
        tell("U-Net: running the original", 0)
        session = _session(str(graph))
        outputs = [output.name for output in session.get_outputs()]
        self._original: list[Sample] = []
        for sample in samples.held_out:
            self._original.append(dict(zip(outputs, session.run(outputs, dict(sample)), strict=True)))
            tell("U-Net: running the original", 1)
        self._search: Search[Group] | None = None
        self._target = LARGEST_ERROR

    @property
    def left_alone(self) -> Sequence[Group]:
        """Layers that were found to do too much harm."""
        return () if self._search is None else self._search.left_alone

    def model(self) -> onnx.ModelProto:
        """Give the graph without the quantisers of the layers that are left alone; all weights are float32 still."""
        return without(self._full, self.left_alone)

    def parity(self, *graphs: Path) -> Parity:
        """Compare the prediction of a graph in a file with the original's, on the steps that are held out.

        A graph of the outermost blocks is given the original's deep features; of several graphs each is given what
        those before it make.
        """
        self._tell("U-Net: comparing with the original", 0)
        sessions = [_session(str(graph)) for graph in graphs]
        found = []
        for sample, original in zip(self._held_out, self._original, strict=True):
            known = {**original, **sample}
            for session in sessions:
                outputs = [each.name for each in session.get_outputs()]
                told = {each.name: known[each.name] for each in session.get_inputs()}
                known |= dict(zip(outputs, session.run(outputs, told), strict=True))
            found.append(known[_PREDICTION])
            self._tell("U-Net: comparing with the original", 1)
        expected = np.stack([original[_PREDICTION] for original in self._original])
        reference = f"its fp32 graph in onnxruntime {importlib.metadata.version('onnxruntime')}"
        return Parity(*deviation(np.stack(found), expected), "relative_l2", LARGEST_ERROR, reference)

    def leave_more_alone(self, error: float) -> None:
        """Find layers to leave alone besides, for the error of the others to come from what it is within its bound.

        Raises
        ------
        ExportError
            There are too many.

        """
        if self._search is None:
            crops = [_crop(sample) for sample in self._held_out]
            expected = self._cropped(crops, ())

            def measure(quantized: Sequence[Group]) -> float:
                self._tell("U-Net: looking for sensitive layers", 0)
                return deviation(self._cropped(crops, quantized), expected)[1]

            self._search = Search(self._groups, measure)
        else:
            self._target *= LARGEST_ERROR / error
        self._search.run(self._target * _MARGIN)
        if len(self._search.left_alone) > _MOST_LEFT_ALONE * len(self._groups):
            raise ExportError(
                f"the int8 U-Net strays from fp32 by {error:.2e} (relative L2), expected at most {LARGEST_ERROR:g}, "
                "and leaving half of its layers in fp32 is not enough: use the fp32 bundle"
            )

    def _cropped(self, crops: Sequence[Sample], quantized: Sequence[Group]) -> NDArray[np.float32]:
        """Predict with a few quantised layers."""
        model = without(self._full, [group for group in self._groups if group not in quantized])
        return np.stack(_run(_session(model.SerializeToString(), self._folder), crops))


def _with_quantizers(graph: Path, samples: Sequence[Sample], tell: Callable[[str, int], None]) -> onnx.ModelProto:
    """Let NNCF put quantisers at all layers with weights, which stay in their file.

    Each at its layer: NNCF would move them up through whatever only reorders, into attention too, which runtimes
    compute as a whole. Layers take the widest range of all samples: NNCF's mean of ranges cuts off what is large at
    some noise levels alone. Correcting biases gained nothing, and smoothing activations less than leaving layers alone.
    """
    import onnx  # noqa: PLC0415 - only a build makes graphs

    model = onnx.load(graph, load_external_data=False)
    products = weighted_layers(model.graph)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    # One by one: all that layers read is in memory at once.
    rows = [row for sample in samples for row in _rows(sample)]

    def count(sample: Sample) -> Sample:
        tell("U-Net: finding the ranges of its layers", 1)
        return sample

    tell("U-Net: finding the ranges of its layers", 0)
    with _nncf() as nncf:
        from nncf.onnx.quantization.backend_parameters import BackendParameters  # noqa: PLC0415
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters  # noqa: PLC0415
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet  # noqa: PLC0415

        alone = nncf.IgnoredScope(
            names=[node.name for node in model.graph.node if node.op_type in LAYERS and node.name not in products],
            types=sorted({node.op_type for node in model.graph.node} - LAYERS),
        )
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        made = nncf.quantize(
            copy,
            nncf.Dataset(rows, count),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(rows),
            ignored_scope=alone,
            advanced_parameters=AdvancedQuantizationParameters(
                disable_bias_correction=True,
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                backend_params={
                    BackendParameters.COMPRESS_WEIGHTS: False,
                    BackendParameters.EXTERNAL_DATA_DIR: str(graph.parent),
                },
            ),
        )
    # NNCF has loaded the weights in the end, gigabytes that a message keeps for as long as it lives.
    constants = [stored.get(tensor.name, tensor) for tensor in made.graph.initializer]
    quantized = onnx.ModelProto()
    quantized.graph.initializer.extend(constants)
    del made.graph.initializer[:]
    quantized.MergeFrom(made)
    make_unsigned(quantized.graph)
    return quantized


@contextlib.contextmanager
def _nncf() -> Iterator[Any]:
    """Give NNCF, which neither writes to standard output nor reports its use to its makers."""
    os.environ.setdefault("NNCF_CI", "1")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nncf  # noqa: PLC0415 - seconds that only this build pays

        nncf.set_log_level(logging.ERROR)
        try:
            yield nncf
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in {"nncf", "onnx", "onnxruntime"}:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"nncf does not quantise the U-Net: {reason}") from error


def _session(graph: str | bytes, folder: Path | None = None) -> Any:
    """Load a graph; `folder` is where the weights are of one that is in no file."""
    import onnxruntime  # noqa: PLC0415 - only a build measures

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _run(session: Any, samples: Iterable[Sample]) -> list[NDArray[np.float32]]:
    return [session.run([_PREDICTION], dict(sample))[0] for sample in samples]


def _rows(sample: Sample) -> list[Sample]:
    """Take the row without the prompt and the one with it apart."""
    return [
        {name: array if name == "timestep" else array[row : row + 1] for name, array in sample.items()}
        for row in range(len(sample["latents"]))
    ]


def _crop(sample: Sample) -> Sample:
    """Cut the middle out of a sample's latents, and keep the prompt's row alone."""
    latents = sample["latents"]
    top, left = ((side - min(side, _CROP)) // 2 for side in latents.shape[2:])
    *_, told = _rows(sample)
    return {**told, "latents": told["latents"][:, :, top : top + _CROP, left : left + _CROP]}
