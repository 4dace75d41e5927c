"""Writing to the cache."""

import jax.numpy as jnp
import numpy as np

from jaxvlm.nn import kv_cache
from jaxvlm.nn.kv_cache import KVCache


def test_a_token_lands_in_its_column_and_nowhere_else():
  cache = kv_cache.empty((2, 2, 3, 5, 4), "bfloat16")
  new = np.arange(1, 13, dtype=np.float32).reshape(2, 3, 2, 1)
  new = np.broadcast_to(new, (2, 3, 2, 4))
  cache = kv_cache.write(cache, KVCache(keys=new, values=2 * new), 3)
  expected = np.zeros((2, 2, 3, 5, 4))
  expected[:, :, :, 3] = new.swapaxes(1, 2)
  np.testing.assert_array_equal(cache.keys, expected)
  np.testing.assert_array_equal(cache.values, 2 * expected)
  assert cache.keys.dtype == jnp.bfloat16
