"""For tests of whole runs: a user's project, and main started upon it."""

import dataclasses
import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

from jaxvlm import scratch

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session", name="project")
def project_fixture(tmp_path_factory):
  """What a user brings: checkpoint, rows, a reward and a config of their own."""
  directory = tmp_path_factory.mktemp("project")
  write_checkpoint(directory / "checkpoint")
  random = np.random.default_rng(0)
  for name, count in (("train", 24), ("held_out", 8)):
    rows = [make_row(random, i) for i in range(count)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, directory / f"{name}.parquet")
  (directory / "my_rewards.py").write_text(REWARDS)
  (directory / "config.py").write_text(CONFIG)
  return directory


@pytest.fixture(scope="session", name="launch")
def launch_fixture(tmp_path_factory, project):
  """launch(*argv, **env) starts main on the project's config; gives a Run."""
  with Launcher(tmp_path_factory.mktemp("runs"), project) as launcher:
    yield launcher


class Launcher:
  """Starts runs that share their imports and their compiled programs."""

  def __init__(self, home, project):
    self.env = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      # Compiling these programs takes longer than running them.
      "XLA_FLAGS": "--xla_backend_optimization_level=0"
      " --xla_cpu_use_fusion_emitters=false"
      " --xla_cpu_parallel_codegen_split_count=1",
    }
    script = pathlib.Path(__file__).with_name("launcher.py")
    self.command = [sys.executable, str(script)]
    self.config = f"--config={project / 'config.py'}"
    self._home = home
    self._count = itertools.count()
    self._server = subprocess.Popen(
      self.command,
      env=self.env,
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __call__(self, *argv, script="", **env):
    """Starts a run, of main or of another script that takes its flags.

    "field=value" stands for "--config.field=value".
    """
    out, err = (
      self._home / f"{next(self._count)}.{name}" for name in ("out", "err")
    )
    config = [a for a in argv if a.startswith("--config=")] or [self.config]
    argv = [
      *config,
      *(
        f"--config.{a}" if a[0] != "-" and "=" in a else a
        for a in argv
        if a not in config
      ),
    ]
    pid = self.ask(
      argv=argv, env=env, out=str(out), err=str(err), script=str(script)
    )
    return Run(self, pid, out, err)

  def ask(self, **request):
    self._server.stdin.write(json.dumps(request) + "\n")
    self._server.stdin.flush()
    return int(self._server.stdout.readline())

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._server.communicate()


@dataclasses.dataclass
class Run:
  """A process of main."""

  launcher: Launcher
  pid: int
  out_file: pathlib.Path
  err_file: pathlib.Path

  def wait(self):
    """(exit status, stdout, stderr); stdout's lines are joined by blanks."""
    status = self.launcher.ask(wait=self.pid)
    out = " ".join(self.out_file.read_text().split())
    return status, out, self.err_file.read_text()

  def until(self, condition):
    """Returns as soon as the condition holds."""
    limit = time.monotonic() + 300
    while not condition():
      state = pathlib.Path(f"/proc/{self.pid}/stat").read_text().split()[2]
      if state == "Z" or time.monotonic() > limit:
        raise AssertionError(self.err_file.read_text() or "never came")
      time.sleep(0.001)

  def kill(self):
    os.kill(self.pid, signal.SIGKILL)
    assert self.wait()[0] == -signal.SIGKILL


def make_row(random, i):
  """A row as EasyR1 has them, with a response for SFT beside the answer.

  Pictures are of two shapes, but of as many patches: few programs do.
  """
  size = ((28, 112), (56, 56))[i % 2]
  pixels = random.integers(0, 255, (*size, 3), dtype=np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return {
    "problem": "<image> which?",
    "answer": "ABCD"[i % 4],
    "images": [{"bytes": file.getvalue(), "path": None}],
    "response": f"it is {'ABCD'[i % 4]}",
  }


def write_checkpoint(directory, heads=4, layers=2):
  """A random model of 0.3 M weights with a byte tokenizer, by transformers."""
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  alphabet = sorted(byte_level.alphabet())
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
  )
  tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(list(scratch.SPECIAL_TOKENS))
  ids = {name: tokenizer.token_to_id(name) for name in scratch.SPECIAL_TOKENS}
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    chat_template=scratch.CHAT_TEMPLATE,
  ).save_pretrained(directory)
  (directory / "preprocessor_config.json").write_text(
    json.dumps(
      {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 28 * 28,
        "max_pixels": 112 * 112,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
      }
    )
  )
  torch.manual_seed(0)
  model = transformers.Qwen2_5_VLForConditionalGeneration(
    transformers.Qwen2_5_VLConfig(
      text_config={
        "vocab_size": 272,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "rope_parameters": {
          "rope_type": "default",
          "rope_theta": 1e4,
          "mrope_section": {4: [2, 3, 3], 8: [1, 1, 2]}[heads],
        },
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
      },
      vision_config={
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 112,
      },
      image_token_id=ids["<|image_pad|>"],
      video_token_id=ids["<|video_pad|>"],
      vision_start_token_id=ids["<|vision_start|>"],
      vision_end_token_id=ids["<|vision_end|>"],
      tie_word_embeddings=True,
    )
  )
  model.generation_config.eos_token_id = [
    ids["<|im_end|>"],
    ids["<|endoftext|>"],
  ]
  model.save_pretrained(directory)


# A source of rows that gets a SIGTERM on the last host, and is slow on all.
STOPPING = """
import os, signal, time
import jax

def source(**_):
  if jax.process_index() == jax.process_count() - 1:
    os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(100)
"""

# Something to learn for a random model: bytes that sum to few modulo 5.
REWARDS = """
def score(completion, example):
  return sum(completion.encode()) % 5 / 4
"""

# Small enough for the shapes of all stages to be few, and with all at play
# that a resumed run must find again.
CONFIG = """
import pathlib

from configs import common, presets

HERE = pathlib.Path(__file__).parent
REWARD = f"{HERE}/my_rewards.py:score"


def get_config(arm=""):
  config = common.base(
    workdir=f"{HERE}/run", schedule=("warm", "perceive", "reason")
  )
  config.model.checkpoint = f"{HERE}/checkpoint"
  config.rewards.num_workers = 1
  config.checkpoint.every = 2
  config.log.update({"samples_every": 2, "samples": 2})
  held_out = {"reward": REWARD, "data": rows("held_out")}
  config.evaluation.update({
    "every": 2,
    "capabilities": ("perceive",),
    "sets": {"perceive": held_out},
    "batch_questions": 8,
    "num_completions": 2,
    "max_completion_length": 6,
  })
  shared = {
    "rollout_questions": 8,
    "update_questions": 8,
    "updates_per_rollout": 1,
    "microbatch_tokens": 2048,
    "num_completions": 4,
    "max_completion_length": 6,
    "learning_rate": 3e-3,
    "logprob_chunk": 32,
    "metric": "perceive/mean@2",
  }
  config.stages.warm = common.stage(**shared | {
    "kind": "sft",
    "data": {"rows": rows("train", response_key="response")},
    "steps": 2,
    "max_completion_length": 12,
  })
  shared |= {
    "data": {"rows": rows("train")},
    "rewards": ((REWARD, 0.9), ("format", 0.1)),
  }
  config.stages.perceive = common.stage(**shared | {
    "steps": 5,
    "updates_per_rollout": 2,
    "reference": "stage_start",
    "promote": "best",
  })
  config.stages.reason = common.stage(**shared | {
    "steps": 4,
    "microbatch_tokens": 64,
    "reference": "base",
    "reset_optimizer": False,
  })
  if arm == "presets":
    config.schedule = tuple(presets.PRESETS)
    for name in presets.PRESETS:
      config.stages[name] = common.stage(
        **shared | presets.method(name) | {"steps": 1}
      )
  return config


def rows(name, **fields):
  return common.data("files", path=f"{HERE}/{name}.parquet", **fields)
"""
