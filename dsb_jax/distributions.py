"""How dense each layer of a model is, and how many blocks that makes.

`uniform` gives every layer the same density. `erk` is the Erdos-Renyi-Kernel rule of Evci et al., "Rigging the
Lottery", ICML 2020, section 3, which spares thin layers and small kernels:

    density_l = eps * (c_in + out + sum(kernel_size)) / (c_in * out * prod(kernel_size))

where layers that would exceed 1 are dense, and eps makes the total number of weights `(1 - sparsity) * N`, N being
the weights of all layers given here. Layers that stay dense by the model's own rule are not given here.

`to_blocks` rounds densities to whole blocks without losing the total, because methods are compared at equal
numbers of active weights. A stack of layers (`nn.scan`) has one density, and counts as often as it has layers.
Worked example: 16x16 blocks, two linear layers of 64x64 (4096 weights, 16 blocks) and 128x64 (8192 weights, 32
blocks), both at density 0.1:

    wanted weights          409.6     819.2     1228.8 in all
    whole blocks, down      1         3         1024 in all: 204.8 are missing
    remainder, in blocks    0.6       0.2       the largest remainder gets the block that is still missing
    num_blocks              2         3         1280 in all, 51.2 more than wanted
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsb_jax.layout import check_sizes, count_groups, max_blocks, num_active
from dsb_jax.spec import LayerSpec


def uniform(specs: Sequence[LayerSpec], sparsity: float) -> tuple[float, ...]:
    """The density `1 - sparsity` for every layer.

    Raises:
      ValueError: if `sparsity` is not in [0, 1].
    """
    check_sparsity(sparsity)
    return (1.0 - sparsity,) * len(specs)


def erk(specs: Sequence[LayerSpec], sparsity: float) -> tuple[float, ...]:
    """Erdos-Renyi-Kernel densities; see the module docstring for the rule and the source.

    Args:
      specs: the sparse layers of the model, in any order.
      sparsity: fraction of zeros over all of them together.

    Returns:
      One density per layer, in [0, 1], with `sum(density * size) == (1 - sparsity) * sum(size)`; a stack counts as
      all of its layers.

    Raises:
      ValueError: if `sparsity` is not in [0, 1].
    """
    check_sparsity(sparsity)
    # density = eps * score / size, so that eps * score is the number of weights of a layer, one of a stack.
    scores = [spec.c_in + spec.out + sum(spec.kernel_size) for spec in specs]
    wanted = (1.0 - sparsity) * sum(spec.num_layers * spec.size for spec in specs)
    weights = share_out(specs, scores, wanted, most=[spec.size for spec in specs])
    return tuple(each / spec.size for each, spec in zip(weights, specs, strict=True))


def share_out(
    specs: Sequence[LayerSpec], shares: Sequence[float], total: float, *, most: Sequence[float]
) -> tuple[float, ...]:
    """Weights in proportion to the shares, `total` in all, but no more than fit into a layer.

    Args:
      specs: the layers; a stack counts as all of its layers.
      shares: of each layer, one of a stack, in any unit.
      total: weights of all layers together.
      most: what each can hold.

    Returns:
      Weights of each layer, one of a stack; all at their most if that is less than `total`.
    """
    full: set[int] = set()
    while len(full) < len(specs):
        free = [i for i in range(len(specs)) if i not in full]
        left = total - sum(specs[i].num_layers * most[i] for i in full)
        factor = left / sum(specs[i].num_layers * shares[i] for i in free)
        # Filling a layer hands its surplus to the others, so the factor only grows and no layer is ever released.
        over = {i for i in free if factor * shares[i] > most[i]}
        if not over:
            return tuple(float(most[i]) if i in full else factor * shares[i] for i in range(len(specs)))
        full |= over
    return tuple(map(float, most))


def to_blocks(
    specs: Sequence[LayerSpec],
    densities: Sequence[float],
    block_shapes: Sequence[tuple[int, int]],
    *,
    min_group_blocks: int = 0,
) -> tuple[int, ...]:
    """The number of blocks of each layer: densities rounded to whole blocks, the total kept.

    The total of `layout.num_active` is within half a block (`R * C / 2` weights, in each layer of a stack) of the
    wanted total, `sum(density * size)`. Each layer is within one block of what it wants, unless some layer wants less
    than its least or more than its columns can hold (`in` not a multiple of C); what that layer has too much or too
    little is shared by the others in proportion to their weights.

    Args:
      specs: the sparse layers; what blocks they hold already does not matter.
      densities: the density wanted of each, in [0, 1].
      block_shapes: `(R, C)` of each.
      min_group_blocks: a layer's least are so many blocks for each of its row groups, or all that fit, so that no
        output is without weights: a 1x1 convolution of 32 channels has no 16 columns to spare at 0.9. If the total is
        too small for that, the least are fewer for each group, and without any, as with 0, one block a layer.

    Returns:
      `num_blocks` of each layer (of a stack: of each of its layers), from 1 to `layout.max_blocks`.

    Raises:
      ValueError: if a block is larger than a layer, a density is not in [0, 1], `min_group_blocks` is negative, or
        the total cannot be met: fewer weights than one block a layer, or more than whole blocks can hold.
    """
    if min_group_blocks < 0:
        raise ValueError(f"min_group_blocks={min_group_blocks} is negative; give 0 or more.")
    if len(specs) != len(densities):
        raise ValueError(f"{len(densities)} densities for {len(specs)} layers; give one density per layer.")
    for spec, density, block_shape in zip(specs, densities, block_shapes, strict=True):
        check_sizes(spec.shape, block_shape, 1)
        if not 0 <= density <= 1:
            raise ValueError(f"density={density} of a {spec.out}x{spec.in_} layer is not a fraction; give 0 to 1.")
    wanted = [density * spec.size for spec, density in zip(specs, densities, strict=True)]
    least = _least_blocks(specs, _total(specs, wanted), block_shapes, min_group_blocks)
    targets = _fit_between_bounds(specs, wanted, block_shapes, least)
    num_blocks = list(map(_blocks_within, specs, targets, block_shapes))
    held = _held(specs, block_shapes, num_blocks)
    more = _held(specs, block_shapes, [count + 1 for count in num_blocks])
    growable = [i for i, count in enumerate(_most_blocks(specs, block_shapes)) if num_blocks[i] < count]
    gain = {i: more[i] - held[i] for i in growable}
    # `missing` is the sum of all remainders, each below one block. Every block that brings the total closer is
    # taken, largest remainder first, so what is left at the end is at most half a block, too much or too little.
    missing = _total(specs, targets) - _total(specs, held)
    for i in sorted(growable, key=lambda i: ((held[i] - targets[i]) / gain[i], i)):
        of_stack = specs[i].num_layers * gain[i]
        if missing >= of_stack / 2:
            missing -= of_stack
            num_blocks[i] += 1
    return tuple(num_blocks)


def at_density(dense: LayerSpec, density: float, block_shape: tuple[int, int], min_group_blocks: int) -> LayerSpec:
    """A layer of a density of its own, or of more if that leaves less than `min_group_blocks` for each row group."""
    check_sizes(dense.shape, block_shape, 1)
    if min_group_blocks > 0:
        most = dense.in_ // block_shape[1]
        least = count_groups(dense.out, block_shape[0]) * min(min_group_blocks, most)
        density = max(density, dense.with_blocks(block_shape, least).density)
    (count,) = to_blocks([dense], [density], [block_shape], min_group_blocks=min_group_blocks)
    return dense.with_blocks(block_shape, count)


def by_arguments(
    dense: LayerSpec,
    *,
    density: float | None,
    num_blocks: int | None,
    block_shape: tuple[int, int],
    min_group_blocks: int,
) -> LayerSpec | None:
    """A layer that is given a density, or a number of blocks, of its own; None if neither makes it sparse.

    Raises:
      ValueError: if the density is not in (0, 1], or the blocks do not fit the layer.
    """
    if density is not None and density != 1:
        if not 0 < density < 1:
            raise ValueError(f"density={density} is not in (0, 1]; density is 1 - sparsity.")
        return at_density(dense, density, block_shape, min_group_blocks)
    return None if num_blocks is None else dense.with_blocks(block_shape, num_blocks)


def check_sparsity(sparsity: Any) -> None:
    """Raises ValueError unless it is a fraction."""
    if not isinstance(sparsity, int | float | np.number) or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity!r} is not a fraction of zeros; give 0 to 1, such as 0.9.")


def _total(specs: Sequence[LayerSpec], weights: Sequence[float]) -> float:
    """The sum of weights that are given for one layer of each stack."""
    return sum(spec.num_layers * each for spec, each in zip(specs, weights, strict=True))


def _held(specs: Sequence[LayerSpec], block_shapes: Sequence[tuple[int, int]], num_blocks: Sequence[int]) -> list[int]:
    """Real weights in so many blocks of each layer."""
    return [num_active(*sizes) for sizes in zip((spec.shape for spec in specs), block_shapes, num_blocks, strict=True)]


def _most_blocks(specs: Sequence[LayerSpec], block_shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [max_blocks(spec.shape, shape) for spec, shape in zip(specs, block_shapes, strict=True)]


def _least_blocks(
    specs: Sequence[LayerSpec], total: float, block_shapes: Sequence[tuple[int, int]], min_group_blocks: int
) -> list[int]:
    """`min_group_blocks` for each row group, or all that fit; if that is more than `total` weights, one less, ..."""
    groups = [count_groups(spec.out, rows) for spec, (rows, _) in zip(specs, block_shapes, strict=True)]
    fit = [spec.in_ // cols for spec, (_, cols) in zip(specs, block_shapes, strict=True)]
    for each in range(min(min_group_blocks, max(fit, default=0)), 0, -1):
        least = [min(each, most) * count for most, count in zip(fit, groups, strict=True)]
        if _total(specs, _held(specs, block_shapes, least)) <= total:
            return least
    return [1] * len(specs)


def _blocks_within(spec: LayerSpec, weights: float, block_shape: tuple[int, int]) -> int:
    """The most blocks (at least one) that hold no more than `weights` real weights, by bisection.

    With a ragged `out`, blocks of the last group hold fewer weights than others, so there is no division to do;
    but every block holds some, so the count of weights is increasing.
    """
    low, high = 1, max_blocks(spec.shape, block_shape)
    while low < high:
        middle = (low + high + 1) // 2
        # The slack of a millionth weight forgives the rounding of `density * size`.
        if num_active(spec.shape, block_shape, middle) <= weights + 1e-6:
            low = middle
        else:
            high = middle - 1
    return low


def _fit_between_bounds(
    specs: Sequence[LayerSpec],
    wanted: Sequence[float],
    block_shapes: Sequence[tuple[int, int]],
    least_blocks: Sequence[int],
) -> list[float]:
    """Scales `wanted` by one factor, clipped to what each layer has to and can hold, so that its sum stays the same."""
    if not specs:
        return []
    least = list(map(float, _held(specs, block_shapes, least_blocks)))
    most = list(map(float, _held(specs, block_shapes, _most_blocks(specs, block_shapes))))
    total, dense = _total(specs, wanted), _total(specs, [spec.size for spec in specs])
    total_least, total_most = _total(specs, least), _total(specs, most)
    half_block = max(spec.num_layers * math.prod(shape) for spec, shape in zip(specs, block_shapes, strict=True)) / 2
    shown = " or ".join(dict.fromkeys(f"{rows}x{cols}" for rows, cols in block_shapes))
    # Limits quoted in the errors are rounded to the safe side: they have to work when they are tried.
    if total_least > total + half_block:
        raise ValueError(
            f"sparsity={1 - total / dense:.6g} leaves {total:.0f} weights, but one {shown} block in each of "
            f"{sum(spec.num_layers for spec in specs)} layers takes {total_least:.0f}; use a sparsity of at most "
            f"{math.floor((1 - total_least / dense) * 1e4) / 1e4}, or smaller blocks."
        )
    if total_most < total - half_block:
        raise ValueError(
            f"sparsity={1 - total / dense:.6g} asks for {total:.0f} weights, but whole {shown} blocks hold at "
            f"most {total_most:.0f}, because C does not divide `in` everywhere; use a sparsity of at least "
            f"{math.ceil((1 - total_most / dense) * 1e4) / 1e4}, or a C that divides `in`."
        )
    # A layer that wants nothing still counts as its least, so that any total between the bounds is reached.
    shares = [max(want, low) for want, low in zip(wanted, least, strict=True)]

    def scaled(factor: float) -> list[float]:
        return [min(max(factor * share, lo), hi) for share, lo, hi in zip(shares, least, most, strict=True)]

    if _total(specs, scaled(1.0)) == total:
        return scaled(1.0)
    # The sum grows with the factor, from all layers at their least to all at their most: bisect.
    low, high = 0.0, max(hi / share for hi, share in zip(most, shares, strict=True))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(specs, scaled(middle)) <= total else (low, middle)
    return scaled(low)
