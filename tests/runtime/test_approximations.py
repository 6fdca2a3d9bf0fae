"""Options that save work: exact where they cover everything, cheaper where they do not, and told in the picture."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest

import sdrt
from sdrt.errors import InputError
from sdrt.runtime import parameters
from sdrt.runtime.host import HostEngines
from sdrt.runtime.loop import denoise
from sdrt.runtime.noise import batch_noise
from sdrt.runtime.predictor import component_names, evaluation_shapes
from sdrt.runtime.request import make_request
from sdrt.runtime.schedule import Schedule
from sdrt.runtime.work import Work

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from sdrt.runtime.session import Binding, Session

PROMPT, NEGATIVE = "Great Wall photo", "blurry"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "seed": 3, "output_type": "latent", "sampler": "ddim"}
MIDDLE = (0.5, 5.0)

Calls = Counter[tuple[str, int]]


class CountedBinding:
    """A binding whose runs are counted by component and rows of the batch."""

    def __init__(self, name: str, binding: Binding, calls: Calls) -> None:
        self._name, self._binding, self._calls = name, binding, calls
        self.inputs, self.outputs = binding.inputs, binding.outputs

    def run(self) -> None:
        rows = max(map(len, self.inputs.values()))  # what the whole batch has in common has one
        self._calls[self._name, rows] += 1
        self._binding.run()

    def trim(self) -> None:
        self._binding.trim()


class CountedSession:
    def __init__(self, name: str, session: Session, calls: Calls) -> None:
        self._name, self._session, self._calls = name, session, calls

    def bind(self, shapes: Mapping[str, tuple[int, ...]], *, in_pairs: bool = False) -> CountedBinding:
        return CountedBinding(self._name, self._session.bind(shapes, in_pairs=in_pairs), self._calls)

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(scope="module")
def everything() -> Calls:
    """All calls of the module's pipeline."""
    return Counter()


@pytest.fixture(scope="module", params=["onnxruntime", "openvino:fp32"])
def pipe(request: pytest.FixtureRequest, tiny_bundle: Path, everything: Calls) -> Iterator[sdrt.Pipeline]:
    pytest.importorskip(request.param.partition(":")[0])
    with sdrt.load(tiny_bundle, backend=request.param) as pipeline:
        engines = pipeline.engines
        assert isinstance(engines, HostEngines)
        engines.wrap_sessions(lambda name, session: CountedSession(name, session, everything))
        yield pipeline


@pytest.fixture
def calls(everything: Calls) -> Calls:
    """The calls of one test."""
    everything.clear()
    return everything


def unet(calls: Calls) -> Calls:
    return Counter({key: count for key, count in calls.items() if key[0].startswith("unet")})


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance_interval": (0, math.inf)},
        {"cache_interval": 1},
        {"encoder_interval": 1},
        {"guidance_interval": [0.0, 20]},
    ],
)
def test_options_that_cover_everything_change_no_bit(
    pipe: sdrt.Pipeline, calls: Calls, scale: float, options: dict[str, Any]
) -> None:
    arguments = SMALL | {"num_inference_steps": 6, "guidance_scale": scale, "negative_prompt": NEGATIVE}
    exact = pipe(PROMPT, **arguments)[0]
    assert np.array_equal(pipe(PROMPT, **arguments, **options)[0], exact)
    assert unet(calls) == {("unet", 2 if scale > 1 else 1): 12}


def test_steps_without_guidance_evaluate_half_as_many_rows(pipe: sdrt.Pipeline, calls: Calls) -> None:
    request = make_request(
        pipe.bundle.manifest, PROMPT, num_inference_steps=20, sampler="ddim", guidance_interval=MIDDLE
    )
    sigmas = Schedule.from_config(dict(pipe.bundle.manifest.scheduler)).sigmas_at(request.table.timesteps)
    within = int(((sigmas > MIDDLE[0]) & (sigmas <= MIDDLE[1])).sum())
    assert 0 < within < 20
    pipe(PROMPT, num_inference_steps=20, guidance_interval=MIDDLE, num_images_per_prompt=3, **SMALL)
    assert unet(calls) == {("unet", 6): within, ("unet", 3): 20 - within}


def test_guidance_within_an_interval_is_what_the_formula_says(pipe: sdrt.Pipeline) -> None:
    request = make_request(
        pipe.bundle.manifest, PROMPT, negative_prompt=NEGATIVE, num_inference_steps=7, sampler="dpmpp_2m",
        guidance_interval=MIDDLE, width=64, height=64, seed=3,
    )  # fmt: skip
    schedule = Schedule.from_config(dict(pipe.bundle.manifest.scheduler))
    session = pipe.engines._session("unet")  # type: ignore[attr-defined]
    shape = (1, 4, 8, 8)

    def evaluate(text: str, x: Any, t: float) -> Any:
        embeddings = pipe.embed([text])
        binding = session.bind(
            {"latents": shape, "timestep": (1,), "text_embeddings": embeddings.shape, "prediction": shape}
        )
        for name, value in (("latents", x), ("timestep", t), ("text_embeddings", embeddings)):
            binding.inputs[name][...] = value
        binding.run()
        return binding.outputs["prediction"]

    def predict(x: Any, t: float) -> Any:
        with_prompt = evaluate(PROMPT, x, t)
        if not MIDDLE[0] < schedule.sigmas_at(np.array([t]))[0] <= MIDDLE[1]:
            return with_prompt
        without = evaluate(NEGATIVE, x, t)
        return without + request.guidance_scale * (with_prompt - without)

    draw = batch_noise(request.seeds, request.latent_shape)
    *_, expected = denoise(request.table, draw(), predict, draw)
    *_, found = pipe.run(request)
    np.testing.assert_allclose(found.latents, expected.latents, atol=1e-4)


def test_steps_between_evaluate_the_outer_blocks_alone(pipe: sdrt.Pipeline, calls: Calls) -> None:
    arguments = SMALL | {"num_inference_steps": 8, "cache_interval": 3}
    pipe(PROMPT, **arguments)
    assert unet(calls) == {("unet", 2): 3, ("unet_shallow", 2): 5}
    calls.clear()
    pipe(PROMPT, guidance_scale=1, num_images_per_prompt=2, **arguments)
    assert unet(calls) == {("unet", 2): 3, ("unet_shallow", 2): 5}
    calls.clear()
    pipe(PROMPT, **arguments | {"sampler": "plms", "num_inference_steps": 5})  # PLMS: one evaluation more
    assert unet(calls) == {("unet", 2): 2, ("unet_shallow", 2): 4}


def test_encoder_and_decoder_together_are_the_whole_and_nothing_else_is_loaded(
    tiny_bundle: Path, pipe: sdrt.Pipeline, calls: Calls
) -> None:
    """Of the first evaluation the prediction is exact, to rounding; the others go on from its features."""
    arguments = SMALL | {"num_inference_steps": 4, "negative_prompt": NEGATIVE}
    exact = [step.latents.copy() for step in pipe.steps(PROMPT, **without_output(arguments))]
    found = [step.latents.copy() for step in pipe.steps(PROMPT, encoder_interval=4, **without_output(arguments))]
    np.testing.assert_allclose(found[0], exact[0], atol=1e-4)
    assert np.abs(found[-1] - exact[-1]).max() > 1e-3, "nothing was approximated"
    counted: Calls = Counter()
    with sdrt.load(tiny_bundle, backend=pipe.backend) as fresh:
        assert isinstance(fresh.engines, HostEngines)
        fresh.engines.wrap_sessions(lambda name, session: CountedSession(name, session, counted))
        (again,) = fresh(PROMPT, encoder_interval=4, **arguments)
        assert set(fresh.engines._sessions) == {"text_encoder", "unet_encoder", "unet_decoder"}
    np.testing.assert_array_equal(again, found[-1][0])
    assert unet(counted) == {("unet_encoder", 2): 1, ("unet_decoder", 2): 4}


def without_output(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != "output_type"}


def test_steps_between_evaluate_the_decoder_alone(pipe: sdrt.Pipeline, calls: Calls) -> None:
    arguments = SMALL | {"num_inference_steps": 8, "encoder_interval": 3}
    pipe(PROMPT, **arguments)
    assert unet(calls) == {("unet_encoder", 2): 3, ("unet_decoder", 2): 8}
    calls.clear()
    pipe(PROMPT, guidance_scale=1, num_images_per_prompt=2, **arguments)
    assert unet(calls) == {("unet_encoder", 2): 3, ("unet_decoder", 2): 8}
    calls.clear()
    pipe(PROMPT, **arguments | {"cache_interval": 2})  # E - D - D - E -
    assert unet(calls) == {("unet_encoder", 2): 2, ("unet_decoder", 2): 4, ("unet_shallow", 2): 4}
    calls.clear()
    pipe(PROMPT, **arguments | {"num_inference_steps": 1})  # nothing to go on from: the whole as it is
    assert unet(calls) == {("unet", 2): 1}


@pytest.mark.parametrize("options", [{"encoder_interval": 2}, {"encoder_interval": 2, "cache_interval": 2}])
def test_pictures_of_a_batch_are_those_of_single_calls(pipe: sdrt.Pipeline, options: dict[str, Any]) -> None:
    arguments = SMALL | {"num_inference_steps": 6, "guidance_interval": MIDDLE, "height": 72} | options
    batch = pipe(["a cat", "a dog"], negative_prompt=[NEGATIVE, ""], **arguments)
    alone = pipe("a dog", **arguments | {"seed": 4})
    np.testing.assert_allclose(batch[1], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "count"),
    [({"cache_interval": 3}, 4), ({"encoder_interval": 2}, 4), ({"cache_interval": 2, "encoder_interval": 2}, 6)],
)
def test_features_go_to_the_rows_that_they_are_of(pipe: sdrt.Pipeline, options: dict[str, Any], count: int) -> None:
    """The pipeline with a guidance interval beside other options against the graphs, called by hand, row by row."""
    request = make_request(
        pipe.bundle.manifest, ["a cat", "a dog"], negative_prompt=[NEGATIVE, ""], num_inference_steps=15,
        sampler="ddim", guidance_interval=MIDDLE, width=64, height=64, seed=3, **options,
    )  # fmt: skip
    assert len(set(request.work)) == count, "every kind of evaluation shall be there"
    engines: Any = pipe.engines
    texts = pipe.embed([NEGATIVE, "", "a cat", "a dog"])
    single = make_request(
        pipe.bundle.manifest, "", guidance_scale=1, width=64, height=64, num_inference_steps=4, **options
    )
    kept: dict[int, dict[str, Any]] = {row: {} for row in range(4)}

    def evaluate(row: int, x: Any, t: float, work: Work) -> Any:
        known = {"latents": x, "timestep": t, "text_embeddings": texts[row]} | kept[row]
        for name in component_names(request, work):
            shapes = evaluation_shapes(single, Work(False, True), pipe.bundle.component(name))
            binding = engines._session(name).bind(shapes)
            for each, buffer in binding.inputs.items():
                buffer[...] = known[each]
            binding.run()
            given = {each: array.copy() for each, array in binding.outputs.items()}
            known |= given
            kept[row] |= {each: array for each, array in given.items() if each != "prediction"}
        return known["prediction"][0]

    evaluations = iter(request.work)

    def predict(x: Any, t: float) -> Any:
        work = next(evaluations)
        predictions = []
        for image in range(2):
            found = evaluate(2 + image, x[image], t, work)
            if work.guided:
                without = evaluate(image, x[image], t, work)
                found = without + request.guidance_scale * (found - without)
            predictions.append(found)
        return np.stack(predictions)

    draw = batch_noise(request.seeds, request.latent_shape)
    *_, expected = denoise(request.table, draw(), predict, draw)
    *_, found = pipe.run(request)
    np.testing.assert_allclose(found.latents, expected.latents, atol=2e-4)
    (exact, _) = pipe(["a cat", "a dog"], negative_prompt=[NEGATIVE, ""], num_inference_steps=15, **SMALL)
    assert np.abs(found.latents[0] - exact).max() > 1e-3, "nothing was approximated"


def test_options_combine_to_the_work_that_was_planned(pipe: sdrt.Pipeline, calls: Calls) -> None:
    arguments = SMALL | {"num_inference_steps": 15, "guidance_interval": MIDDLE, "cache_interval": 4}
    planned = make_request(
        pipe.bundle.manifest, PROMPT, **{key: value for key, value in arguments.items() if key != "output_type"}
    ).work
    pipe(PROMPT, **arguments)
    expected = Counter(("unet" if work.whole else "unet_shallow", 1 + work.guided) for work in planned)
    assert unet(calls) == expected
    assert sum(rows * count for (_, rows), count in expected.items()) < 30


def test_threads_get_with_options_what_they_would_get_alone(pipe: sdrt.Pipeline) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"guidance_interval": MIDDLE},
        {"cache_interval": 2},
        {"guidance_interval": MIDDLE, "cache_interval": 3},
        {"encoder_interval": 2},
        {"guidance_interval": MIDDLE, "encoder_interval": 3, "cache_interval": 2},
    ]
    arguments = SMALL | {"num_inference_steps": 6}
    alone = [pipe(f"picture {n}", **arguments, **options)[0] for n, options in enumerate(settings)]
    together: dict[int, Any] = {}

    def work(number: int) -> None:
        together[number] = pipe(f"picture {number}", **arguments, **settings[number])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert np.array_equal(together[number], expected)


def test_a_picture_tells_its_options_and_an_exact_one_tells_none(pipe: sdrt.Pipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 1}
    (image,) = pipe(PROMPT, guidance_interval=(0.28, math.inf), cache_interval=2, encoder_interval=3, **arguments)
    told = parameters.parse(image.info["parameters"])
    assert (told["Guidance interval"], told["Cache interval"], told["Encoder interval"]) == ("0.28,inf", "2", "3")
    exact: list[dict[str, Any]] = [{}, {"guidance_scale": 1.0, "guidance_interval": MIDDLE}]
    for options in exact:
        (image,) = pipe(PROMPT, **arguments, **options)
        assert (
            not {"Guidance interval", "Cache interval", "Encoder interval"}
            & parameters.parse(image.info["parameters"]).keys()
        )


@pytest.mark.parametrize(
    "interval",
    [0.5, (1,), (1, 2, 3), (5, 0.3), (2, 2), (-1, 3), (math.nan, 3), (0, math.nan), ("0", "1"), "ab", (True, 5)],
)
def test_an_interval_that_is_none_is_refused(pipe: sdrt.Pipeline, interval: Any) -> None:
    with pytest.raises(InputError, match=r"guidance interval is .*: expected two noise levels") as error:
        pipe(PROMPT, guidance_interval=interval)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", True, None])
@pytest.mark.parametrize("option", ["cache_interval", "encoder_interval"])
def test_a_count_of_steps_that_is_none_is_refused(pipe: sdrt.Pipeline, option: Any, every: Any) -> None:
    with pytest.raises(InputError, match=rf"{option} is .*: expected a whole number of at least 1"):
        pipe(PROMPT, **{option: every})


def test_a_bundle_without_the_graphs_runs_and_says_what_to_build_for_caching(tiny_bundle: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle, old)
    manifest = json.loads((old / "bundle.json").read_text())
    (unet_part,) = (part for part in manifest["components"] if part["name"] == "unet")
    unet_part["outputs"] = [tensor for tensor in unet_part["outputs"] if tensor["name"] == "prediction"]
    manifest["components"] = [part for part in manifest["components"] if not part["name"].startswith("unet_")]
    (old / "bundle.json").write_text(json.dumps(manifest))
    arguments = SMALL | {"num_inference_steps": 4}
    with sdrt.load(old) as without, sdrt.load(tiny_bundle) as whole:
        both: list[dict[str, Any]] = [{}, {"guidance_interval": MIDDLE}]
        for options in both:
            assert np.array_equal(without(PROMPT, **arguments, **options)[0], whole(PROMPT, **arguments, **options)[0])
        with pytest.raises(
            InputError, match="no graph for feature caching: build it again with sdrt build --ckpt tiny --force"
        ):
            without(PROMPT, cache_interval=2, **arguments)
        with pytest.raises(
            InputError,
            match="encoder interval is 2, and this bundle has no graph for encoder reuse: build it again with sdrt",
        ):
            without(PROMPT, encoder_interval=2, **arguments)


def test_a_prompt_is_encoded_once_and_by_itself(tiny_bundle: Path) -> None:
    counted: Calls = Counter()
    with sdrt.load(tiny_bundle) as pipeline:
        engines = pipeline.engines
        assert isinstance(engines, HostEngines)
        engines.wrap_sessions(lambda name, session: CountedSession(name, session, counted))
        fresh = pipeline.embed(["a cat", "a dog"])
        assert counted == {("text_encoder", 1): 2}
        again = pipeline.embed(["a dog", "a cat", "a dog"])
        assert counted == {("text_encoder", 1): 2}
        assert np.array_equal(again, fresh[[1, 0, 1]])
        skipped = pipeline.embed(["a cat"], clip_skip=1)
        assert counted == {("text_encoder", 1): 3}
        assert not np.array_equal(skipped[0], fresh[0])
        fresh[...] = 0  # the caller's own
        assert np.array_equal(pipeline.embed(["a cat"])[0], again[1])
        pictures = [pipeline("a cat", negative_prompt="a dog", num_inference_steps=2, **SMALL)[0] for _ in range(2)]
        assert counted["text_encoder", 1] == 3
    with sdrt.load(tiny_bundle) as pipeline:
        assert np.array_equal(
            pipeline("a cat", negative_prompt="a dog", num_inference_steps=2, **SMALL)[0], pictures[0]
        )
        assert np.array_equal(pictures[0], pictures[1])


def test_embeddings_that_are_kept_are_bounded(pipe: sdrt.Pipeline) -> None:
    engines: Any = pipe.engines
    most = engines._embedding.cache_info().maxsize
    assert most <= 128
    first = pipe.embed(["word 0"])
    pipe.embed([f"word {number}" for number in range(most + 5)])
    assert engines._embedding.cache_info().currsize == most
    assert np.array_equal(pipe.embed(["word 0"]), first)
