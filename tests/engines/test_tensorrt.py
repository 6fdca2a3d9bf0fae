"""The builder itself, on real graphs: plans, errors, progress, cancelling. No engine runs here, which needs a GPU."""

from __future__ import annotations

import hashlib
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sdrt.engines import tensorrt
from sdrt.engines.bundle import Bundle
from sdrt.engines.monitor import Monitor
from sdrt.engines.profiles import profiles_of
from sdrt.engines.tensorrt import Builder, Options
from sdrt.errors import BackendError, InputError, MissingDependencyError

from . import small_graphs

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdrt.engines.tensorrt import Plan


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What takes the builder a moment; where the network matters, a test asks for a real one."""
    folder = tmp_path_factory.mktemp("graphs")
    small_graphs.fill(folder)
    return Bundle.open(folder)


def build(
    source: Bundle,
    folder: Path,
    *,
    graph: Path | None = None,
    capabilities: tuple[str, ...] = ("8.6",),
    options: Options | None = None,
    report: Callable[[str, float], object] = lambda _what, _fraction: None,
) -> Plan:
    part = source.component("text_encoder")
    profiles = profiles_of(part, [(64, 64)], [1], 8, dynamic=False)
    builder = Builder("tensorrt-rtx", capabilities, options)
    return builder.build(graph or source.path(part.graph), folder, "text_encoder", profiles, report)


def test_a_plan_is_written_and_hashed(tiny_fp16_bundle: Path, tmp_path: Path) -> None:
    source = Bundle.open(tiny_fp16_bundle)
    plan = build(source, tmp_path)
    content = (tmp_path / "text_encoder.plan").read_bytes()
    assert (plan.file.path, plan.file.bytes) == ("text_encoder.plan", len(content))
    assert plan.file.sha256 == hashlib.sha256(content).hexdigest()
    assert len(content) > source.component("text_encoder").files[1].bytes
    assert plan.fusion.count("layer_norm", 0) == (5, 5)


def test_the_same_graph_gives_the_same_plan(source: Bundle, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert build(source, tmp_path / "one").file == build(source, tmp_path / "two").file


def test_several_gpus_share_one_plan(source: Bundle, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = build(source, tmp_path / "one")
    two = build(source, tmp_path / "two", capabilities=("8.6", "8.9", "12.0"))
    assert one.file.sha256 != two.file.sha256
    assert two.file.bytes < 1.1 * one.file.bytes


def test_progress_grows_to_one_and_comes_from_the_callers_thread(source: Bundle, tmp_path: Path) -> None:
    seen: list[tuple[str, float, threading.Thread]] = []
    build(source, tmp_path, report=lambda what, done: seen.append((what, done, threading.current_thread())))
    fractions = [done for _, done, _ in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], seen[-1][:2]) == (0.0, ("done", 1.0))
    assert {thread for *_, thread in seen} == {threading.current_thread()}


def test_what_the_callback_raises_cancels_the_build(tiny_fp16_bundle: Path, tmp_path: Path) -> None:
    source = Bundle.open(tiny_fp16_bundle)

    class CancelledError(Exception):
        pass

    told = []

    def report(what: str, done: float) -> None:
        told.append(what)
        if done > 0:
            raise CancelledError

    with pytest.raises(CancelledError):
        build(source, tmp_path, report=report)
    assert told[-1] == "cancelling"
    assert not any(thread.name == "tensorrt-build" for thread in threading.enumerate())
    assert (tmp_path / "text_encoder.plan").stat().st_size == 0


def test_a_full_disk_is_an_error_that_comes_out(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(tensorrt, "plan_name", lambda _component: "plan")
    (tmp_path / "plan").symlink_to(full)
    # "xb" refuses what exists; here the device must.
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **rest: original(path, mode.replace("x", "w"), **rest))
    with pytest.raises(OSError, match="No space left"):
        build(source, tmp_path)


def test_what_is_no_graph_is_refused_in_one_line(source: Bundle, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph at all")
    with pytest.raises(BackendError, match=r"tensorrt-rtx does not take broken.onnx: .*[Ff]ailed to parse") as caught:
        build(source, tmp_path, graph=broken)
    assert "\n" not in str(caught.value)


def test_a_node_that_tensorrt_does_not_know_is_named(tiny_fp16_bundle: Path, tmp_path: Path) -> None:
    import onnx

    source = Bundle.open(tiny_fp16_bundle)
    graph = source.path(source.component("text_encoder").graph)
    model = onnx.load(graph, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Hardestmax"
    altered = tmp_path / "altered.onnx"
    onnx.save(model, altered)
    (tmp_path / f"{graph.name}.data").symlink_to(f"{graph}.data")
    says = r"tensorrt-rtx does not take altered.onnx at node node_softmax \(Hardestmax\): "
    with pytest.raises(BackendError, match=says):
        build(source, tmp_path, graph=altered)


def test_all_nodes_that_tensorrt_does_not_take_are_named(source: Bundle, tmp_path: Path) -> None:
    """An operator of ONNX that TensorRT lacks, of which it says "false" alone, and many that are no operators."""
    import onnx

    operators = ["Bernoulli", *("Magic" for _ in range(7))]
    nodes = [onnx.helper.make_node(op, [f"x{at}"], [f"x{at + 1}"], f"n{at}") for at, op in enumerate(operators)]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x0", "x8")]
    graph = onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "odd.onnx")
    with pytest.raises(BackendError) as caught:
        build(source, tmp_path, graph=tmp_path / "odd.onnx")
    others = ", ".join(f"node n{at} (Magic)" for at in range(1, 6))
    assert str(caught.value).startswith("tensorrt-rtx does not take odd.onnx at node n0 (Bernoulli): unsupported node:")
    assert str(caught.value).endswith(f"; nor at {others}, ...")


def test_shapes_that_cannot_be_built_are_refused_with_tensorrts_reason(source: Bundle, tmp_path: Path) -> None:
    part = source.component("vae_decoder")
    (profile,) = profiles_of(part, [(64, 64)], [1], 8, dynamic=False)
    wrong = {"latents": type(profile["latents"])((1, 7, 8, 8), (1, 7, 8, 8), (1, 7, 8, 8))}
    with pytest.raises(BackendError, match=r"tensorrt-rtx .*vae_decoder.onnx: .+") as caught:
        Builder("tensorrt-rtx", ["8.6"]).build(source.path(part.graph), tmp_path, "vae_decoder", [wrong])
    assert "gives no reason" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(optimization_level=6), "the optimization level is 6: expected 0 to 5"),
        (Options(hardware_compatible=True), "name several targets"),
        (Options(version_compatible=True), "build again after an update"),
        (Options(refit=True), "build without refit"),
    ],
)
def test_options_that_the_backend_does_not_have(monkeypatch: pytest.MonkeyPatch, options: Options, says: str) -> None:
    monkeypatch.setattr(tensorrt, "nvidia_gpus", tuple)
    with pytest.raises(InputError, match=says):
        Builder("tensorrt-rtx", ["8.6"], options)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match=r"tensorrt_rtx is not installed .* pip install 'sdrt\[rtx\]'"):
        tensorrt.load("tensorrt-rtx")


def test_tensorrt_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "nvidia_gpus", tuple)
    with pytest.raises(BackendError, match="build on that machine, or with tensorrt-rtx, which needs no GPU"):
        tensorrt.require_gpu("tensorrt")
    with pytest.raises(BackendError, match="the CUDA driver shows none here"):
        tensorrt.supported_capabilities("tensorrt")


def test_rtx_tells_what_it_builds_for() -> None:
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(tensorrt.supported_capabilities("tensorrt-rtx"))


def test_the_share_that_is_done_follows_nested_phases() -> None:
    monitor = Monitor(tensorrt.load("tensorrt-rtx"))
    monitor.start("Building engine", None, 6)
    monitor.start("Computing profile costs", "Building engine", 10)
    for step in range(5):
        monitor.step("Computing profile costs", step)
    monitor.start("Timing", "Computing profile costs", 4)
    monitor.step("Timing", 1)
    assert monitor.fraction == pytest.approx(0.05 + 0.9 * 5.5 / 10)
    monitor.finish("Timing")
    monitor.finish("Computing profile costs")
    assert monitor.fraction == pytest.approx(0.05 + 0.9 * 5.5 / 10)
