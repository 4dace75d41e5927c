"""Writing to the cache."""

import jax.numpy as jnp
import numpy as np

from jaxvlm.nn import kv_cache
from jaxvlm.nn.kv_cache import KVCache


def test_a_token_lands_in_its_column_and_nowhere_else():
  cache = kv_cache.empty((2, 3, 5, 1, 4), "bfloat16")
  ones = jnp.ones((2, 3, 1, 4), jnp.float32)
  cache = kv_cache.write(cache, KVCache(keys=ones, values=2 * ones), 3)
  expected = np.zeros((2, 3, 5, 1, 4))
  expected[:, :, 3] = 1
  np.testing.assert_array_equal(cache.keys, expected)
  np.testing.assert_array_equal(cache.values, 2 * expected)
  assert cache.keys.dtype == jnp.bfloat16
