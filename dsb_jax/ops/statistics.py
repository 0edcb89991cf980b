"""Statistics of the backward pass that growing needs, as cotangents of zero-valued probes.

`observe(y, x, probe, ...)` returns y unchanged; in the backward pass the "gradient" with respect to the probe is
the wanted statistic of the layer, computed from its input x and its output gradient dY:

    norm            (|dY_i|[out], |X_j|[in])   since |dW[i, j]| <= |dY_i| * |X_j|; nothing of size out * in exists
    block_gradient  [num_groups, in]           |dW| summed in square over the R rows of a group, a few groups at a time
    gradient        [out, in]                  the dense weight gradient, as RigL uses it

(Jiang et al. 2022, section 4, for `norm`; Evci et al. 2020 for `gradient`.) Differentiating with respect to the
probes alone means that the gradients of the weights are never computed in an adaptation.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsb_jax.layout import BlockLayout
from pallas_kernels.interface import ConvGeometry

Probe = dict[str, jax.Array]

PANEL_ROWS = 128  # output rows in one product: fewer waste a CPU's or GPU's matrix units, more hold more scratch


def make_probe(kind: str, layout: BlockLayout) -> Probe:
    """Zeros of the statistic's shape for one layer; the key says which statistic."""
    out, in_ = layout.shape
    if kind == "norm":
        return {"dy_norm": jnp.zeros(out), "x_norm": jnp.zeros(in_)}
    if kind == "block_gradient":
        return {"panel_norm": jnp.zeros((layout.num_groups, in_))}
    if kind == "gradient":
        return {"gradient": jnp.zeros((out, in_))}
    raise ValueError(f"no probe measures {kind!r}; choose norm, block_gradient or gradient.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observe(geometry: ConvGeometry, y: jax.Array, x: jax.Array, probe: Probe, out_idx: jax.Array) -> jax.Array:
    return y


def _observe_fwd(geometry, y, x, probe, out_idx):
    return y, (x, {name: value.shape for name, value in probe.items()}, out_idx)


def _observe_bwd(geometry, residuals, dy):
    x, shapes, out_idx = residuals
    (name, *_) = sorted(shapes)
    if name == "dy_norm":
        squares = jnp.square(dy.astype(jnp.float32)).sum(axis=(0, 1, 2))
        statistic = {"dy_norm": jnp.sqrt(squares), "x_norm": _input_norms(x, geometry, dy.shape[1:3])}
    elif name == "panel_norm":
        statistic = {"panel_norm": _panel_norms(x, dy, out_idx, geometry)}
    else:
        statistic = {"gradient": _weight_gradient(x, dy, geometry)}
    return dy, jnp.zeros_like(x), statistic, None


_observe.defvjp(_observe_fwd, _observe_bwd)


def observe(
    y: jax.Array, x: jax.Array, probe: Probe, layout: BlockLayout, *, geometry: ConvGeometry, feature_major: bool
) -> jax.Array:
    """y[N, OH, OW, out] unchanged; see the module docstring. x is [N, H, W, C] (CHWN if `feature_major`)."""
    if feature_major:
        y, x = y.transpose(3, 1, 2, 0), x.transpose(3, 1, 2, 0)
    y = _observe(geometry, y, x, probe, layout.out_idx)
    return y.transpose(3, 1, 2, 0) if feature_major else y


def _input_norms(x: jax.Array, geometry: ConvGeometry, output_size: tuple[int, int]) -> jax.Array:
    """|X_j| of every column j = (kh, kw, c): the norm over the batch of what that tap reads of channel c."""
    energy = jnp.square(x.astype(jnp.float32)).sum(axis=0)  # [H, W, C]
    (top, bottom), (left, right) = geometry.padding
    energy = lax.pad(energy, jnp.float32(0), ((top, bottom, 0), (left, right, 0), (0, 0, 0)))
    (stride_h, stride_w), (out_h, out_w) = geometry.strides, output_size
    taps = [
        energy[kh : kh + out_h * stride_h : stride_h, kw : kw + out_w * stride_w : stride_w][:out_h, :out_w].sum((0, 1))
        for kh in range(geometry.kernel_size[0])
        for kw in range(geometry.kernel_size[1])
    ]
    return jnp.sqrt(jnp.concatenate(taps))


def _weight_gradient(x: jax.Array, dy: jax.Array, geometry: ConvGeometry) -> jax.Array:
    """The dense gradient [out of dy, in] of the flattened kernel: one product for each tap.

    (XLA's own gradient of a convolution is many times slower on a CPU inside a loop.)
    """
    (stride_h, stride_w), (out_h, out_w) = geometry.strides, dy.shape[1:3]
    # In float32, since not every backend multiplies bfloat16 into float32. lax.pad takes negative padding, too.
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    x = lax.pad(x, jnp.float32(0), ((0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0)))
    numbers = (((0, 1, 2), (0, 1, 2)), ((), ()))
    taps = [
        lax.dot_general(
            x[:, kh : kh + (out_h - 1) * stride_h + 1 : stride_h, kw : kw + (out_w - 1) * stride_w + 1 : stride_w],
            dy, numbers,
        )
        for kh in range(geometry.kernel_size[0])
        for kw in range(geometry.kernel_size[1])
    ]  # fmt: skip
    return jnp.concatenate(taps).T


def _panel_norms(x: jax.Array, dy: jax.Array, out_idx: jax.Array, geometry: ConvGeometry) -> jax.Array:
    """[num_groups, in]: a few groups at a time, so that the dense gradient of a large layer never exists."""
    num_groups, rows = out_idx.shape
    together = min(num_groups, max(1, PANEL_ROWS // rows))
    turns = -(-num_groups // together)
    spare = jnp.full((turns * together - num_groups, rows), dy.shape[-1], out_idx.dtype)  # reads zeros
    index = jnp.concatenate([out_idx, spare]).reshape(turns, together * rows)

    def some(rows_of_groups: jax.Array) -> jax.Array:
        d_rows = dy.at[..., rows_of_groups].get(mode="fill", fill_value=0)
        gradient = _weight_gradient(x, d_rows, geometry).reshape(together, rows, -1)
        return jnp.sqrt(jnp.square(gradient).sum(axis=1))

    return lax.map(some, index).reshape(turns * together, -1)[:num_groups]
