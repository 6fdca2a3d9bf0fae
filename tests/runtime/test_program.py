"""Programs of kernels in graphs: what is in one, where its arrays lie, and that it computes the same."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sdrt.runtime import own_operations

from .kernel_checks import infer, kinds, model_of, needs_kernels, numbers, openvino, steps, with_ours

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

ops = openvino.opset13
PICTURE, TOKENS = (2, 32, 6, 10), (2, 20, 64)


def matrix(x: Any, outputs: int = 64, seed: int = 1) -> Any:
    channels = list(x.output(0).shape)[-1]
    return ops.matmul(x, ops.constant(numbers(seed, channels, outputs, spread=channels**-0.5)), False, False)


def convolution(x: Any, outputs: int = 32, seed: int = 1) -> Any:
    channels = list(x.output(0).shape)[1]
    weights = ops.constant(numbers(seed, outputs, channels, 3, 3, spread=(9 * channels) ** -0.5))
    return ops.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])


def norm(x: Any) -> Any:
    channels = list(x.output(0).shape)[-1]
    normal = ops.mvn(x, np.array([-1]), True, 1e-5, "inside_sqrt")
    return ops.add(ops.multiply(normal, ops.constant(numbers(5, channels))), ops.constant(numbers(6, channels)))


@needs_kernels
def test_what_follows_upon_each_other_is_one_program() -> None:
    model, programs = with_ours(lambda x: matrix(norm(matrix(x, 96)), 32, seed=2), numbers(0, *TOKENS))
    assert steps(programs) == ["product", "layer_norm", "product"]
    assert len(programs) == kinds(model).count("SdrtProgram") == 1
    assert kinds(model).count("Convert") == 2


@needs_kernels
def test_what_openvino_computes_in_between_makes_two_of_it() -> None:
    _, programs = with_ours(lambda x: matrix(ops.tanh(matrix(x)), seed=2), numbers(0, *TOKENS))
    assert [steps([program]) for program in programs] == [["product"], ["product"]]


@needs_kernels
def test_what_needs_both_stages_is_in_the_later_one() -> None:
    def build(x: Any) -> Any:
        first, other = matrix(x), matrix(x, seed=2)
        return ops.add(matrix(ops.tanh(first), seed=3), matrix(other, seed=4))

    _, programs = with_ours(build, numbers(0, *TOKENS))
    assert [len(steps([program])) for program in programs] == [3, 1]


@needs_kernels
def test_what_openvino_computes_beside_it_makes_no_difference() -> None:
    _, programs = with_ours(lambda x: ops.add(matrix(norm(matrix(x)), seed=2), ops.tanh(x)), numbers(0, *TOKENS))
    assert [steps([program]) for program in programs] == [["product", "layer_norm", "product"]]


@needs_kernels
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_concatenations_of_tokens(axis: int) -> None:
    def build(x: Any, other: Any) -> Any:
        joined = ops.concat([matrix(x), other, matrix(x, seed=2)], axis)
        return matrix(joined, seed=3)

    _, programs = with_ours(build, numbers(0, *TOKENS), numbers(1, *TOKENS))
    assert sorted(steps(programs)) == ["copy"] * 3 + ["product"] * 3
    assert len(programs) == 1


@needs_kernels
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -3])
def test_concatenations_of_pictures(axis: int) -> None:
    """Whose channels come last there."""

    def build(x: Any, other: Any) -> Any:
        return convolution(ops.concat([convolution(x), other, convolution(x, seed=2)], axis), seed=3)

    _, programs = with_ours(build, numbers(0, *PICTURE), numbers(1, *PICTURE))
    assert sorted(steps(programs)) == ["copy"] * 3 + ["product"] * 3


@needs_kernels
def test_parts_of_different_sizes() -> None:
    def build(x: Any) -> Any:
        joined = ops.concat([convolution(x, 64), convolution(x, 32, seed=2), convolution(x, 96, seed=3)], 1)
        return convolution(joined, 64, seed=4)

    with_ours(build, numbers(0, *PICTURE))


@needs_kernels
def test_reshapes_copy_nothing() -> None:
    """As between a convolution and what is done to pixels as tokens."""

    def build(x: Any) -> Any:
        pixels = ops.transpose(convolution(x, 64), np.array([0, 2, 3, 1]))
        flat = norm(ops.reshape(pixels, np.array([2, 60, 64]), False))
        back = ops.reshape(matrix(flat, seed=2), np.array([2, 6, 10, 64]), False)
        return convolution(ops.transpose(back, np.array([0, 3, 1, 2])), seed=3)

    _, programs = with_ours(build, numbers(0, *PICTURE))
    assert steps(programs) == ["product", "layer_norm", "product", "product"]


@needs_kernels
def test_reshapes_that_are_results_too() -> None:
    def build(x: Any) -> Any:
        flat = ops.reshape(matrix(x), np.array([40, 64]), False)
        again = ops.reshape(flat, np.array([4, 10, 64]), False)
        return [matrix(again, seed=2), ops.tanh(matrix(flat, seed=3)), ops.tanh(again)]

    with_ours(build, numbers(0, *TOKENS))


@needs_kernels
def test_an_output_that_is_used_inside_and_outside() -> None:
    def build(x: Any) -> Any:
        first = matrix(x)
        return [ops.tanh(first), matrix(norm(first), seed=2), first]

    _, programs = with_ours(build, numbers(0, *TOKENS))
    assert len(programs) == 1


@needs_kernels
def test_conversions_that_change_numbers_are_kept() -> None:
    def build(x: Any) -> Any:
        return matrix(ops.convert(ops.convert(x, "i32"), "f32"))

    with_ours(build, numbers(0, *TOKENS, spread=3))


def chain(x: Any, length: int = 12) -> Any:
    """Make a graph of many arrays, each with a use further on, of two sizes in turn."""
    kept = [matrix(x, seed=1)]
    for index in range(length):
        wide = matrix(norm(kept[-1]), 160, seed=10 + index)
        narrow = matrix(wide, 64, seed=40 + index)
        kept.append(ops.add(narrow, kept[-3] if len(kept) > 2 else kept[-1]))
    return kept[-1]


@needs_kernels
def test_arrays_that_are_needed_no_more_make_room_for_others() -> None:
    _, (program,) = with_ours(chain, numbers(0, *TOKENS), most=0.03)
    # Of each link a normalised array and a narrow one of 64, and a wide one of 160.
    together = 12 * (64 + 64 + 160) * 40 * 2
    assert 0 < program._arena_bytes < together / 4


@needs_kernels
def test_requests_at_once_get_what_each_gets_alone() -> None:
    model = model_of(chain, TOKENS)
    (program,) = own_operations.put_in(model)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    given = [numbers(index, *TOKENS) for index in range(4)]
    alone = [compiled([array])[0].copy() for array in given]
    wrong: list[int] = []

    def work(index: int) -> None:
        request = compiled.create_infer_request()
        wrong.extend(index for _ in range(30) if not np.array_equal(request.infer([given[index]])[0], alone[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= len(program._arenas) <= len(given)


@needs_kernels
def test_memory_is_freed_and_taken_again() -> None:
    model = model_of(chain, TOKENS)
    (program,) = own_operations.put_in(model)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    x = numbers(0, *TOKENS)
    before = compiled([x])[0].copy()
    (arena,) = program._arenas
    assert arena.nbytes == program._arena_bytes
    program.trim()
    assert program._arenas == []
    np.testing.assert_array_equal(compiled([x])[0], before)
    assert len(program._arenas) == 1


@needs_kernels
def test_a_graph_without_any_of_it_is_left_as_it_is() -> None:
    model = model_of(ops.tanh, TOKENS)
    before = kinds(model)
    assert own_operations.put_in(model) == []
    assert kinds(model) == before
    (found,) = infer(model, "f32", numbers(0, *TOKENS))
    np.testing.assert_allclose(found, np.tanh(numbers(0, *TOKENS)), atol=1e-5)
