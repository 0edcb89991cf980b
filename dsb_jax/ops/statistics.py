"""Statistics of the backward pass that growing needs, observed as the cotangents of zeros.

`observe(y, x, zero, layout, ...)` returns y unchanged; in the backward pass the "gradient" with respect to the zero is
the wanted statistic of the layer, computed from its input x and its output gradient dY:

    OutputInputNorms     |dY_i|[out], |X_j|[in]   since |dW[i, j]| <= |dY_i| * |X_j|; nothing of size out * in exists
    PanelGradientNorm    [num_groups, in]         the norm of dW over the R rows of a group, a few groups at a time
    Gradient             [out, in]                the dense weight gradient, as RigL uses it

(Jiang et al. 2022, section 4, for the first; Evci et al. 2020 for the last.) Differentiating with respect to the zeros
alone means that the gradients of the weights are never computed in an adaptation.

Norms are not linear: the mean of the norms of shards is not the norm of the batch. So
  - over the devices of `axis_name` each chunk of the gradient is averaged before its norm is taken;
  - a `vmap` over examples inside of the loss is folded into the batch. What tells it from a `vmap` over whole models
    or batches, which keeps them apart, is that there the zeros themselves are mapped (`dsb_jax.measuring` sees to it);
  - each observation adds 1 to `calls`, so that a layer that is called in a loop is noticed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from dsb_jax.layout import BlockLayout
from dsb_jax.ops.dense_gradient import map_groups
from dsb_jax.spec import LayerSpec
from pallas_kernels.interface import ConvGeometry, read_by_taps

ROWS = 16  # of a group, where all of the gradient is wanted

AxisName = str | tuple[str, ...] | None


class Observed(NamedTuple):
    """What one call of a layer shows, in either order of activations (`feature_major`: the batch is the last axis).

    Attributes:
      x: its input, [N, H, W, C] or [C, H, W, N].
      dy: the gradient of its output, [N, OH, OW, out] or [out, OH, OW, N].
      layout: of the layer.
      geometry: kernel size, strides, padding.
      feature_major: the order.
      axis_name: mapped axes over which the batch is spread; None on one device and under GSPMD.
      with_kernels: whether our own kernels may compute.
    """

    x: jax.Array
    dy: jax.Array
    layout: BlockLayout
    geometry: ConvGeometry
    feature_major: bool = False
    axis_name: AxisName = None
    with_kernels: bool = True


class Statistic(Protocol):
    """A statistic of the backward pass; a frozen dataclass.

    Attributes:
      is_additive: whether the observations of several calls of a layer may be summed.
      dense_products: products of the size of the dense weight gradient that an observation takes.
    """

    is_additive: ClassVar[bool]
    dense_products: ClassVar[float]

    def zeros(self, spec: LayerSpec) -> Any:
        """What is observed, as zeros, for one layer."""
        ...

    def cotangent(self, seen: Observed) -> Any:
        """One observation, in the form of `zeros`."""
        ...

    def finish(self, value: Any, axis_name: AxisName = None) -> Any:
        """The statistic of the whole batch from the sum of the observations on this device."""
        ...


class OutputInput(NamedTuple):
    """Norms over the batch: `dy_norm[out]` of the output gradients, `x_norm[in]` of the inputs, any unit."""

    dy_norm: jax.Array
    x_norm: jax.Array


@dataclasses.dataclass(frozen=True)
class OutputInputNorms:
    """Norms of each output's gradient and of each input, `OutputInput`; observed as sums of squares."""

    is_additive: ClassVar[bool] = True
    dense_products: ClassVar[float] = 0.0

    def zeros(self, spec: LayerSpec) -> OutputInput:
        return OutputInput(jnp.zeros(spec.out, jnp.float32), jnp.zeros(spec.in_, jnp.float32))

    def cotangent(self, seen: Observed) -> OutputInput:
        batch = 3 if seen.feature_major else 0
        squares = jnp.square(seen.dy.astype(jnp.float32)).sum(axis=(batch, 1, 2))
        return OutputInput(squares, _input_squares(seen))

    def finish(self, value: OutputInput, axis_name: AxisName = None) -> OutputInput:
        dy, x = value
        if axis_name is not None:  # each device's loss is the mean over its own part of the batch
            count = lax.psum(1, axis_name)
            dy, x = lax.psum(dy, axis_name) / count**2, lax.psum(x, axis_name)
        return OutputInput(jnp.sqrt(dy), jnp.sqrt(x))


@dataclasses.dataclass(frozen=True)
class PanelGradientNorm:
    """Norm of the weight gradient over the R rows of each (row group, input column): float32[num_groups, in]."""

    is_additive: ClassVar[bool] = False
    dense_products: ClassVar[float] = 1.0

    def zeros(self, spec: LayerSpec) -> Float[Array, "num_groups in"]:
        return jnp.zeros((spec.num_groups, spec.in_), jnp.float32)

    def cotangent(self, seen: Observed) -> Float[Array, "num_groups in"]:
        """A few groups at a time, so that the dense gradient of a large layer never exists."""

        def norms(gradient: jax.Array) -> jax.Array:
            return _norm_over_rows(gradient if seen.axis_name is None else lax.pmean(gradient, seen.axis_name))

        return _map_groups(norms, seen, seen.layout.out_idx)

    def finish(self, value: jax.Array, axis_name: AxisName = None) -> Float[Array, "num_groups in"]:
        # Equal on all devices already; this says so to `shard_map`.
        return value if axis_name is None else lax.pmax(value, axis_name)

    def from_gradient(self, gradient: Float[Array, "out in"], layout: BlockLayout) -> Float[Array, "num_groups in"]:
        """The same from the dense gradient, for layers with several calls."""
        return _norm_over_rows(gradient.at[layout.out_idx].get(mode="fill", fill_value=0))


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The dense weight gradient, float32[out, in]."""

    is_additive: ClassVar[bool] = True
    dense_products: ClassVar[float] = 1.0

    def zeros(self, spec: LayerSpec) -> Float[Array, "out in"]:
        return jnp.zeros(spec.shape, jnp.float32)

    def cotangent(self, seen: Observed) -> Float[Array, "out in"]:
        out, in_ = seen.layout.shape
        index = jnp.arange(-(-out // ROWS) * ROWS, dtype=jnp.int32).reshape(-1, ROWS)
        return _map_groups(lambda gradient: gradient, seen, index).reshape(-1, in_)[:out]

    def finish(self, value: jax.Array, axis_name: AxisName = None) -> Float[Array, "out in"]:
        return value if axis_name is None else lax.pmean(value, axis_name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zero:
    """What a layer finds in the collection `statistics` while a statistic is measured.

    Attributes:
      value: `statistic.zeros(spec)`.
      calls: float32[], zero; its cotangent counts the observations.
      statistic, axis_name: static.
    """

    value: Any
    calls: jax.Array
    statistic: Any = dataclasses.field(metadata={"static": True})
    axis_name: AxisName = dataclasses.field(default=None, metadata={"static": True})


def observe(
    y: jax.Array, x: jax.Array, zero: Zero, layout: BlockLayout, *, geometry: ConvGeometry, feature_major: bool = False
) -> jax.Array:
    """y unchanged; see the module docstring.

    Args:
      y: the output of a layer, [N, OH, OW, out], or [out, OH, OW, N] if `feature_major`.
      x: its input, [N, H, W, C] or [C, H, W, N].
      zero: from the collection `statistics`.
      layout: of the layer.
      geometry: kernel size, strides, padding.
      feature_major: the order of both activations.
    """
    return _observe((geometry, feature_major), y, x, zero, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observe(how: tuple[ConvGeometry, bool], y: jax.Array, x: jax.Array, zero: Zero, layout: BlockLayout) -> jax.Array:
    return y


def _observe_fwd(how, y, x, zero, layout):
    return y, (x, zero, layout)


def _observe_bwd(how, residuals, dy):
    (geometry, feature_major), (x, zero, layout) = how, residuals
    statistic, axis_name = zero.statistic, zero.axis_name  # not `zero` in the closure: it would keep a tracer alive

    # Where types carry shardings the partitioner decides how to multiply, for which jax cannot lower a sum of a
    # kernel's results over devices ("Unsupported reduction computation").
    is_explicit = bool(jax.typeof(dy).sharding.mesh.explicit_axes)

    def cotangent(x: jax.Array, dy: jax.Array, layout: BlockLayout) -> Any:
        return statistic.cotangent(Observed(x, dy, layout, geometry, feature_major, axis_name, not is_explicit))

    if is_explicit:
        cotangent = jax.sharding.auto_axes(cotangent, out_sharding=jax.sharding.PartitionSpec())
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    devices = {name: lax.axis_index(name) for name in names}
    value = _fold_examples(cotangent, 3 if feature_major else 0, x, dy, layout, zero.calls, devices)
    nothing = zero.calls.sum()  # 0, but of the type that differs from device to device, as the zero does
    value = jax.tree.map(lambda leaf: leaf + nothing, value)
    return dy, None, Zero(value, jnp.ones_like(zero.calls), statistic, axis_name), None


_observe.defvjp(_observe_fwd, _observe_bwd)


def _fold_examples(
    cotangent: Callable[..., Any],
    batch: int,
    x: jax.Array,
    dy: jax.Array,
    layout: BlockLayout,
    marker: jax.Array,
    devices: dict[str, jax.Array],
) -> Any:
    """`cotangent(x, dy, layout)`, where a mapped axis joins axis `batch` of x and dy unless it maps the marker, too.

    `devices` are the positions along mapped axes that have a name, which is how such an axis is told from others.
    """

    @custom_vmap
    def call(x: jax.Array, dy: jax.Array, layout: BlockLayout, marker: jax.Array, devices: Any) -> Any:
        return cotangent(x, dy, layout)

    @call.def_vmap
    def map_once_more(size: int, is_mapped: Any, *operands: Any) -> Any:
        x, dy, layout = jax.tree.map(
            lambda a, mapped: a if mapped else jnp.broadcast_to(a, (size, *a.shape)), operands[:3], tuple(is_mapped[:3])
        )
        marker, devices = operands[3:]
        marker_is_mapped, devices_mapped = is_mapped[3:]
        if not marker_is_mapped:
            one_layout = operands[2] if not is_mapped[2].group_start else jax.tree.map(lambda a: a[0], layout)
            value = _fold_examples(cotangent, batch, _join(x, batch), _join(dy, batch), one_layout, marker, devices)
            return value, jax.tree.map(lambda _: False, value)
        name = next((name for name, mapped in devices_mapped.items() if mapped), None)
        each = jax.vmap(cotangent, axis_size=size, axis_name=name)
        others = {key: index for key, index in devices.items() if key != name}
        value = _fold_examples(each, batch + 1, x, dy, layout, marker[0], others)
        return value, jax.tree.map(lambda _: True, value)

    return call(x, dy, layout, marker, devices)


def _join(a: jax.Array, batch: int) -> jax.Array:
    """[V, ..., N, ...] -> [..., V * N, ...] with V * N at axis `batch`."""
    a = jnp.moveaxis(a, 0, batch)
    return a.reshape(*a.shape[:batch], -1, *a.shape[batch + 2 :])


def _input_squares(seen: Observed) -> Float[Array, "in"]:
    """|X_j|^2 of every column j = (kh, kw, c): the sum over the batch of what that tap reads of channel c."""
    squares = jnp.square(seen.x.astype(jnp.float32)).sum(axis=3 if seen.feature_major else 0)
    energy = squares if seen.feature_major else squares.transpose(2, 0, 1)  # [C, H, W]
    taps = read_by_taps(energy, seen.geometry)
    return jnp.concatenate([tap.sum(axis=(1, 2)) for tap in taps])


def _map_groups(reduce: Callable[[jax.Array], jax.Array], seen: Observed, out_idx: jax.Array) -> jax.Array:
    options = {"feature_major": seen.feature_major, "with_kernels": seen.with_kernels}
    return map_groups(reduce, seen.x, seen.dy, out_idx, seen.geometry, **options)


def _norm_over_rows(gradient: Float[Array, "num_groups R in"]) -> Float[Array, "num_groups in"]:
    return jnp.sqrt(jnp.square(gradient).sum(axis=1))
