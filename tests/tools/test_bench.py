"""Each work runs on a folder of arrays and weights, and says what it did."""

import json
import sys
import types

import jax
import numpy as np
import pytest
import torch
import transformers

from configs import common
from jaxvlm import compiling, models
from tools import bench, machine, operations

SIDE, GROUP, LENGTH = 56, 2, 4  # pixels, completions, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two checkpoints by transformers, and inputs for them."""
  directory = tmp_path_factory.mktemp("work")
  size = 64
  ids = {
    "image_token_id": size - 8,
    "video_token_id": size - 7,
    "vision_start_token_id": size - 6,
    "vision_end_token_id": size - 5,
  }
  config = transformers.Qwen2_5_VLConfig(
    text_config={
      "vocab_size": size,
      "hidden_size": 32,
      "intermediate_size": 48,
      "num_hidden_layers": 1,
      "num_attention_heads": 2,
      "num_key_value_heads": 1,
      "max_position_embeddings": 128,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 3, 3],
      },
      "eos_token_id": size - 4,
      "pad_token_id": size - 3,
      "bos_token_id": size - 4,
    },
    vision_config={
      "depth": 1,
      "hidden_size": 32,
      "intermediate_size": 48,
      "num_heads": 2,
      "out_hidden_size": 32,
      "window_size": 56,
      "fullatt_block_indexes": [0],
    },
    tie_word_embeddings=True,
    **ids,
  )
  for seed, name in enumerate(("policy", "ref")):
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(directory / "small" / name)
    if name == "policy":
      policy = model
  np.savez(directory / "small/inputs.npz", **inputs(policy, ids))
  return directory


def inputs(policy, ids):
  random = np.random.default_rng(0)
  text = random.integers(0, 40, (2, 10))
  pictures = random.integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
  processor = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28)
  made = processor(list(pictures), return_tensors="np")
  shown = np.full((2, 4), ids["image_token_id"])
  around = [
    np.full((2, 1), ids[f"vision_{end}_token_id"]) for end in ("start", "end")
  ]
  prompts = np.concatenate(
    [text[:, :8], around[0], shown, around[1], text[:, 8:]], axis=1
  )
  completions = random.integers(0, 40, (2 * GROUP, LENGTH))
  whole = torch.tensor(
    np.concatenate([prompts.repeat(GROUP, 0), completions], axis=1)
  )
  pixels = torch.tensor(made["pixel_values"]).reshape(2, 16, -1)
  with torch.no_grad():
    logits = policy(
      input_ids=whole,
      pixel_values=pixels.repeat_interleave(GROUP, 0).flatten(0, 1),
      image_grid_thw=torch.tensor(made["image_grid_thw"]).repeat_interleave(
        GROUP, 0
      ),
      mm_token_type_ids=(whole == ids["image_token_id"]).long(),
    ).logits
  scores = torch.log_softmax(logits[:, -LENGTH - 1 : -1].float(), -1)
  chosen = scores.gather(-1, whole[:, -LENGTH:, None])[..., 0].numpy()
  return {
    "B": 2,
    "G": GROUP,
    "R": LENGTH,
    "prompts": prompts,
    "pixels": made["pixel_values"],
    "grid": made["image_grid_thw"],
    "completions": completions,
    "advantages": np.array([1.0, -1, 0.5, -0.5], np.float32),
    "old_logps": chosen - 0.1,
    "policy_logps": chosen,
    "lengths": np.array([1, 4, 2, 3]),
    "images": pictures,
    "text": text,
    "v_pixels": made["pixel_values"],
    "v_grid": made["image_grid_thw"],
  }


@pytest.fixture
def run(folder, monkeypatch, capsys):
  monkeypatch.setattr(machine, "SECONDS", 0.001)
  monkeypatch.setattr(machine, "ARRAY", 1 << 16)

  def one(work, *more):
    flags = (f"--work={work}", f"--work-dir={folder}", "--reps=2", "--wait=0")
    monkeypatch.setattr(sys, "argv", ["bench", "--model=small", *flags, *more])
    bench.main()
    return json.loads(capsys.readouterr().out)

  return one


@pytest.mark.parametrize("work", sorted(bench.METRICS))
def test_every_work_is_done_and_checked(run, work):
  line = run(work, "--compilation_cache=")
  assert line["metric"] == bench.METRICS[work]
  assert line["median"] > 0 and line["n"] >= 2
  check = line["check"]
  if work in ("W1", "W2"):
    assert check["max_abs_logp_err"] < 1e-4
    assert check["max_abs_sampler_gap"] < 1e-4
  if work == "W3":
    # Ratios of exp(0.1) clip neither side: the mean of -A r is 0.
    assert abs(check["loss1"] - 0.01 * check["kl1"]) < 1e-5
    assert check["grad_norm1"] > 0 != check["loss2"] - check["loss1"]
  if work == "W5":
    assert check["shape"] == [8, 32]


def test_the_share_of_what_the_machine_could_is_told(run, folder, monkeypatch):
  monkeypatch.setattr(machine, "matmul_rate", lambda products, dtype: 1e9)
  monkeypatch.setattr(machine, "bandwidth", lambda: 1e8)
  line = run("W3", "--compilation_cache=", "--microbatch_tokens=64")
  network = models.load_network(
    folder / "small/policy",
    dtype="float32",
    param_dtype="float32",
    remat="none",
    attention="plain",
  )
  arrays = np.load(folder / "small/inputs.npz")
  need = operations.of_work("W3", network, arrays, at_once=64)
  assert (line["flops"], line["bytes"]) == (need.flops, need.bytes)
  assert line["matmul_gflops"] == 1 and line["bandwidth_gb_s"] == 0.1
  limit = max(need.flops / 1e9, need.bytes / 1e8)
  assert line["limit_s"] == pytest.approx(limit, abs=1e-6)
  share = limit / np.median(line["walls_s"])
  assert line["share"] == pytest.approx(share, rel=0.02, abs=1e-4)


def test_the_machine_is_measured_again_where_others_were_busy(run, monkeypatch):
  rates, shares = iter([1e9, 3e9]), iter([0.0, 0.0, 0.5, 0.0])
  monkeypatch.setattr(machine, "matmul_rate", lambda *_: next(rates))
  monkeypatch.setattr(bench, "lap", lambda since: (1.0, next(shares)))
  line = run("W5", "--compilation_cache=")
  assert line["matmul_gflops"] == 3.0
  assert line["limit_other_cpu"] == 0.0


def test_the_machine_is_measured_after_all_that_is_told(run, monkeypatch):
  """Its arrays and programs are no part of a run's memory and programs."""
  told = []
  for module, name in (
    (bench, "timed"),
    (bench.resource, "getrusage"),
    (compiling, "tally"),
    (machine, "matmul_rate"),
    (machine, "bandwidth"),
  ):
    call = getattr(module, name)
    monkeypatch.setattr(
      *(module, name),
      lambda *args, call=call, name=name, **named: (
        told.append(name) or call(*args, **named)
      ),
    )
  run("W5", "--compilation_cache=")
  # The last two again, where others were busy.
  assert told[:5] == [
    *("timed", "getrusage", "tally"),
    *("matmul_rate", "bandwidth"),
  ]
  assert set(told[5:]) <= {"matmul_rate", "bandwidth"}


def test_a_devices_own_memory_is_told_where_it_says():
  stats = {"peak_bytes_in_use": 3 * 2**20}
  gpu = types.SimpleNamespace(memory_stats=lambda: stats)
  assert bench.device_memory(gpu) == {"peak_device_mb": 3.0}
  assert bench.device_memory(jax.devices("cpu")[0]) == {}


def test_programs_are_kept_where_runs_keep_them(run, monkeypatch):
  kept = []
  monkeypatch.setattr(compiling, "keep", kept.append)
  tally = compiling.Tally(programs=7, cached=3, seconds=1.234)
  monkeypatch.setattr(compiling, "tally", lambda: tally)
  line = run("W5")
  assert (line["compiled"], line["cached"], line["compile_s"]) == (4, 3, 1.23)
  run("W5", "--compilation_cache=elsewhere")
  assert kept == [common.base().compilation_cache, "elsewhere"]


def test_remat_is_the_networks(run, monkeypatch):
  asked, load = [], models.load_network
  monkeypatch.setattr(compiling, "keep", lambda directory: None)
  monkeypatch.setattr(
    models,
    "load_network",
    lambda *args, **how: asked.append(how["remat"]) or load(*args, **how),
  )
  lines = [run("W5"), run("W5", "--remat=full")]
  assert asked == [line["remat"] for line in lines] == ["dots", "full"]


def test_a_folder_without_inputs_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(
    sys,
    "argv",
    ["bench", "--model=x", "--work=W1", f"--work-dir={tmp_path}"],
  )
  with pytest.raises(SystemExit, match=r"x has no inputs\.npz"):
    bench.main()
