"""The sizes of a layer: which axes of a kernel are rows and columns, and what is refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsb_jax.spec import LayerSpec, conv_spec, linear_spec
from dsb_jax.telemetry import active_positions
from tests.conftest import make_layout

QUERY = LayerSpec((6, 2, 4), out_axes=(1, 2), in_axes=(0,))
SCANNED = LayerSpec((3, 5, 7), out_axes=(2,), in_axes=(1,), stack_axes=(0,))


def test_the_matrix_of_each_kind_of_kernel():
    """W @ x is what the dense layer computes."""
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(5, 7)), rng.normal(size=5)
    np.testing.assert_allclose(linear_spec(5, 7).to_matrix(kernel) @ x, x @ kernel)
    kernel, window = rng.normal(size=(3, 2, 4, 5)), rng.normal(size=(3, 2, 4))
    conv = conv_spec((3, 2), 4, 5)
    np.testing.assert_allclose(conv.to_matrix(kernel) @ window.ravel(), np.einsum("hwc,hwco->o", window, kernel))
    assert (conv.kernel_size, conv.c_in, conv.in_, conv.shape) == ((3, 2), 4, 24, (5, 24))
    kernel, x = rng.normal(size=(6, 2, 4)), rng.normal(size=6)
    np.testing.assert_allclose(QUERY.to_matrix(kernel) @ x, np.einsum("d,dhk->hk", x, kernel).ravel())
    output = LayerSpec((2, 4, 6), out_axes=(2,), in_axes=(0, 1))
    kernel, x = rng.normal(size=(2, 4, 6)), rng.normal(size=(2, 4))
    np.testing.assert_allclose(output.to_matrix(kernel) @ x.ravel(), np.einsum("hk,hkd->d", x, kernel))
    kernels = rng.normal(size=(3, 5, 7))
    np.testing.assert_array_equal(SCANNED.to_matrix(kernels[1]), kernels[1].T)


@given(st.permutations(range(5)), st.integers(1, 3), st.integers(0, 1), st.data())
def test_the_matrix_goes_back(order, num_out, num_stacked, data):
    """Any order of axes, any number of them lifted."""
    sizes = tuple(data.draw(st.integers(1, 3)) for _ in order)
    stack_axes, out_axes, in_axes = (
        tuple(order[:num_stacked]), tuple(order[num_stacked : num_stacked + num_out]),
        tuple(order[num_stacked + num_out :]),
    )  # fmt: skip
    spec = LayerSpec(sizes, out_axes=out_axes, in_axes=in_axes, stack_axes=stack_axes)
    own = tuple(size for axis, size in enumerate(sizes) if axis not in stack_axes)
    kernel = np.arange(np.prod(own)).reshape(own)
    matrix = spec.to_matrix(kernel)
    assert matrix.shape == spec.shape
    assert spec.num_layers * spec.size == np.prod(sizes)
    np.testing.assert_array_equal(spec.from_matrix(matrix), kernel)


def test_sizes_by_hand():
    """Ten outputs in groups of 4: the last group has 2 phantom rows, and round(7 / 3) = 2 of the blocks."""
    spec = linear_spec(12, 10).with_blocks((4, 3), 7)
    assert (spec.storage, spec.num_groups, spec.num_blocks) == ("blocks", 3, 7)
    assert spec.num_stored == spec.num_active == 5 * 12 + 2 * 6
    assert spec.density == 72 / 120
    assert active_positions(make_layout(0, spec.shape, (4, 3), (3, 2, 2))).size == spec.num_active
    dense = linear_spec(12, 10)
    assert (dense.storage, dense.num_blocks, dense.num_active, dense.density) == ("dense", 120, 120, 1)
    single = spec.with_single(72)
    assert (single.storage, single.block_shape, single.num_blocks, single.num_active) == ("single", (1, 1), 72, 72)
    backward = spec.with_single(90, num_computed=72)
    assert (backward.storage, backward.num_stored, backward.num_active) == ("backward_set", 90, 72)
    assert backward.density == spec.density
    stack = SCANNED.with_blocks((2, 2), 5)
    assert (stack.num_layers, stack.num_active, stack.size) == (3, 2 * 2 * 5 - 1 * 2 * (2 - 1), 35)


def test_a_spec_is_a_value():
    one, same = (linear_spec(12, 10).with_blocks((4, 3), 7) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert len({one, same, one.with_blocks((4, 3), 6), one.with_single(72)}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.num_blocks = 3


@pytest.mark.parametrize(("change", "message"), [
    ({"out_axes": (0,)}, r"do not name each axis of kernel_shape=\(12, 10\) once"),
    ({"in_axes": (0, 1)}, "do not name each axis"),
    ({"stack_axes": (2,)}, "do not name each axis"),
    ({"spatial_axes": (1,)}, "spatial_axes=.* among in_axes"),
    ({"kernel_shape": (12, 0)}, "a size below 1"),
    ({"kernel_shape": (12,), "in_axes": (), "out_axes": (0,)}, "no input"),
    ({"storage": "csr"}, "storage='csr' is unknown; choose one of blocks, single"),
    ({"num_active": 73}, "num_active=73 of 72 stored weights; give 1 to 72"),
    ({"num_active": -1}, "num_active=-1 of 72"),
    ({"num_blocks": 0}, "num_blocks=0 does not fit"),
    ({"num_blocks": 13}, "num_blocks=13 does not fit a 10x12 matrix of 4x3 blocks; give 1 to 12"),
    ({"num_blocks": 2.5}, "num_blocks holds 2.5, which is not a whole number"),
    ({"num_blocks": True}, "num_blocks holds True, which is not a whole number"),
    ({"block_shape": (0, 3)}, "block_shape=0x3 has a side below 1"),
    ({"block_shape": (4, -1)}, "block_shape=4x-1 has a side below 1"),
    ({"block_shape": (4, 1.5)}, "block_shape holds 1.5"),
    ({"block_shape": (11, 3)}, "block_shape=11x3 is larger than the 10x12"),
])  # fmt: skip
def test_invalid_sizes_are_refused(change, message):
    right = linear_spec(12, 10).with_blocks((4, 3), 7)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(right, **{"num_active": 0, **change})
