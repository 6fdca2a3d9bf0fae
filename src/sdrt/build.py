"""`sdrt build`: a checkpoint to ONNX graphs, ONNX graphs to engines or to int8 ones, or both with one command."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from .engines import store
from .engines.build import build_engines, builder_for, default_choice, default_name
from .engines.bundle import MANIFEST
from .engines.devices import nvidia_gpus
from .engines.profiles import check_sizes
from .engines.publish import refuse_existing, scratch
from .engines.quantize import check_installed, check_source, quantize_bundle
from .engines.quantize import default_name as int8_name
from .engines.tensorrt import MODULES, Options
from .errors import BundleExistsError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from pathlib import Path

    from .engines.build import Report
    from .engines.bundle import Bundle
    from .engines.manifest import Precision, TracedPrecision
    from .engines.tensorrt import BackendName

_EXPORT = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "huggingface_hub", "onnxruntime")


@dataclass(frozen=True)
class Order:
    """The command line.

    Attributes
    ----------
    ckpt, source
        The checkpoint, or the ONNX bundle to build engines or int8 graphs of by its name or path: one of them.
    backend
        ``onnx`` for graphs alone; None to choose for this machine.
    output, name, force
        Of the bundle that is asked for.
    precision, ema, clip_skip
        As `.export.build.build`, or ``int8``; None for its default.
    calibration_prompts
        The file of prompts for int8; None for sdrt's own.
    targets, sizes, images, dynamic, options
        As `.engines.build.build_engines`; empty for its default.
    command
        The command line as text, for the manifest.

    """

    ckpt: str | None = None
    source: str | None = None
    backend: Literal["onnx"] | BackendName | None = None
    output: Path | None = None
    name: str | None = None
    force: bool = False
    precision: Precision | Literal["auto"] = "auto"
    ema: bool = False
    clip_skip: int | None = None
    calibration_prompts: Path | None = None
    targets: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    images: tuple[int, ...] = ()
    dynamic: bool = False
    options: Options = field(default_factory=Options)
    command: str = ""

    @property
    def graph_options(self) -> list[str]:
        """The options in use that are about a checkpoint alone."""
        given = {"--ema": self.ema, "--clip-skip": self.clip_skip is not None}
        return [option for option, used in given.items() if used]

    @property
    def engine_options(self) -> list[str]:
        """The options in use that are about engines alone."""
        given = {
            "--target": self.targets,
            "--size": self.sizes,
            "--images": self.images,
            "--dynamic": self.dynamic,
            "--optimization-level": self.options.optimization_level is not None,
            "--hardware-compatible": self.options.hardware_compatible,
            "--version-compatible": self.options.version_compatible,
            "--refit": self.options.refit,
        }
        return [option for option, used in given.items() if used]


@dataclass(frozen=True)
class Decision:
    """What an order comes to on this machine.

    Attributes
    ----------
    backend
        Of the engines; None to build none.
    targets
        Of the engines.
    for_cpu
        Whether nobody asked for engines, and they would not run here: then the bundle that was asked for is one for
        this machine's CPU, the same as if no TensorRT were installed, and the engines are built beside it.
    why
        One line for the user, where sdrt chose.

    """

    backend: BackendName | None
    targets: tuple[str, ...] = ()
    for_cpu: bool = False
    why: str | None = None


def decide(order: Order) -> Decision:
    """Choose what the command line leaves open.

    Raises
    ------
    InputError
        Options contradict each other, or a target is not known.
    MissingDependencyError
        It asks for int8, or for engines, and nothing is installed that makes them.

    """
    _check_options(order)
    if order.precision == "int8":
        check_installed()
        return Decision(None)
    if order.backend == "onnx":
        return Decision(None)
    if order.backend is not None:
        return Decision(order.backend, order.targets)
    engines_asked = order.source is not None or bool(order.engine_options)
    if order.precision == "fp32" and not engines_asked:
        return Decision(None)
    choice = default_choice(order.targets)
    if choice.backend is None:
        if engines_asked and choice.missing is not None:
            module, extra = MODULES[choice.missing]
            raise MissingDependencyError(module, "building engines", extra)
        return Decision(None, why=choice.why)
    for_cpu = not engines_asked and not nvidia_gpus()
    also = ", and graphs for this machine's CPU" if for_cpu else ""
    return Decision(choice.backend, choice.targets, for_cpu, f"{choice.why}{also} (--backend and --target choose)")


def _check_options(order: Order) -> None:
    """Refuse options that contradict each other."""
    if order.source is not None and order.graph_options:
        raise InputError(
            f"{order.graph_options[0]} is decided when graphs are made of a checkpoint: give it with --ckpt"
        )
    if order.precision == "int8":
        backend = [] if order.backend in {None, "onnx"} else [f"--backend {order.backend}"]
        if asked := [*backend, *order.engine_options]:
            raise InputError(f"--precision int8 makes graphs for CPUs, and {asked[0]} is for engines: leave one out")
        return
    if order.calibration_prompts is not None:
        raise InputError("--calibration-prompts is for int8: give --precision int8 with it")
    if order.backend == "onnx" and order.source is not None:
        raise InputError(
            "--from builds engines: give --backend tensorrt-rtx or tensorrt with it, not onnx, or --precision int8"
        )
    if order.backend == "onnx" and order.engine_options:
        raise InputError(
            f"{order.engine_options[0]} is for engines, and --backend onnx builds none: "
            "give --backend tensorrt-rtx or tensorrt"
        )


def build(order: Order, decision: Decision, report: Report) -> tuple[Bundle, ...]:
    """Build what was decided.

    Parameters
    ----------
    order, decision
        The command line, and what it comes to.
    report
        Called with what is being done, the bytes done and the bytes in all.

    Returns
    -------
    tuple of Bundle
        The one that the order names, then what else was built.

    Raises
    ------
    SdrtError
        Whatever `.export.build.build` and `.engines.build.build_engines` raise; what is wrong with the order itself
        before anything is built.

    """
    if order.precision == "int8":
        return (_int8(order, report),)
    if decision.backend is None:
        return (_graphs(order, order.output, order.name, _traced(order), report),)
    if order.source is not None:
        source = store.resolve(order.source)
        if source.manifest.kind == "onnx" and order.precision not in ("auto", source.manifest.precision):
            raise InputError(
                f"{source.folder} holds {source.manifest.precision} graphs, and --precision is {order.precision}: "
                "leave it out, or give another bundle"
            )
        return (_engines(order, decision, source, report, output=order.output, name=order.name),)
    return _both(order, decision, decision.backend, report)


def _int8(order: Order, report: Report) -> Bundle:
    """Quantise an fp32 bundle: the one that was named, or one that is built of the checkpoint and not kept."""
    from .calibration import calibrate, default_prompts, read_prompts  # noqa: PLC0415 - heavy, and for int8 alone

    prompts = None if order.calibration_prompts is None else read_prompts(order.calibration_prompts)
    if order.name is not None:
        store.check_name(order.name)

    def quantized(source: Bundle, target: Path) -> Bundle:
        samples = calibrate(source, prompts or default_prompts(source), report)
        return quantize_bundle(
            source,
            samples,
            output=target,
            name=order.name,
            force=order.force,
            command=order.command,
            report=report,
        )

    if order.source is not None:
        source = store.resolve(order.source)
        check_source(source)
        target = order.output or store.place(order.name or int8_name(source.name))
        refuse_existing(target, force=order.force)
        return quantized(source, target)
    _need_export()
    from .export.checkpoint import checkpoint_name  # noqa: PLC0415 - what it imports need not be installed

    assert order.ckpt is not None
    target = (order.output or store.place(order.name or int8_name(checkpoint_name(order.ckpt)))).resolve()
    refuse_existing(target, force=order.force)
    with scratch(target.with_name(f"{target.name}-graphs")) as folder:
        return quantized(_graphs(order, folder / target.name, None, "fp32", report), target)


def _both(order: Order, decision: Decision, backend: BackendName, report: Report) -> tuple[Bundle, ...]:
    """Build graphs of a checkpoint, and engines of them."""
    _need_export()
    from .export.checkpoint import checkpoint_name  # noqa: PLC0415 - what it imports need not be installed
    from .export.trace import signatures  # noqa: PLC0415

    assert order.ckpt is not None
    capabilities = builder_for(backend, decision.targets, order.options).capabilities
    # The limits of the sizes are the same whatever the widths of the model.
    sizes, images = order.sizes or ((512, 512),), order.images or (1,)
    check_sizes(signatures(768, 77, 49408, 4)["unet"].inputs, 8, sizes, images, dynamic=order.dynamic)
    title = order.name or checkpoint_name(order.ckpt)
    if decision.for_cpu:
        here = (order.output or store.place(title)).resolve()
        place = here.with_name(default_name(here.name, backend, capabilities))
        refuse_existing(place, force=order.force)
        graphs = _graphs(order, order.output, order.name, _traced(order), report)
        if graphs.manifest.precision == "fp16":
            return graphs, _engines(order, decision, graphs, report, output=place)
        with scratch(place.with_name(f"{place.name}-graphs")) as folder:
            halves = _graphs(order, folder / here.name, None, "fp16", report)
            return graphs, _engines(order, decision, halves, report, output=place)
    chosen = _traced(order)
    precision: TracedPrecision = "fp16" if chosen == "auto" else chosen
    kept = f"{title}-{precision}"
    name = order.name if order.name or order.output else default_name(kept, backend, capabilities)
    refuse_existing(order.output or store.place(name or kept), force=order.force)
    if not order.force and (store.place(kept) / MANIFEST).exists():
        raise BundleExistsError(
            f"{store.place(kept)} exists already: build engines of it with --from {kept} in place of --ckpt, "
            "or give --force to make it anew"
        )
    graphs = _graphs(order, None, kept, precision, report)
    return _engines(order, decision, graphs, report, output=order.output, name=name), graphs


def _graphs(
    order: Order, output: Path | None, name: str | None, precision: TracedPrecision | Literal["auto"], report: Report
) -> Bundle:
    _need_export()
    from .export.build import build as build_graphs  # noqa: PLC0415 - what it imports need not be installed

    assert order.ckpt is not None
    return build_graphs(
        order.ckpt,
        output=output,
        name=name,
        precision=precision,
        ema=order.ema,
        clip_skip=order.clip_skip or 0,
        force=order.force,
        command=order.command,
        report=report,
    )


def _engines(
    order: Order, decision: Decision, source: Bundle, report: Report, *, output: Path | None, name: str | None = None
) -> Bundle:
    assert decision.backend is not None
    return build_engines(
        source,
        backend=decision.backend,
        targets=decision.targets,
        sizes=order.sizes,
        images=order.images or (1,),
        dynamic=order.dynamic,
        output=output,
        name=name,
        force=order.force,
        options=order.options,
        allow_fp32=order.precision == "fp32",
        command=order.command,
        report=report,
    )


def _traced(order: Order) -> TracedPrecision | Literal["auto"]:
    """Give the precision of graphs that come from the tracer as they are."""
    assert order.precision != "int8"
    return order.precision


def _need_export() -> None:
    for package in _EXPORT:
        if find_spec(package) is None:
            raise MissingDependencyError(package, "building from a checkpoint", "export")
