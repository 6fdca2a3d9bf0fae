from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrt.engines.bundle import MANIFEST, TOKENIZER, Bundle, hash_file, onnx_name, write_manifest
from sdrt.engines.manifest import Manifest
from sdrt.engines.manifest_parser import parse_manifest
from sdrt.errors import BundleCorruptError, BundleNotFoundError

from .example import fill

ZEROS = "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "example"
    folder.mkdir()
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plain = json.loads(fill(tmp_path_factory.mktemp("document")).to_json())
    assert isinstance(plain, dict)
    return plain


def changed(document: Any, where: str, value: Any) -> str:
    """Give the manifest's text with one field changed; ``...`` removes it."""
    document = copy.deepcopy(document)
    *path, last = (int(key) if key.isdigit() else key for key in where.split("/"))
    node = document
    for key in path:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return json.dumps(document)


def test_the_manifest_survives_the_way_through_the_file(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert parse_manifest(bundle.manifest.to_json()) == bundle.manifest
    assert bundle.manifest.to_json() == (folder / MANIFEST).read_text()
    assert bundle.manifest.scheduler["steps"] == (1, 2)
    assert bundle.manifest.components[0].parity is not None
    assert bundle.manifest.components[0].parity.psnr == float("inf")


def test_the_manifest_cannot_be_changed(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.name = "other"  # type: ignore[misc]  # what the test is about
    with pytest.raises(TypeError):
        manifest.scheduler["beta_start"] = 1.0  # type: ignore[index]  # what the test is about


def test_keys_stand_in_the_documented_order(document: dict[str, Any]) -> None:
    expected = [field.name for field in dataclasses.fields(Manifest)]
    assert list(document) == ["schema_version", *expected[:-1]]


def test_the_readme_documents_every_field(document: dict[str, Any]) -> None:
    text = (Path(__file__).parents[2] / "engines" / "README.md").read_text(encoding="utf-8")
    optional = {"trained_betas", "steps", *document["tools"]}
    keys = {key for path in paths_of(document) for key in path if isinstance(key, str)}
    assert "sha256" in keys
    assert {key for key in keys - optional if f"`{key}`" not in text} == set()


def test_outer_blocks_take_what_the_whole_network_offers(document: dict[str, Any]) -> None:
    (index,) = (number for number, part in enumerate(document["components"]) if part["name"] == "unet_shallow")
    says = 'components has unet_shallow, which takes "features", and unet neither takes nor gives it'
    with pytest.raises(BundleCorruptError, match=says):
        parse_manifest(changed(document, f"components/{index}/inputs/1/name", "features"))


def test_the_halves_of_the_network_go_together(document: dict[str, Any]) -> None:
    names = [part["name"] for part in document["components"]]
    encoder, decoder = (names.index(name) for name in ("unet_encoder", "unet_decoder"))
    for changes, says in (
        ((f"{decoder}/inputs/1/name", "skip_9"), 'unet_decoder, which takes "skip_9", and no part of the U-Net before'),
        ((f"{encoder}/inputs/1/name", "image"), 'unet_encoder, which takes "image", and no part of the U-Net before'),
    ):
        with pytest.raises(BundleCorruptError, match=says):
            parse_manifest(changed(document, f"components/{changes[0]}", changes[1]))
    text = changed(document, f"components/{encoder}/outputs/0/name", "skip_0")
    text = changed(json.loads(text), f"components/{decoder}/outputs/0/name", "other")
    with pytest.raises(BundleCorruptError, match="halves of the U-Net, and none gives 'prediction'"):
        parse_manifest(text)
    halved = [part for part in document["components"] if part["name"] != "unet_encoder"]
    with pytest.raises(BundleCorruptError, match="components has unet_decoder without the U-Net's other half"):
        parse_manifest(json.dumps(document | {"components": halved}))


@pytest.mark.parametrize("field", [*(field.name for field in dataclasses.fields(Manifest)), "components/1/files"])
def test_a_missing_field_is_named(document: dict[str, Any], field: str) -> None:
    named = field.replace("/1/", "[1].")
    with pytest.raises(BundleCorruptError, match=f"bundle.json: {named} is missing".replace("[", r"\[")):
        parse_manifest(changed(document, field, ...))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("schema_version", 2, "schema_version is 2, expected 1: update sdrt"),
        ("schema_version", True, "schema_version is true, expected an integer"),
        ("schema_version", "1", 'schema_version is "1", expected an integer'),
        ("name", 5, "name is 5, expected printable text"),
        ("name", "a\x1b[2Jb", "name is .*expected printable text"),
        ("name", "\ud800", "name is .*expected printable text"),
        ("kind", "plan", 'kind is "plan", expected one of onnx, engine'),
        ("kind", [], "kind is a list, expected one of"),
        ("precision", "int4", "precision is"),
        ("created", "2026-13-01T00:00:00Z", "created is"),
        ("created", "2026-01-01T00:00:00+02:00", "created is"),
        ("model/ema", 0, "model.ema is 0, expected true or false"),
        ("backend/opset", 0, "backend.opset is 0, expected an integer of at least 1"),
        ("backend/compute_capabilities", 8.6, "backend.compute_capabilities is 8.6, expected a list"),
        (
            "backend/compute_capabilities",
            [8.6],
            r"backend.compute_capabilities\[0\] is 8.6, expected a compute capability",
        ),
        ("components/1/profiles", [[]], r"components\[1\].profiles\[0\] is a list, expected an object"),
        (
            "components/1/profiles",
            [{"latents": {"min": [2, 4], "opt": [1, 4], "max": [2, 4]}}],
            r"components\[1\].profiles\[0\].latents is an object, expected three shapes of equal length",
        ),
        ("latent/scaling_factor", 0, "latent.scaling_factor is 0"),
        ("latent/scaling_factor", 1e999, "Infinity is not a JSON number"),
        ("latent/scaling_factor", float("nan"), "NaN is not a JSON number"),
        ("latent/channels", 10**400, "latent.channels is 1000"),
        ("text/clip_skip", 12, "text.clip_skip is 12, expected an integer of at least 0 and at most 11"),
        ("text/max_tokens", 77.0, "text.max_tokens is 77.0, expected an integer"),
        ("scheduler/prediction_type", "noise", "scheduler.prediction_type is"),
        ("scheduler/beta_start", None, "scheduler.beta_start is null"),
        ("scheduler/extra", {}, "scheduler.extra is an object"),
        ("scheduler/two\nlines", 1, r"a key of scheduler is"),
        ("components", {}, "components is an object, expected a list"),
        ("components/1", ..., "components has no unet"),
        ("components/1/name", "vae_decoder", 'components has the name "vae_decoder" twice'),
        ("components/1/name", "lora", "components\\[1\\].name is"),
        ("components/1/files", [], "components\\[1\\].files is a list, expected a list of at least 1"),
        ("components/1/files/1/path", "unet.onnx", 'have the path "unet.onnx" twice'),
        ("components/1/files/1/path", "UNET.onnx", 'have the path "unet.onnx" twice'),
        ("components/1/files/1/path", "bundle.json", 'have the path "bundle.json" twice'),
        ("components/1/files/1/bytes", -1, "components\\[1\\].files\\[1\\].bytes is -1"),
        ("components/1/files/1/bytes", False, "components\\[1\\].files\\[1\\].bytes is false"),
        ("components/1/files/1/sha256", ZEROS[1:], "components\\[1\\].files\\[1\\].sha256 is"),
        ("components/1/inputs/1/name", "latents", 'components\\[1\\].inputs has the name "latents" twice'),
        ("components/1/inputs/0/dtype", "complex64", "components\\[1\\].inputs\\[0\\].dtype is"),
        ("components/1/inputs/0/shape/1", 0, "components\\[1\\].inputs\\[0\\].shape\\[1\\] is 0"),
        ("components/1/inputs/0/shape/0/max", 0, "shape\\[0\\].max is 0, expected an integer of at least 1"),
        ("components/1/parity/psnr", "high", "components\\[1\\].parity.psnr is"),
        ("components/1/parity/max_abs", None, "components\\[1\\].parity.max_abs is null, expected a number"),
        ("tokenizer", None, "tokenizer is null, expected an object"),
        ("tools/torch", 2.13, "tools.torch is 2.13"),
    ],
)
def test_a_wrong_value_is_named(document: dict[str, Any], field: str, value: object, says: str) -> None:
    with pytest.raises(BundleCorruptError, match=says):
        parse_manifest(changed(document, field, value))


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "..",
        ".",
        "",
        "a//b",
        "a/",
        "\\\\host\\x",
        "..\\x",
        "C:\\x",
        "C:x",
        "a\0b",
        ".x",
        "~/x",
    ],
)
@pytest.mark.parametrize("field", ["tokenizer/path", "components/0/files/0/path"])
def test_a_path_that_leaves_the_folder_is_refused(document: dict[str, Any], field: str, path: str) -> None:
    with pytest.raises(BundleCorruptError, match="expected a path inside the bundle"):
        parse_manifest(changed(document, field, path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "not valid JSON"),
        (b"[]", "the whole is a list, expected an object"),
        (b'{"schema_version": 1, "schema_version": 1}', '"schema_version" stands twice'),
        (b"{}", "schema_version is missing"),
    ],
)
def test_what_is_no_manifest_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(BundleCorruptError, match=says):
        parse_manifest(text)


def test_unknown_fields_are_ignored(document: dict[str, Any]) -> None:
    assert parse_manifest(changed(document, "later", [1])) == parse_manifest(json.dumps(document))


def test_a_command_line_of_any_bytes_can_be_written(folder: Path) -> None:
    manifest = dataclasses.replace(Bundle.open(folder).manifest, command="sdrt build --ckpt \udcff\n\x1b é")
    write_manifest(folder, manifest)
    assert Bundle.open(folder).manifest.command == "sdrt build --ckpt \\udcff\\n\\x1b é"


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf")])
def test_figures_that_are_no_numbers_are_not_written(folder: Path, figure: float) -> None:
    manifest = Bundle.open(folder).manifest
    parity = manifest.components[0].parity
    assert parity is not None
    component = dataclasses.replace(manifest.components[0], parity=dataclasses.replace(parity, max_abs=figure))
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(BundleCorruptError):
        write_manifest(folder, dataclasses.replace(manifest, components=(component, *manifest.components[1:])))
    assert (folder / MANIFEST).read_bytes() == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths_of(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            found += paths_of(value, (*path, key))
    return found


def whole_or_refused(text: str | bytes) -> None:
    try:
        manifest = parse_manifest(text)
    except BundleCorruptError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - either outcome is right
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert parse_manifest(manifest.to_json()) == manifest
        assert manifest.to_json() == parse_manifest(manifest.to_json()).to_json()


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_random_changes_give_a_manifest_or_one_clear_error(document: dict[str, Any], data: st.DataObject) -> None:
    document = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(paths_of(document)))
        node: Any = document
        for key in path:
            node = node[key]
        deed = data.draw(st.sampled_from(["replace", "remove", "copy", "rename"]))
        if deed == "remove":
            del node[last]
        elif deed == "replace":
            node[last] = data.draw(json_values)
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[last]))
        else:
            node[data.draw(st.text(max_size=8))] = node[last] if deed == "copy" else node.pop(last)
    whole_or_refused(json.dumps(document))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_damage_to_the_bytes_gives_a_manifest_or_one_clear_error(
    document: dict[str, Any], data: st.DataObject
) -> None:
    text = bytearray(json.dumps(document).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    whole_or_refused(bytes(text))


def test_a_bundle_gives_its_components_and_files(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.name == "example"
    assert bundle.size == sum(file.stat().st_size for file in folder.iterdir() if file.name != MANIFEST)
    unet = bundle.component("unet")
    assert bundle.path(unet.graph) == folder / onnx_name("unet")
    assert bundle.has("vae_encoder")
    with pytest.raises(BundleCorruptError, match="has no lora, only text_encoder, unet"):
        bundle.component("lora")


def test_a_relative_path_and_a_link_to_the_folder_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert Bundle.open(".").folder == folder
    (folder.parent / "link").symlink_to(folder)
    assert Bundle.open(folder.parent / "link").folder == folder


def test_a_whole_bundle_verifies_and_tells_how_far_it_is(folder: Path) -> None:
    seen: list[int] = []
    bundle = Bundle.open(folder)
    bundle.verify(seen.append)
    assert sum(seen) == bundle.size


def test_sizes_are_checked_on_opening_and_all_are_named(folder: Path) -> None:
    (folder / "unet.onnx").write_bytes(b"short")
    (folder / "vae_decoder.onnx.data").unlink()
    with pytest.raises(BundleCorruptError) as caught:
        Bundle.open(folder)
    assert "unet.onnx has 5 bytes, expected 16" in str(caught.value)
    assert "vae_decoder.onnx.data is missing" in str(caught.value)
    assert "expected 28 bytes" in str(caught.value)


def test_verify_names_all_problems_at_once(folder: Path) -> None:
    flip(folder / "unet.onnx.data")
    (folder / "unet.onnx").write_bytes(b"short")
    (folder / TOKENIZER).unlink()
    (folder / "sub").mkdir()
    (folder / "sub" / "stray.bin").write_bytes(b"x")
    (folder / "gone").symlink_to("nowhere")
    (folder / "elsewhere").symlink_to(folder.parent)
    problems = list(Bundle.read(folder).problems())
    assert [problem.split()[0] for problem in problems] == [
        "unet.onnx",
        "unet.onnx.data",
        TOKENIZER,
        "elsewhere",
        "gone",
        "sub/stray.bin",
    ]
    with pytest.raises(BundleCorruptError) as caught:
        Bundle.read(folder).verify()
    assert all(problem in str(caught.value) for problem in problems)
    assert hash_file(folder, "unet.onnx.data").sha256 in str(caught.value)


def test_one_component_can_be_verified_alone(folder: Path) -> None:
    flip(folder / "unet.onnx.data")
    bundle = Bundle.open(folder)
    bundle.verify_component("vae_decoder")
    with pytest.raises(BundleCorruptError, match=r"unet\.onnx\.data has SHA-256 .*, expected"):
        bundle.verify_component("unet")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_is_no_folder_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    for name, says in [
        ("none", "is not there"),
        ("file", "is a file"),
        ("loop", "loop"),
        ("x" * 5000, "cannot be opened"),
        ("a\0b", "cannot be opened"),
    ]:
        with pytest.raises(BundleNotFoundError, match=says):
            Bundle.open(tmp_path / name)


def test_a_folder_without_a_readable_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleCorruptError, match=r"bundle\.json cannot be read \(No such file"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(BundleCorruptError, match=r"bundle\.json is not a file"):
        Bundle.open(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no FIFOs")
def test_a_pipe_for_a_manifest_or_a_file_does_not_block(folder: Path) -> None:
    (folder / "unet.onnx").unlink()
    os.mkfifo(folder / "unet.onnx")
    with pytest.raises(BundleCorruptError, match=r"unet\.onnx is not a file"):
        Bundle.open(folder)
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(BundleCorruptError, match=r"bundle\.json is not a file"):
        Bundle.open(folder)


def test_a_huge_manifest_is_not_read_into_memory(folder: Path) -> None:
    with (folder / MANIFEST).open("wb") as file:
        file.truncate(2**40)  # a terabyte of holes
    with pytest.raises(BundleCorruptError, match="far more than any manifest"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["unet.onnx", MANIFEST])
def test_links_out_of_the_folder_are_refused_and_links_inside_are_not(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    with pytest.raises(BundleCorruptError, match=f"{name} is a link out of the bundle"):
        Bundle.open(folder)
    (folder / name).unlink()
    secret.rename(folder / "inside")
    (folder / name).symlink_to("inside")
    Bundle.open(folder)


def test_a_folder_that_is_a_link_out_is_refused(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "unet.onnx").rename(outside / "unet.onnx")
    (folder / "sub").symlink_to(outside)
    text = (folder / MANIFEST).read_text().replace('"unet.onnx"', '"sub/unet.onnx"')
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleCorruptError, match=r"sub/unet\.onnx is a link out of the bundle"):
        Bundle.open(folder)


def test_a_loop_of_links_is_refused(folder: Path) -> None:
    (folder / "unet.onnx").unlink()
    (folder / "unet.onnx").symlink_to("unet.onnx")
    with pytest.raises(BundleCorruptError, match=r"unet\.onnx"):
        Bundle.open(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_named(folder: Path) -> None:
    (folder / "unet.onnx").chmod(0)
    assert [problem.split()[0] for problem in Bundle.open(folder).problems()] == ["unet.onnx"]
    (folder / MANIFEST).chmod(0)
    with pytest.raises(BundleCorruptError, match="Permission denied"):
        Bundle.open(folder)
