"""CIFAR-form image classifiers. Each takes its layer classes (`conv`, `dense`) as arguments, by name `create`."""

from dsb_jax.training.models.factory import MODELS as MODELS
from dsb_jax.training.models.factory import create as create
