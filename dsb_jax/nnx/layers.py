"""`SparseLinear`, `SparseConv`, `SparseLinearGeneral`, `SparseEinsum`: subclasses of the layers of `flax.nnx`.

Every argument of the dense class means what it means there, and these are added:

    density             fraction of the weights that exist, in (0, 1]; without it and `num_blocks` the layer is dense
    num_blocks          the number of blocks, instead of `density`
    block_shape         (R, C), by default (16, 16)
    min_group_blocks    blocks that each row group has at the least, with `density`; by default 1
    method              how the layer begins and what it stores; by default shuffled blocks, which `DSB` adapts
    implementation      one of `dsb_jax.ops.IMPLEMENTATIONS`; see `dsb_jax.ops.dispatch`
    feature_major       of SparseLinear and SparseConv: activations are [in, N] or [C, H, W, N], outputs likewise

A sparse layer has `blocks` and `topology` (`dsb_jax.nnx.variables`) in the place of `kernel`. `sparsify` gives these
classes to the layers of a model that is built already.
"""

from typing import Any

import jax
from flax import nnx

from dsb_jax import products
from dsb_jax.boxes import other_names
from dsb_jax.distributions import by_arguments
from dsb_jax.equations import Equation
from dsb_jax.initialization import initialize
from dsb_jax.methods import Static
from dsb_jax.methods.base import Method, check_method
from dsb_jax.nnx.variables import TOPOLOGY, Observed, Topology
from dsb_jax.ops.dispatch import check_implementation
from dsb_jax.paths import KERNEL, WEIGHTS
from dsb_jax.products import Call, Weights
from dsb_jax.refusals import refuse_unserved
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec
from dsb_jax.topology import LayerTopology

_OWN_ARGUMENTS = ("density", "num_blocks", "block_shape", "min_group_blocks", "method", "implementation")


class Sparse:
    """What the sparse layers share.

    The last of their bases, and without slots: else an instance of the dense class could not be given the sparse one.

    Attributes:
      blocks: a Variable like the kernel's, float[num_blocks, R, C]: the weights that exist.
      topology: where they lie.
      implementation: of the product.
    """

    __slots__ = ()
    implementation = "auto"

    def _initialize(self, dense: Any, args: Any, rngs: nnx.Rngs, arguments: dict[str, Any]) -> None:
        """Initializes the dense layer, and makes it sparse if its arguments say so."""
        own = {name: arguments.pop(name) for name in _OWN_ARGUMENTS if name in arguments}
        dense.__init__(self, *args, rngs=rngs, **arguments)
        self._begin(rngs, **own)

    def _begin(
        self, rngs: nnx.Rngs, *, density: float | None = None, num_blocks: int | None = None,
        block_shape: tuple[int, int] = (16, 16), min_group_blocks: int = 1, method: Method | None = None,
        implementation: str = "auto",
    ) -> None:  # fmt: skip
        method = Static() if method is None else method
        check_method(method)
        check_implementation(implementation)
        if density is not None and num_blocks is not None:
            raise ValueError(f"density={density} and num_blocks={num_blocks} are both given; give one of them.")
        if num_blocks is None and density in (None, 1):
            return
        module: Any = self
        refuse_unserved(module, type(self).__name__)
        planned = by_arguments(
            dense_spec(module), density=density, num_blocks=num_blocks, block_shape=block_shape,
            min_group_blocks=min_group_blocks,
        )  # fmt: skip
        assert planned is not None
        kernel = module.kernel.get_value()
        ((blocks, node),) = initialize(method, rngs.params(), {(): kernel}, {(): planned}).values()
        make_sparse(self, blocks, node, implementation)

    def _weights(self, out_sharding: Any) -> Weights | None:
        """What the layer computes with; None if it is dense."""
        if WEIGHTS not in vars(self):
            return None
        if out_sharding is not None:
            raise NotImplementedError(
                f"out_sharding={out_sharding} of {sizes_text(self)} is not served by a sparse product; leave it away "
                "and constrain the output instead."
            )
        held, blocks = vars(self)[TOPOLOGY].get_value(), vars(self)[WEIGHTS]
        node, zero = (held.node, held.zero) if isinstance(held, Observed) else (held, None)
        if node.stack_axes:
            raise ValueError(
                f"{sizes_text(self)} is a stack of {node.num_layers} layers whose topology is not lifted in this call; "
                "lift dsb_jax.nnx.Topology along the same axis as nnx.Param, by nnx.scan or nnx.vmap."
            )
        return Weights(blocks[...], node, zero, self.implementation)

    def _bias(self) -> jax.Array | None:
        bias = vars(self)["bias"]
        return None if bias is None else bias[...]

    def _call(self) -> Call:
        module: Any = self
        name = sizes_text(self)
        return Call(
            name, (name,), lambda *arrays: module.promote_dtype(arrays, dtype=module.dtype), module.precision
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name == KERNEL and WEIGHTS in vars(self):
            raise AttributeError(
                f"{sizes_text(self)} is sparse and has `blocks`, no kernel; if its kernel is read, keep it dense by a "
                "rule: rules=[Rule('path/of/the/layer', dense=True)]."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class SparseLinear(nnx.Linear, Sparse):
    """`nnx.Linear` with shuffled-block weights: [..., in] -> [..., out]; arguments as in the module docstring."""

    feature_major = False

    def __init__(self, *args: Any, rngs: nnx.Rngs, feature_major: bool = False, **arguments: Any) -> None:
        self.feature_major = feature_major
        self._initialize(nnx.Linear, args, rngs, arguments)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        weights = self._weights(out_sharding)
        if weights is None:
            y = super().__call__(inputs.T if self.feature_major else inputs, out_sharding)
            return y.T if self.feature_major else y
        return products.linear(
            self._call(), inputs, weights, self._bias(), out=self.out_features, feature_major=self.feature_major
        )


class SparseLinearGeneral(nnx.LinearGeneral, Sparse):
    """`nnx.LinearGeneral` with shuffled-block weights, without batch axes; arguments as in the module docstring."""

    def __init__(self, *args: Any, rngs: nnx.Rngs, **arguments: Any) -> None:
        self._initialize(nnx.LinearGeneral, args, rngs, arguments)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        weights = self._weights(out_sharding)
        if weights is None:
            return super().__call__(inputs, out_sharding)
        return products.general(
            self._call(), inputs, weights, self._bias(), axis=self.axis, features=self.out_features
        )  # fmt: skip


class SparseEinsum(nnx.Einsum, Sparse):
    """`nnx.Einsum` with shuffled-block weights, where it is a matrix product; arguments as in the module docstring."""

    def __init__(self, *args: Any, rngs: nnx.Rngs, **arguments: Any) -> None:
        self._initialize(nnx.Einsum, args, rngs, arguments)

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        weights = self._weights(out_sharding)
        if weights is None or einsum_str is not None:  # which the dense layer refuses
            return super().__call__(inputs, einsum_str, out_sharding)
        return products.einsum(
            self._call(), inputs, weights, self._bias(), equation=Equation.parse(self.einsum_str),
            kernel_shape=tuple(self.kernel_shape),
        )  # fmt: skip


class SparseConv(nnx.Conv, Sparse):
    """`nnx.Conv` with shuffled-block weights: 2-D, any kernel size, stride and padding, dilation 1, one group.

    Arguments as in the module docstring.
    """

    feature_major = False

    def __init__(self, *args: Any, rngs: nnx.Rngs, feature_major: bool = False, **arguments: Any) -> None:
        self.feature_major = feature_major
        self._initialize(nnx.Conv, args, rngs, arguments)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        weights = self._weights(out_sharding)
        if weights is not None:
            return products.convolution(
                self._call(), inputs, weights, self._bias(), out=self.out_features, kernel_size=self.kernel_size,
                strides=self.strides, padding=self.padding, feature_major=self.feature_major,
            )  # fmt: skip
        if not self.feature_major:
            return super().__call__(inputs, out_sharding)
        refuse_unserved(self, type(self).__name__)
        return products.feature_major_convolution(
            self._call(), inputs, self.kernel[...], self._bias(), strides=self.strides, padding=self.padding
        )


SPARSE: dict[type, type] = {
    nnx.Linear: SparseLinear,
    nnx.LinearGeneral: SparseLinearGeneral,
    nnx.Einsum: SparseEinsum,
    nnx.Conv: SparseConv,
}
_DENSE = {sparse: dense for dense, sparse in SPARSE.items()}


def sparse_class(module: nnx.Module) -> Any:
    """What a layer is when it is sparse: the class itself of one that is, None for a module that is no such layer."""
    return type(module) if type(module) in _DENSE else SPARSE.get(type(module))


def dense_spec(module: Any) -> LayerSpec:
    """The sizes of one layer, sparse or dense, from its attributes."""
    if isinstance(module, nnx.Linear):
        return linear_spec(module.in_features, module.out_features)
    if isinstance(module, nnx.Conv):
        channels = module.in_features // module.feature_group_count
        return conv_spec(tuple(module.kernel_size), channels, module.out_features)
    if isinstance(module, nnx.Einsum):
        return Equation.parse(module.einsum_str).spec(tuple(module.kernel_shape))
    count = len(module.in_features)
    shape = (*module.in_features, *module.out_features)
    return LayerSpec(shape, tuple(range(count, len(shape))), tuple(range(count)))


def sizes_text(module: Any) -> str:
    """A layer in words: an NNX module does not know where it lies in a model."""
    return f"{type(module).__name__} {'x'.join(map(str, dense_spec(module).kernel_shape))}"


def make_sparse(module: Any, blocks: jax.Array, node: LayerTopology, implementation: str) -> None:
    """Gives a layer its sparse class, and blocks and topology in the place of its kernel."""
    kernel = module.kernel
    module.__class__ = sparse_class(module)
    setattr(module, WEIGHTS, _variable_like(kernel, blocks, node.spec.stack_axes))
    setattr(module, TOPOLOGY, Topology(node))
    if implementation != "auto":
        module.implementation = implementation
    del module.kernel


def make_dense(module: Any, kernel: jax.Array) -> None:
    """The inverse of `make_sparse`: the layer gets its dense class back, and a kernel."""
    node = module.topology.get_value()
    module.kernel = _variable_like(module.blocks, kernel, node.stack_axes)
    delattr(module, WEIGHTS)
    delattr(module, TOPOLOGY)
    vars(module).pop("implementation", None)
    if not getattr(module, "feature_major", False):  # which the dense class does not have
        module.__class__ = _DENSE[type(module)]


def _variable_like(variable: nnx.Variable, array: jax.Array, stack_axes: tuple[int, ...]) -> nnx.Variable:
    """A Variable of the same type and metadata for an array of another shape, whose axes have other names."""
    metadata = variable.get_metadata()
    names = metadata.get("out_sharding")
    if names is not None:
        rank = len(array.shape)
        own = tuple(names) if isinstance(names, tuple | list | jax.sharding.PartitionSpec) else (None,) * rank
        metadata["out_sharding"] = other_names(own, rank, stack_axes)
    return type(variable)(array, **metadata)
