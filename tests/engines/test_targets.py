"""Names of GPUs to compute capabilities."""

from __future__ import annotations

import pytest

from sdrt.engines import targets
from sdrt.engines.devices import Gpu
from sdrt.errors import InputError

RTX = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@pytest.mark.parametrize(
    ("target", "capability"),
    [
        ("rtx3090", "8.6"),
        ("RTX 3090", "8.6"),
        ("NVIDIA GeForce RTX 3090", "8.6"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "8.6"),
        ("3060-ti", "8.6"),
        ("2080 Ti", "7.5"),
        ("T4", "7.5"),
        ("a100", "8.0"),
        ("rtx_4090", "8.9"),
        ("RTX A6000", "8.6"),
        ("RTX 6000 Ada", "8.9"),
        ("5090", "12.0"),
        ("GB10", "12.1"),
        ("H100", "9.0"),
        ("sm86", "8.6"),
        ("SM_120", "12.0"),
        ("8.9", "8.9"),
    ],
)
def test_names_of_cards_and_architectures(target: str, capability: str) -> None:
    assert targets.capability_of(target) == capability


@pytest.mark.parametrize("target", ["", "rtx", "rtx9999", "sm", "sm8", "8,6", "gpu0", "../sm86", "x" * 500])
def test_what_is_no_target_is_refused_with_all_that_are(target: str) -> None:
    with pytest.raises(
        InputError, match=r"is no known target: expected .* sm86, native .* rtx3090, .* dgxspark"
    ) as caught:
        targets.capability_of(target)
    assert len(str(caught.value)) < 1000


def test_native_is_the_first_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "nvidia_gpus", lambda: (Gpu(0, "a", "8.9", 1), Gpu(1, "b", "8.6", 1)))
    assert targets.capability_of("native") == "8.9"


def test_native_without_a_gpu_asks_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "nvidia_gpus", tuple)
    with pytest.raises(InputError, match="driver shows none: name the card, such as rtx3090"):
        targets.capability_of("native")


def test_several_targets_are_sorted_and_each_there_once() -> None:
    assert targets.capabilities_of(["rtx5090", "rtx3090,rtx3080", "a100"], RTX) == ("8.0", "8.6", "12.0")


def test_a_gpu_that_the_builder_does_not_know_is_refused_with_the_list() -> None:
    says = r"h200 has compute capability 9.0, .* it builds for sm75 \(7.5\), sm80 \(8.0\), .*, sm121 \(12.1\)"
    with pytest.raises(InputError, match=says):
        targets.capabilities_of(["rtx3090", "h200"], RTX)


@pytest.mark.parametrize("given", [[], [","], [""]])
def test_no_target_at_all_is_refused(given: list[str]) -> None:
    with pytest.raises(InputError, match="there is no target"):
        targets.capabilities_of(given, RTX)


def test_names_of_architectures_go_both_ways() -> None:
    assert [targets.capability_of_sm(targets.sm_name(each).upper()) for each in RTX] == list(RTX)
    assert targets.capability_of_sm("CURRENT") is None


def test_targets_are_read_whatever_builder_there_is() -> None:
    assert targets.parse_targets([" h100 ,sm86", "RTX 3090"]) == {"h100": "9.0", "sm86": "8.6", "RTX 3090": "8.6"}
