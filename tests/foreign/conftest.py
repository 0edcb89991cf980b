"""Models of other code bases, with random weights: code that nobody here wrote. Two CPU devices, for `pmap`.

They need the extra `foreign`, so pytest finds these tests only when it is given their folder: `make test-foreign`.
"""

import os

import jax

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its Flax models are deprecated, and each says so
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "allow")  # which our own code does without
