"""CIFAR-form image classifiers and a language model, by `create`; the layer classes are arguments."""

from dsb_jax.training.models.factory import MODELS as MODELS
from dsb_jax.training.models.factory import create as create
from dsb_jax.training.models.factory import takes_text as takes_text
