"""Two completions whose losses EasyR1's, verl's and TRL's formulas gave."""

import jax.numpy as jnp

OLD = jnp.array([[[-1, -2, -0.5, -3]], [[-0.7, -1.2, -2.2, 0]]])
NEW = jnp.array([[[-0.6, -2.3, -0.45, -1]], [[-0.9, -0.5, -1.9, 0]]])
REF = jnp.array([[[-1.1, -1.8, -0.6, -3.5]], [[-0.8, -1, -2.5, 0]]])
MASK = jnp.array([[[1, 1, 1, 1]], [[1, 1, 1, 0]]], bool)
GOOD_BAD = jnp.array([[1.0], [-0.5]])
BAD_GOOD = jnp.array([[-1.0], [0.5]])
