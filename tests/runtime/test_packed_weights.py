"""Packed weights: made once, mapped by the next process, and made anew when the file is not what it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.engines.bundle import Bundle
from sdrt.errors import SdrtWarning
from sdrt.runtime import kernels, product
from sdrt.runtime.compile_cache import LIMIT_VARIABLE, CompileCache
from sdrt.runtime.packed_weights import PackedWeights

from .kernel_checks import needs_kernels, predict

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


@pytest.fixture
def bundle(tiny_bundle: Path, own_home: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


class Packer:
    """Packs by giving back what it was told, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *numbers: int) -> Callable[[], NDArray[np.uint8]]:
        def pack() -> NDArray[np.uint8]:
            self.count += 1
            return np.array(numbers, np.uint8)

        return pack


def files(home: Path) -> list[Path]:
    return sorted(home.glob("compiled/openvino/*/*.whole.*.blob"))


def fill(packed: PackedWeights, pack: Packer) -> list[list[int]]:
    one = packed.get(["a"], 3, pack(1, 2, 3))
    two = packed.get(["a", "b"], 5, pack(4, 5, 6, 7, 8))
    return [one.tolist(), two.tolist()]


def test_they_are_packed_once_and_kept(bundle: Bundle, own_home: Path) -> None:
    pack = Packer()
    packed = PackedWeights(CompileCache(bundle, "openvino"), "unet")
    right = fill(packed, pack)
    assert fill(packed, pack) == right == [[1, 2, 3], [4, 5, 6, 7, 8]]
    packed.keep()
    (file,) = files(own_home)
    assert fill(PackedWeights(CompileCache(bundle, "openvino"), "unet"), pack) == right
    assert pack.count == 2
    packed.keep()
    assert files(own_home) == [file]


def test_another_graph_has_its_own(bundle: Bundle) -> None:
    pack = Packer()
    for component in ("unet", "vae_decoder"):
        packed = PackedWeights(CompileCache(bundle, "openvino"), component)
        fill(packed, pack)
        packed.keep()
    assert pack.count == 4


def test_what_has_no_name_of_its_own_is_not_taken_for_another(bundle: Bundle) -> None:
    pack = Packer()
    packed = PackedWeights(CompileCache(bundle, "openvino"), "unet")
    assert packed.get(["Constant_12"], 1, pack(1)).tolist() == [1]
    assert packed.get(["Constant_12"], 1, pack(2)).tolist() == [2]


def test_another_size_is_packed_anew(bundle: Bundle) -> None:
    pack = Packer()
    packed = PackedWeights(CompileCache(bundle, "openvino"), "unet")
    packed.get(["a"], 1, pack(1))
    assert packed.get(["a"], 2, pack(1, 2)).tolist() == [1, 2]


@pytest.mark.parametrize("damage", [lambda content: content[:-1] + b"x", lambda _: b"", lambda content: content[:4096]])
def test_a_damaged_file_is_made_anew(damage: Callable[[bytes], bytes], bundle: Bundle, own_home: Path) -> None:
    packed = PackedWeights(CompileCache(bundle, "openvino"), "unet")
    right = fill(packed, Packer())
    packed.keep()
    (file,) = files(own_home)
    file.write_bytes(damage(file.read_bytes()))
    again, pack = PackedWeights(CompileCache(bundle, "openvino"), "unet"), Packer()
    with pytest.warns(SdrtWarning, match="damaged: it is made anew"):
        assert fill(again, pack) == right
    assert pack.count == 2
    again.keep()
    assert [each.name for each in files(own_home)] == [file.name]


def test_beyond_the_limit_nothing_is_kept(bundle: Bundle, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    packed = PackedWeights(CompileCache(bundle, "openvino"), "unet")
    packed.get(["a"], 10**6, lambda: np.zeros(10**6, np.uint8))
    with pytest.warns(SdrtWarning, match="SDRT_COMPILED_MB allows 1"):
        packed.keep()
    assert files(own_home) == []
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    packed = PackedWeights(CompileCache(bundle, "openvino"), "unet")
    fill(packed, Packer())
    packed.keep()
    assert files(own_home) == []


def test_a_full_disk_leaves_nothing_behind(bundle: Bundle, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedWeights(CompileCache(bundle, "openvino"), "unet")
    fill(packed, Packer())
    real = Path.open

    def full(path: Path, *given: Any, **more: Any) -> Any:
        if path.name == "draft":
            raise OSError(28, "No space left on device")
        return real(path, *given, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.warns(SdrtWarning, match="No space left on device"):
        packed.keep()
    assert files(own_home) == []
    assert list(own_home.glob("compiled/openvino/*/.*")) == []


@needs_kernels
def test_a_unet_computes_the_same_from_the_file(
    bundle: Bundle, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = predict(bundle, "bf16")
    assert len(files(own_home)) == 1
    found = kernels.kernels()
    assert found is not None

    def fail(*_: Any) -> int:
        raise AssertionError("they are packed already")

    monkeypatch.setattr(product, "kernels", lambda: found._replace(pack=fail))
    np.testing.assert_array_equal(predict(bundle, "bf16"), first)
