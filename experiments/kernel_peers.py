"""Block-sparse kernels of other libraries, for comparison: PyTorch's BSR (Triton) and stk. Neither is a dependency.

Their blocks lie on a grid, ours are of any rows and columns: the peers solve an easier problem at the same density.
They are imported here alone, when the benchmark asks for them, and need CUDA. Only matrices: neither has convolutions.
"""

import importlib
from typing import Any

import numpy as np

from experiments.kernel_candidates import Timed
from experiments.kernel_shapes import Layer

PEERS = {"torch_bsr": "torch", "stk": "stk"}  # peer -> module
STK_BLOCK = 128


def installed() -> dict[str, str]:
    """Each peer -> its version, or why it cannot run here."""
    found = {}
    for peer, module in PEERS.items():
        try:
            version = getattr(importlib.import_module(module), "__version__", "unknown version")
            cuda = importlib.import_module("torch").cuda.is_available()
        except ImportError:
            found[peer] = "not installed"
        except Exception as error:  # a broken installation of a peer is no reason to measure nothing
            found[peer] = f"not usable: {error}"
        else:
            found[peer] = version if cuda else "no CUDA"
    return found


def usable(versions: dict[str, str]) -> list[str]:
    """The peers that `installed` has a version of."""
    return [p for p, version in versions.items() if not version.startswith(("not ", "no "))]


def unsupported_reason(peer: str, layer: Layer, block_shape: tuple[int, int]) -> str | None:
    """Why a peer cannot serve a layer, or None if it can."""
    if not layer.is_matmul:
        return "no convolutions"
    if layer.out % block_shape[0] or layer.in_features % block_shape[1]:
        return "the blocks do not divide the matrix"
    if peer == "stk" and block_shape != (STK_BLOCK, STK_BLOCK):
        return f"blocks of {STK_BLOCK}x{STK_BLOCK} alone"
    if peer == "torch_bsr" and any(side < 16 or side & (side - 1) for side in block_shape):
        return "its Triton kernels take sides that are powers of two of at least 16"
    return None


def _timed(torch: Any, call: Any) -> Timed:
    return Timed(call, wait=lambda _: torch.cuda.synchronize())


def _torch_bsr(layer: Layer, num_blocks: int, block_shape: tuple[int, int], dtype: str) -> dict[str, Timed]:
    """Forward alone: PyTorch has no Triton kernel for a transposed BSR matrix, and samples nothing in BSR."""
    torch: Any = importlib.import_module("torch")
    (rows, cols), rng = block_shape, np.random.default_rng(0)
    groups, across = layer.out // rows, layer.in_features // cols
    counts = num_blocks // groups + (np.arange(groups) < num_blocks % groups)
    starts = np.append(0, np.cumsum(counts))
    columns = np.concatenate([np.sort(rng.choice(across, count, replace=False)) for count in counts])
    options = {"device": "cuda", "dtype": getattr(torch, dtype)}
    weights = torch.sparse_bsr_tensor(
        torch.tensor(starts, device="cuda"), torch.tensor(columns, device="cuda"),
        torch.randn(num_blocks, rows, cols, **options), size=(layer.out, layer.in_features),
    )  # fmt: skip
    x = torch.randn(layer.in_features, layer.batch, **options)
    return {"forward": _timed(torch, lambda: weights @ x)}


def _stk(layer: Layer, num_blocks: int, block_shape: tuple[int, int], dtype: str) -> dict[str, Timed]:
    """The three passes: sparse times dense, transposed sparse times dense, and the sampled product of two dense."""
    torch: Any = importlib.import_module("torch")
    stk: Any = importlib.import_module("stk")
    options = {"device": "cuda", "dtype": getattr(torch, dtype)}
    sparsity = 1 - num_blocks * STK_BLOCK**2 / (layer.out * layer.in_features)
    mask = importlib.import_module("stk.random").dense_mask(layer.out, layer.in_features, sparsity, STK_BLOCK)
    weights = stk.ops.to_sparse(mask.to(**options), blocking=STK_BLOCK)
    x = torch.randn(layer.in_features, layer.batch, **options)
    dy = torch.randn(layer.out, layer.batch, **options)
    return {
        "forward": _timed(torch, lambda: stk.ops.dsd(weights, x)),
        "input_gradient": _timed(torch, lambda: stk.ops.dsd(weights.t(), dy)),
        "weight_gradient": _timed(torch, lambda: stk.ops.sdd(dy, x.t(), weights)),
    }


def peer_passes(
    peer: str, layer: Layer, num_blocks: int, block_shape: tuple[int, int], dtype: str
) -> dict[str, Timed]:  # fmt: skip
    """The passes of a peer, ready to be timed. It draws its own weights and inputs, and nobody checks its results.

    Raises:
      NotImplementedError: if the peer cannot serve the layer.
    """
    reason = unsupported_reason(peer, layer, block_shape)
    if reason is not None:
        raise NotImplementedError(reason)
    return {"torch_bsr": _torch_bsr, "stk": _stk}[peer](layer, num_blocks, block_shape, dtype)
