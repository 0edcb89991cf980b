"""Named grids of runs, as plain data: for `experiments.sweep --preset=NAME` and what looks its results up."""

from typing import Any

from dsb_jax.training.config import PROTOCOLS

ALL_METHODS = ("dense", "small_dense", "ssb", "set", "rigl", "topkast", "dsb")
SPARSITIES = (0.8, 0.9, 0.95)

_BLOCKS = {"method": ("dsb",), "granularity": ("block",)}  # the paper's variant of dsb
# As before the proxies: one block shape for all layers, columns drawn for each row group on its own, and statistics of
# 32 examples.
_OLD = {"block_shape": "16x16", "columns": "random", "adapt_batch_size": 32}


def _image_proxy(dataset: str, model: str, learning_rate: float) -> dict[str, Any]:
    """Photographs averaged down, a small network, lengths that take seconds: unlike digits, it tells methods apart.

    The learning rate is the best of 0.1, 0.2, 0.4, 0.8 and 1.6 for static blocks: it outweighs every method.
    """
    parts: list[dict[str, Any]] = []
    for steps, interval in ((300, 15), (1200, 150)):
        length = {"steps": (steps,), "update_interval": (interval,), "learning_rate": (learning_rate,)}
        for sparsity in (0.9, 0.95):
            density = {"sparsity": (sparsity,), **length}
            often = {**density, "update_interval": (steps // 20,)}
            gradual = {"initial_density": (round(4 * (1 - sparsity), 2),)}
            parts += [
                {"method": ALL_METHODS, **density},
                {"method": ("dsb",), **{name: (value,) for name, value in _OLD.items()}, **often},
                {"method": ("rigl", "dsb"), **often},
                {"method": ("ssb", "dsb"), "block_shape": ("16x16",), **density},
                {"method": ("set", "rigl", "dsb"), **gradual, **density},
            ]
    return {
        "seeds": tuple(range(10)),
        "together": True,
        "common": {"dataset": dataset, "model": model},
        "parts": tuple(parts),
    }


def _language_proxy() -> dict[str, Any]:
    """A small transformer under AdamW; every arm at the best learning rate that was found for it."""
    parts: list[dict[str, Any]] = []
    for steps, interval, dense, narrow in ((500, 20, 0.003, 0.012), (1500, 60, 0.003, 0.006)):
        length = {"steps": (steps,)}
        sparse = {"learning_rate": (0.024,), **length}
        adapting = {"update_interval": (interval,), **sparse}
        parts += [
            {"method": ("ssb",), **sparse},
            {"method": ("dsb", "rigl"), **adapting},
            # What did harm: growth by raw gradients, second moments of zero, and both.
            {"method": ("dsb",), "grow": ("block_gradient",), **adapting},
            {"method": ("dsb",), "grow": ("block_gradient",), "fill": ("zero",), **adapting},
            {"method": ("dsb", "rigl"), "fill": ("zero",), **adapting},
            {"method": ("set",), "drop_fraction": (0.0,), **adapting},  # static single weights
            {"method": ("dense",), "learning_rate": (dense,), **length},
            {"method": ("small_dense",), "learning_rate": (narrow,), **length},
        ]
    sparsest = {"sparsity": (0.97,), "learning_rate": (0.024,), "steps": (1500,), "initial_density": (None, 0.12)}
    parts += [
        {"method": ("ssb",), **sparsest},
        {"method": ("dsb",), "update_interval": (60,), **sparsest},
    ]
    return {
        "seeds": tuple(range(8)),
        "together": True,
        "common": {"dataset": "python_text", "sparsity": 0.9},
        "parts": tuple(parts),
    }


# Names of a config's fields -> the values to combine. Each part of a grid is a product; `common` holds for all parts.
PRESETS: dict[str, dict[str, Any]] = {
    # Hours on two cores: what the methods and the settings of dsb are worth at equal sparsity.
    "digits": {
        "seeds": (0, 1, 2, 3, 4),
        "common": {"dataset": "digits", "model": "convnet"},
        "parts": (
            {"method": ALL_METHODS, "sparsity": SPARSITIES},
            {**_BLOCKS, "sparsity": SPARSITIES, "block_aware_drop": (True, False)},
            {
                "method": ("dsb",),
                "sparsity": (0.9,),
                "granularity": ("panel_column", "block"),
                "grow": ("norm", "block_gradient", "gradient", "random"),
            },
            # Why adapting in whole blocks can hurt: kept weights that new blocks displace, or starved row groups?
            {**_BLOCKS, "sparsity": (0.95,), "growth_score": (0.5,)},
            {**_BLOCKS, "sparsity": (0.95,), "min_group_blocks": (0,)},
            {"method": ("dsb", "ssb"), "sparsity": SPARSITIES, "block_shape": ("16x16", "32x8", "64x4")},
        ),
    },
    # Photographs in full size, a small network, few epochs: about four hours on two cores.
    "cifar10_small": {
        "seeds": (0, 1),
        "common": {
            "dataset": "cifar10",
            "model": "wrn-10-2",
            "epochs": 8,
            "learning_rate": 0.4,
            "learning_rate_schedule": "cosine",
            "update_interval": 200,
        },
        "parts": ({"method": ("dense", "ssb", "rigl", "dsb"), "sparsity": (0.9,)},),
    },
    # Two networks that take seconds, and a language model that takes a minute.
    "images_8x8": _image_proxy("cifar10@8x8", "narrow_convnet", 0.4),
    "images_16x16": _image_proxy("cifar10@16x16", "wrn-10-1", 0.8),
    "language": _language_proxy(),
    # The authors' protocol and Figures 14 and 15 of the paper: for GPUs. Dropout is the WRN's.
    "cifar_full": {
        "seeds": (0, 1, 2),
        "common": {**PROTOCOLS["authors"], "dtype": "bfloat16"},
        "parts": tuple(
            {"model": (model,), "dropout_rate": (dropout,), "dataset": ("cifar10", "cifar100"), **part}
            for model, dropout in (("wrn-22-2", 0.3), ("resnet18", 0.0), ("vgg16", 0.0))
            for part in (
                {"method": ALL_METHODS, "sparsity": SPARSITIES},
                {**_BLOCKS, "sparsity": SPARSITIES, "block_aware_drop": (True, False)},
            )
        ),
    },
}
