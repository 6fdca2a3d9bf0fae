"""Downloads from a hub on loopback, each in a process of its own, as the environment steers it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sdrt.export.hub import HubSpec, parse_hub_spec

from .hub_server import COMMIT, HubServer, Sent

FETCH = """
import json, sys
from sdrt.errors import SdrtError
from sdrt.export.hub import fetch, parse_hub_spec
steps = []
try:
    found = fetch(parse_hub_spec(sys.argv[1]), ema=sys.argv[2] == "ema", progress=lambda *step: steps.append(step))
    print(json.dumps({"path": str(found.path), "source": found.source, "steps": steps}))
except SdrtError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | more


def fetch(hub: HubServer | str, home: Path, spec: str, ema: str = "", **more: str) -> dict[str, Any]:
    endpoint = hub if isinstance(hub, str) else hub.endpoint
    run = subprocess.run(
        [sys.executable, "-c", FETCH, spec, ema],
        env=environment(endpoint, home, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    answer: dict[str, Any] = json.loads(run.stdout)
    assert "\n" not in answer.get("message", "")
    return answer


@pytest.fixture(scope="session")
def repository(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as the hub has it: the model, and much that no one needs."""
    folder = tmp_path_factory.mktemp("hub") / "repository"
    shutil.copytree(tiny_checkpoint, folder)
    for name in ("safety_checker/model.safetensors", "unet/diffusion_flax_model.msgpack", "README.md", "sd.ckpt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    for name in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (folder / name).write_bytes(b"not needed")
    return folder


NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


def test_only_what_is_needed_is_downloaded_and_only_once(repository: Path, tmp_path: Path) -> None:
    with HubServer({"CompVis/stable-diffusion-v1-1": repository}) as hub:
        first = fetch(hub, tmp_path, "v1-1", HF_TOKEN="hf_secret")
        assert hub.files == NEEDED
        assert first["source"] == f"CompVis/stable-diffusion-v1-1@{COMMIT}"
        for name in NEEDED:
            assert (Path(first["path"]) / name).read_bytes() == (repository / name).read_bytes()
        total = sum((repository / name).stat().st_size for name in NEEDED)
        assert first["steps"][-1][1:] == [total, total]
        assert [done for _, done, _ in first["steps"]] == sorted(done for _, done, _ in first["steps"])
        # The token goes to the hub and not to where it redirects.
        assert {token for path, token in hub.tokens if path.startswith("/api/models")} == {"Bearer hf_secret"}
        assert {token for path, token in hub.tokens if path.startswith("/cdn")} == {None}
        hub.sent.clear()
        assert fetch(hub, tmp_path, f"CompVis/stable-diffusion-v1-1@{COMMIT}")["path"] == first["path"]
        assert hub.sent == []
    # The hub is gone: what is in the cache serves, with HF_HUB_OFFLINE and without.
    assert fetch(hub_that_is_gone(), tmp_path, "v1-1", HF_HUB_OFFLINE="1")["path"] == first["path"]
    assert fetch(hub_that_is_gone(), tmp_path, "v1-1")["path"] == first["path"]


def hub_that_is_gone() -> str:
    with HubServer({}) as hub:
        return hub.endpoint


def assert_goes_on(cut: Sent, rest: Sent, repository: Path) -> None:
    """See that the second answer is what the first lacked; of its last chunk, 10 MiB, some may be sent again."""
    assert cut.name == rest.name
    assert rest.range is not None
    start = int(rest.range.removeprefix("bytes=").removesuffix("-"))
    assert cut.count - (10 << 20) < start <= cut.count
    assert rest.count == (repository / rest.name).stat().st_size - start


def test_a_connection_that_breaks_once_is_taken_up_again(repository: Path, tmp_path: Path) -> None:
    with HubServer({"a/b": repository}, cut_after=12_000_000, cuts=1) as hub:
        found = fetch(hub, tmp_path, "a/b")
    (rest,) = [one for one in hub.sent if one.range]
    assert (Path(found["path"]) / rest.name).read_bytes() == (repository / rest.name).read_bytes()
    (cut,) = [one for one in hub.sent if one.name == rest.name and one is not rest]
    assert_goes_on(cut, rest, repository)


def test_a_second_run_goes_on_where_the_first_failed(repository: Path, tmp_path: Path) -> None:
    with HubServer({"a/b": repository}, cut_after=12_000_000, cuts=1, broken=True) as hub:
        failed = fetch(hub, tmp_path, "a/b")
        assert failed["error"] == "DownloadError"
        (cut,) = [one for one in hub.sent if one.count == 12_000_000]
        hub.broken = False
        hub.sent.clear()
        found = fetch(hub, tmp_path, "a/b")
        (rest,) = [one for one in hub.sent if one.name == cut.name]
        assert_goes_on(cut, rest, repository)
    assert (Path(found["path"]) / cut.name).read_bytes() == (repository / cut.name).read_bytes()
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_killed_run_leaves_nothing_false_and_its_bytes_are_used(repository: Path, tmp_path: Path) -> None:
    with HubServer({"a/b": repository}, cut_after=12_000_000, cuts=1000) as hub:
        process = subprocess.Popen(
            [sys.executable, "-c", FETCH, "a/b", ""], env=environment(hub.endpoint, tmp_path), stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not any(one.count == 12_000_000 for one in hub.sent) and time.monotonic() < deadline:
            time.sleep(0.02)
        while not any(path.stat().st_size for path in tmp_path.rglob("*.incomplete")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        hub.cuts = 0
        hub.sent.clear()
        found = fetch(hub, tmp_path, "a/b")
        assert any(one.range for one in hub.sent)
    for name in NEEDED:
        assert (Path(found["path"]) / name).read_bytes() == (repository / name).read_bytes()


def test_a_partial_file_that_is_not_the_beginning_is_found_out(repository: Path, tmp_path: Path) -> None:
    with HubServer({"a/b": repository}, cut_after=12_000_000, cuts=1, broken=True) as hub:
        fetch(hub, tmp_path, "a/b")
        (partial,) = tmp_path.rglob("*.incomplete")
        partial.write_bytes(b"x" * 12_000_000)
        hub.broken = False
        answer = fetch(hub, tmp_path, "a/b")
        assert answer["error"] == "DownloadError"
        assert "damaged on the way" in answer["message"]
        assert "path" in fetch(hub, tmp_path, "a/b")


def test_what_the_hub_lacks_ends_in_one_line(repository: Path, tmp_path: Path, tiny_ckpt: Path) -> None:
    two = tmp_path / "two"
    two.mkdir()
    for name in ("first.ckpt", "second.ckpt"):
        shutil.copy(tiny_ckpt, two / name)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "README.md").write_text("words")
    home = tmp_path / "home"
    with HubServer(
        {"a/b": repository, "a/gated": repository, "a/two": two, "a/plain": plain}, frozenset({"a/gated"})
    ) as hub:
        for spec, said in (
            ("a/none", "a/none is not on"),
            ("a/b@nothing", "has no revision 'nothing'"),
            ("a/gated", "asks for an agreement: accept it at"),
            ("a/two", "holds 2 checkpoints: choose one as a/two:first.ckpt"),
            ("a/two:third.ckpt", "has no file 'third.ckpt'"),
            ("a/plain", "holds no Stable Diffusion checkpoint"),
        ):
            answer = fetch(hub, home, spec)
            assert answer["error"] == "DownloadError", answer
            assert said in answer["message"]
        assert fetch(hub, home, "a/b", ema="ema")["error"] == "CheckpointError"
        assert Path(fetch(hub, home, "a/two:second.ckpt")["path"]).read_bytes() == tiny_ckpt.read_bytes()


def test_without_a_hub_and_without_a_cache(tmp_path: Path) -> None:
    gone = hub_that_is_gone()
    answer = fetch(gone, tmp_path, "v1-4")
    assert (answer["error"], gone in answer["message"]) == ("DownloadError", True)
    answer = fetch(gone, tmp_path, "v1-4", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in answer["message"]


def test_part_of_a_model_in_the_cache_is_not_taken_for_all(repository: Path, tmp_path: Path) -> None:
    with HubServer({"a/b": repository}, cut_after=12_000_000, cuts=1, broken=True) as hub:
        fetch(hub, tmp_path, "a/b")
        answer = fetch(hub, tmp_path, "a/b", HF_HUB_OFFLINE="1")
    assert answer["error"] == "DownloadError"
    assert "in part" in answer["message"]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("v1-1", HubSpec("CompVis/stable-diffusion-v1-1", "main", "", "v1-1")),
        ("v1-5@fp16", HubSpec("stable-diffusion-v1-5/stable-diffusion-v1-5", "fp16", "", "v1-5")),
        ("some-one/a_model.v2", HubSpec("some-one/a_model.v2", "main", "", "a_model.v2")),
        ("a/b@refs/pr/1", HubSpec("a/b", "refs/pr/1", "", "b")),
        ("a/b:deep/model.ckpt@x", HubSpec("a/b", "x", "deep/model.ckpt", "model")),
        ("v1-6", None),
        ("models/x.ckpt", None),
        ("./a/b", None),
        ("a/../b", None),
        ("a/b/c.ckpt", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("C:\\a\\b", None),
        ("", None),
    ],
)
def test_what_names_a_repository(text: str, spec: HubSpec | None) -> None:
    assert parse_hub_spec(text) == spec
