"""checkpoint.py: what a kill, a full disk and bit rot leave is whole."""

import logging
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvlm import checkpoint
from jaxvlm.checkpoint import Checkpointer, load_params, save_params

ROOT = pathlib.Path(__file__).parents[1]


def make_state(seed):
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
  split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
  weight = jax.random.normal(jax.random.key(seed), (16, 8))
  params = {
    "kernel": jax.device_put(weight, split),
    "scale": jnp.full(3, 0.1 * seed, jnp.bfloat16),
  }
  return {"params": params, "opt_state": optax.adamw(1e-3).init(params)}


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )


def like(progress):
  del progress
  return abstract(make_state(0))


def fill(directory, scores, **keep):
  with Checkpointer(directory, **keep) as checkpointer:
    for step, score in enumerate(scores, start=1):
      checkpointer.save(
        step,
        make_state(step),
        loader={"next": step},
        progress={"step": step},
        host=b"",
        score=score,
      )


def kept(directory):
  return sorted(
    int(path.name) for path in directory.iterdir() if path.name.isdigit()
  )


def assert_is(restored, step):
  assert restored.step == step
  assert restored.loader == {"next": step}
  assert restored.progress == {"step": step}
  jax.tree.map(np.testing.assert_array_equal, restored.state, make_state(step))


def test_what_is_saved_comes_back_bit_for_bit_where_it_was(tmp_path):
  state = make_state(1)
  ledger = {"loss": 0.1 + 0.2, "stage": "a", "none": None, "tuple": (1, 2)}
  with Checkpointer(tmp_path / "c", keep_last=1, keep_best=0) as checkpointer:
    assert checkpointer.restore(like) is None
    checkpointer.save(
      7, state, loader={"at": 3}, progress=ledger, host=b"a\0b", score=None
    )
  with Checkpointer(tmp_path / "c", keep_last=1, keep_best=0) as checkpointer:
    restored = checkpointer.restore(lambda progress: abstract(state))
  assert restored.step == 7
  assert restored.loader == {"at": 3}
  assert restored.progress == ledger | {"tuple": [1, 2]}
  assert restored.host == b"a\0b"
  assert jax.tree.structure(restored.state) == jax.tree.structure(state)
  for got, expected in zip(
    jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True
  ):
    assert got.dtype == expected.dtype
    assert got.sharding == expected.sharding
    np.testing.assert_array_equal(got, expected)


def test_of_another_number_of_hosts_none_has_its_own(tmp_path, monkeypatch):
  with Checkpointer(tmp_path, keep_last=1, keep_best=0) as checkpointer:
    checkpointer.save(
      1, make_state(1), loader={}, progress={}, host=b"own", score=None
    )
    assert checkpointer.restore(like).host == b"own"
    monkeypatch.setattr(checkpoint, "_host_file", lambda home: home / "0-of-2")
    assert checkpointer.restore(like).host == b""


def test_the_shape_of_the_state_may_depend_on_the_progress(tmp_path):
  def by_width(progress):
    return {"x": jax.ShapeDtypeStruct((progress["width"],), jnp.float32)}

  with Checkpointer(tmp_path, keep_last=1, keep_best=0) as checkpointer:
    checkpointer.save(
      1,
      {"x": jnp.ones(5)},
      loader={},
      progress={"width": 5},
      host=b"",
      score=None,
    )
    assert checkpointer.restore(by_width).state["x"].shape == (5,)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
  grow = jax.jit(lambda x: x + 1.0, donate_argnums=0)
  x = jnp.zeros((512, 1024))
  with Checkpointer(tmp_path, keep_last=4, keep_best=0) as checkpointer:
    for step in range(1, 4):
      x = grow(x)
      checkpointer.save(
        step, {"x": x}, loader={}, progress={}, host=b"", score=step
      )
      for _ in range(3):
        x = grow(x)
    found = checkpointer.restore(lambda _: abstract({"x": x}))
  np.testing.assert_array_equal(found.state["x"], np.full((512, 1024), 9.0))


def test_the_last_and_the_best_are_kept_beside_each_other(tmp_path):
  scores = [0.3, 0.9, 0.5, None, 0.1, None]
  fill(tmp_path, scores, keep_last=2, keep_best=2)
  assert kept(tmp_path) == [2, 3, 5, 6]
  with Checkpointer(tmp_path, keep_last=2, keep_best=2) as checkpointer:
    assert_is(checkpointer.restore(like), 6)
    for step, score in ((7, 0.9), (8, 0.2)):  # scores outlive the process
      checkpointer.save(
        step,
        make_state(step),
        loader={"next": step},
        progress={"step": step},
        host=b"",
        score=score,
      )
  assert kept(tmp_path) == [2, 7, 8]


def test_without_scores_there_is_no_best(tmp_path):
  fill(tmp_path, [None, None, None], keep_last=1, keep_best=1)
  assert kept(tmp_path) == [3]


def damage(path, how):
  content = path.read_bytes()
  if how == "missing":
    path.unlink()
  elif how == "truncated":
    path.write_bytes(content[: len(content) // 2])
  else:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(bytes(flipped))


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize(
  "what", ["state", "loader", "progress", "host", "seal.json"]
)
def test_a_damaged_newest_falls_back_to_the_last_good(
  tmp_path, caplog, what, how
):
  fill(tmp_path, [None, None], keep_last=2, keep_best=0)
  newest = tmp_path / "2" / what
  files = [newest] if newest.is_file() else newest.rglob("*")
  largest = max(
    (file for file in files if file.is_file()),
    key=lambda file: file.stat().st_size,
  )
  damage(largest, how)
  caplog.set_level(logging.WARNING)
  with Checkpointer(tmp_path, keep_last=2, keep_best=0) as checkpointer:
    assert_is(checkpointer.restore(like), 1)
    assert "step 2 is unreadable" in caplog.text
    if (what, how) != ("seal.json", "flipped"):  # then another seems damaged
      assert largest.name in caplog.text
    assert "Going on from the checkpoint of step 1" in caplog.text
    checkpointer.save(
      2,
      make_state(2),
      loader={"next": 2},
      progress={"step": 2},
      host=b"",
      score=None,
    )
    checkpointer.wait()
    assert_is(checkpointer.restore(like), 2)
  assert (tmp_path / "unreadable" / "2.0").is_dir()


def test_a_missing_item_falls_back_to_the_last_good(tmp_path):
  fill(tmp_path, [None, None], keep_last=2, keep_best=0)
  for file in (tmp_path / "2" / "loader").iterdir():
    file.unlink()
  (tmp_path / "2" / "loader").rmdir()
  with Checkpointer(tmp_path, keep_last=2, keep_best=0) as checkpointer:
    assert_is(checkpointer.restore(like), 1)


def test_when_all_are_damaged_nothing_begins_anew_in_silence(tmp_path):
  fill(tmp_path, [None, None], keep_last=2, keep_best=0)
  for step in "12":
    (tmp_path / step / "seal.json").unlink()
  with (
    Checkpointer(tmp_path, keep_last=2, keep_best=0) as checkpointer,
    pytest.raises(ValueError, match="no checkpoint can be read"),
  ):
    checkpointer.restore(like)


@pytest.mark.parametrize(
  "other",
  [
    {"x": jax.ShapeDtypeStruct((4,), jnp.float32)},
    {"y": jax.ShapeDtypeStruct((3,), jnp.float32)},
  ],
)
def test_a_whole_checkpoint_of_another_model_is_refused(tmp_path, other):
  with Checkpointer(tmp_path, keep_last=2, keep_best=0) as checkpointer:
    for step in (1, 2):
      checkpointer.save(
        step, {"x": jnp.ones(3)}, loader={}, progress={}, host=b"", score=None
      )
    checkpointer.wait()
    with pytest.raises(ValueError, match="step 2 is whole, but holds another"):
      checkpointer.restore(lambda _: other)


def test_steps_only_grow(tmp_path):
  fill(tmp_path, [None, None], keep_last=1, keep_best=0)
  with (
    Checkpointer(tmp_path, keep_last=1, keep_best=0) as checkpointer,
    pytest.raises(ValueError, match="step 2 comes after step 2"),
  ):
    checkpointer.save(
      2, make_state(2), loader={}, progress={}, host=b"", score=None
    )


def test_something_is_always_kept(tmp_path):
  with pytest.raises(ValueError, match="at least the last"):
    Checkpointer(tmp_path, keep_last=0, keep_best=1)


def run(script, *arguments, wait=True):
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  return process.communicate(timeout=120) if wait else process


SAVES = """
  import sys, time
  import jax.numpy as jnp
  from jaxvlm.checkpoint import Checkpointer

  if sys.argv[2] == "sealing":  # stops with all written, and not renamed
    seal = Checkpointer._seal

    def stop(self):
      seal(self)
      if self._step == 2:
        print("sealing", flush=True)
        time.sleep(600)

    Checkpointer._seal = stop

  checkpointer = Checkpointer(sys.argv[1], keep_last=2, keep_best=0)
  for step in range(1, 1000):
    x = jnp.full((2000, 1000), float(step))
    checkpointer.save(
      step, {"x": x}, loader={"next": step}, progress={}, host=b"", score=None
    )
    print(step, flush=True)
"""


@pytest.mark.parametrize("moment", ["sealing", "7"])
def test_a_kill_while_saving_leaves_the_last_one_whole(
  tmp_path, moment, caplog
):
  process = run(SAVES, tmp_path, moment, wait=False)
  with process:
    while process.stdout.readline().strip() != moment:
      assert process.poll() is None
    time.sleep(0.005)  # into the background write
    process.send_signal(signal.SIGKILL)
  abandoned = list(tmp_path.glob("*tmp*"))
  if moment == "sealing":
    assert len(abandoned) == 1

  shape = {"x": jax.ShapeDtypeStruct((2000, 1000), jnp.float32)}
  with Checkpointer(tmp_path, keep_last=2, keep_best=0) as checkpointer:
    restored = checkpointer.restore(lambda _: shape)
    least = 1 if moment == "sealing" else 6
    assert least <= restored.step <= least + 2
    assert restored.loader == {"next": restored.step}
    np.testing.assert_array_equal(restored.state["x"], float(restored.step))
    step = restored.step + 1
    checkpointer.save(
      step, restored.state, loader={}, progress={}, host=b"", score=None
    )
    checkpointer.wait()
    assert checkpointer.restore(lambda _: shape).step == step
  assert not list(tmp_path.glob("*tmp*"))
  assert caplog.text == ""


FULL = """
  import resource, sys
  import jax, jax.numpy as jnp
  from jaxvlm.checkpoint import Checkpointer, save_params

  small, big = {"x": jnp.ones(3)}, {"x": jax.random.normal(
    jax.random.key(0), (100_000,))}
  save_params(sys.argv[1] + "/params", small)
  with Checkpointer(sys.argv[1] + "/c", keep_last=1, keep_best=0) as keep:
    keep.save(1, small, loader={}, progress={}, host=b"", score=None)
    keep.wait()
    # As a full disk does, this fails the write itself.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
      save_params(sys.argv[1] + "/other", big)
    except OSError as error:
      print(error)
    keep.save(2, big, loader={}, progress={}, host=b"", score=None)
    keep.wait()
"""


def test_a_full_disk_is_one_clear_error_with_the_last_one_whole(tmp_path):
  out, err = run(FULL, tmp_path)
  assert f"{tmp_path}/other: cannot be written" in out
  last = err.strip().splitlines()[-1]
  assert last.startswith("OSError")
  assert "a checkpoint cannot be written" in last
  assert "That of step 1 is whole. Make room" in last
  assert err.count("\nOSError") == 1
  assert "ERROR" not in err
  shape = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
  with Checkpointer(tmp_path / "c", keep_last=1, keep_best=0) as checkpointer:
    assert checkpointer.restore(lambda _: shape).step == 1
  assert not (tmp_path / "other").exists()


def test_an_error_of_the_write_is_reported_once(tmp_path, monkeypatch):
  def full(self):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Checkpointer, "_seal", full)
  checkpointer = Checkpointer(tmp_path, keep_last=1, keep_best=0)
  checkpointer.save(
    1, make_state(1), loader={}, progress={}, host=b"", score=None
  )
  with pytest.raises(OSError, match=r"No space left.*run the same command"):
    checkpointer.wait()
  checkpointer.close()
  assert kept(tmp_path) == []


def test_saved_params_come_back_and_are_replaced(tmp_path):
  path = tmp_path / "deep" / "params"
  (tmp_path / "deep" / "params.orbax-checkpoint-tmp").mkdir(parents=True)
  for seed in (1, 2):
    params = make_state(seed)["params"]
    save_params(path, params)
    loaded = load_params(path, abstract(params))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert loaded["kernel"].sharding == params["kernel"].sharding
  assert [file.name for file in path.parent.iterdir()] == ["params"]


def test_missing_and_other_params_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no such saved parameters"):
    load_params(tmp_path / "absent", {"x": jnp.ones(3)})
  save_params(tmp_path / "params", {"x": jnp.ones(3)})
  with pytest.raises(ValueError, match="cannot be read"):
    load_params(tmp_path / "params", {"x": jnp.ones(4)})
  with pytest.raises(ValueError, match="cannot be read"):
    load_params(tmp_path / "params", {"y": jnp.ones(3)})
