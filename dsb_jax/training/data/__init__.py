"""Image-classification sets as uint8 arrays, and jit-able batches of them."""

from dsb_jax.training.data.batches import Augmentation as Augmentation
from dsb_jax.training.data.batches import epoch_order as epoch_order
from dsb_jax.training.data.batches import eval_batches as eval_batches
from dsb_jax.training.data.batches import normalize as normalize
from dsb_jax.training.data.batches import take_batch as take_batch
from dsb_jax.training.data.datasets import Dataset as Dataset
from dsb_jax.training.data.datasets import load as load
