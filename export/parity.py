"""How true a traced graph is: onnxruntime on the graph against diffusers and transformers on the checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch

from ..engines.deviation import deviation
from ..engines.manifest import Parity, TracedPrecision
from ..errors import ExportError
from .modules import load_model
from .trace import examples

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from .checkpoint import Checkpoint
    from .trace import Signature

THRESHOLDS: Mapping[TracedPrecision, float] = {"fp32": 1e-4, "fp16": 2e-2}
"""The largest relative L2 error that a graph may have in each precision.

float32 differs by the order of summation alone, 1e-6 or so; in float16 each layer rounds to 11 bits, which adds up to a
few thousandths over the depth of the network. What passes these bounds was not traced rightly or overflowed.
"""

# One size with odd sides, which come down unevenly in the U-Net, and one that is not square.
_SIZES = ({"batch": 2, "height": 16, "width": 24}, {"batch": 1, "height": 13, "width": 9})
_SEED = 20221
_ROOM = 8192.0
"""A quarter of what float16 holds, halved: random latents do not find the largest activation there is."""


@dataclass(frozen=True)
class Case:
    """Inputs of a component, and what the original network makes of them.

    Attributes
    ----------
    inputs, outputs
        Tensors in the order of the component's signature.

    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def text_cases(checkpoint: Checkpoint, signature: Signature) -> list[Case]:
    """Run transformers' text encoder, with and without its last layer."""
    model: Any = load_model("text_encoder", checkpoint.text_encoder).float()
    cases = []
    for clip_skip in (0, 1):
        ids, _ = _draw(signature, _SIZES[0])
        states = model(ids, output_hidden_states=True).hidden_states
        expected = model.final_layer_norm(states[-1 - clip_skip])
        cases.append(Case((ids, torch.tensor([clip_skip])), (expected,)))
    return cases


def unet_cases(checkpoint: Checkpoint, signature: Signature, text: Signature) -> list[Case]:
    """Run diffusers' U-Net, on what the model's own text encoder says, and see what its last layer is given from below.

    Of other embeddings a trained U-Net has never heard: it may answer with a thousand times their rounding errors.
    """
    text_encoder: Any = load_model("text_encoder", checkpoint.text_encoder).float()
    told = [text_encoder(_draw(text, sizes)[0]).last_hidden_state for sizes in _SIZES]
    del text_encoder
    model: Any = load_model("unet", checkpoint.unet).float()
    last = model.up_blocks[-1].resnets[-1]
    seen: list[Tensor] = []

    def watch(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        below = layer.in_channels - model.config.block_out_channels[0]  # the rest is the first convolution's output
        seen.append(inputs[0][:, :below].clone())

    last.register_forward_pre_hook(watch)
    cases = []
    for sizes, embeddings in zip(_SIZES, told, strict=True):
        latents, timestep, _ = _draw(signature, sizes)
        prediction = model(latents, timestep, embeddings).sample
        cases.append(Case((latents, timestep, embeddings), (prediction, seen.pop())))
    return cases


def shallow_cases(unet: list[Case]) -> list[Case]:
    """Give what the U-Net's outermost blocks shall make of the deep features, from the cases of the whole."""
    return [Case((*case.inputs, case.outputs[1]), case.outputs[:1]) for case in unet]


def autoencoder_cases(
    checkpoint: Checkpoint, decoder: Signature, encoder: Signature
) -> tuple[list[Case], list[Case], float]:
    """Run diffusers' autoencoder both ways.

    Returns
    -------
    tuple
        The decoder's cases, the encoder's, and the power of two that keeps every activation within float16, for
        `.modules.scale_stream`.

    """
    model: Any = load_model("vae", checkpoint.vae).float()
    factor = float(model.config["scaling_factor"])
    peak = 0.0

    def watch(_module: object, _inputs: object, output: Any) -> None:
        nonlocal peak
        if isinstance(output, torch.Tensor):
            peak = max(peak, float(output.abs().max()))

    for module in model.modules():
        module.register_forward_hook(watch)
    decoded, encoded = [], []
    for sizes in _SIZES:
        (latents,) = _draw(decoder, sizes)
        decoded.append(Case((latents,), (model.decode(latents / factor).sample,)))
        (image,) = _draw(encoder, sizes)
        moments = model.encode(image).latent_dist
        encoded.append(Case((image,), (moments.mean * factor, moments.std * factor)))
    scale = 1.0 if peak <= _ROOM else 2.0 ** -math.ceil(math.log2(peak / _ROOM))
    return decoded, encoded, scale


def _draw(signature: Signature, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    return examples(signature, sizes, _SEED)


def measure(
    component: str, graphs: Sequence[Path], signature: Signature, cases: list[Case], precision: TracedPrecision
) -> Parity:
    """Run a component's graphs in onnxruntime on the CPU and compare.

    onnxruntime has no float16 kernels for the CPU: it computes such nodes in float32 and rounds at the casts between
    them, fewer than a GPU would. What is measured in fp16 is the rounding of the weights and of what crosses a cast;
    whether activations fit into float16 is seen to by `autoencoder_cases`.

    Parameters
    ----------
    component
        The component's name, for messages.
    graphs
        The ``.onnx`` files, one after the other in memory.
    signature
        Its inputs and outputs.
    cases
        What to run, and what to expect.
    precision
        Of the graph; it decides the threshold.

    Returns
    -------
    Parity
        The worst of all graphs and cases by each figure.

    Raises
    ------
    ExportError
        The relative L2 error is beyond the threshold, or the output is not finite.

    """
    return measure_chains(component, [[graph] for graph in graphs], signature, cases, precision)


def measure_chains(
    component: str,
    chains: Sequence[Sequence[Path]],
    signature: Signature,
    cases: list[Case],
    precision: TracedPrecision,
) -> Parity:
    """Run graphs that make together what a component makes, each going on from those before it, and compare.

    Parameters and what is returned and raised are those of `measure`, but for several chains of graphs.
    """
    return judge(component, _results(chains, signature, cases), precision)


def _results(
    chains: Sequence[Sequence[Path]], signature: Signature, cases: list[Case]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The arena would keep the memory of the largest case on top of the weights.
    options.enable_cpu_mem_arena = False
    for chain in chains:
        sessions = [onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]) for graph in chain]
        for case in cases:
            known = {spec.name: value.numpy() for spec, value in zip(signature.inputs, case.inputs, strict=True)}
            for session in sessions:
                names = [output.name for output in session.get_outputs()]
                told = {each.name: known[each.name] for each in session.get_inputs()}
                known |= dict(zip(names, session.run(names, told), strict=True))
            for spec, expected in zip(signature.outputs, case.outputs, strict=True):
                yield known[spec.name], expected.numpy()
        del sessions


def judge(component: str, results: Iterable[tuple[np.ndarray, np.ndarray]], precision: TracedPrecision) -> Parity:
    """Compare what a component makes with what it should be, each pair of it in turn; the rest as `measure`."""
    worst = Parity(0.0, 0.0, math.inf, "relative_l2", THRESHOLDS[precision], f"torch {torch.__version__} fp32")
    for found, expected in results:
        worst = _worse(worst, *deviation(found, expected))
    if not worst.relative_l2 <= worst.threshold:
        raise ExportError(
            f"the {component} graph strays from torch by {worst.relative_l2:.2e} (relative L2), expected at most "
            f"{worst.threshold:.0e} in {precision}: "
            + ("build with --precision fp32" if precision == "fp16" else "check the versions of torch and onnxruntime")
        )
    return worst


def _worse(parity: Parity, max_abs: float, relative_l2: float, psnr: float) -> Parity:
    # numpy's maximum keeps a NaN, Python's would lose it
    return Parity(
        float(np.maximum(parity.max_abs, max_abs)),
        float(np.maximum(parity.relative_l2, relative_l2)),
        float(np.minimum(parity.psnr, psnr)),
        parity.metric,
        parity.threshold,
        parity.reference,
    )
