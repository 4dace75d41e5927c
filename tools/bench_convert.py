"""Memory and speed of tools/convert_hf.py on a checkpoint of a published size.

  python tools/bench_convert.py --size=qwen2_5_vl_3b --dir=/tmp/bench

Writes random weights of the size in bfloat16 (7.5 GB for 3b) to --dir, converts
them there and back in processes of their own, and copies the same files with
cp. Prints a JSON line: seconds (median of --repeats), the ratio to cp, and the
peak resident memory beyond what the process has when it has imported all.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from jaxvlm import models
from jaxvlm.nn import hf
from jaxvlm.nn.hf import Weight

TOOL = pathlib.Path(__file__).with_name("convert_hf.py")

# Runs convert_hf.py in its own process and says what memory it came to, in kB.
PROBE = """
import pathlib, re, sys
sys.path.insert(0, sys.argv[1].rpartition('/')[0])
import convert_hf

def status(field):
  text = pathlib.Path('/proc/self/status').read_text()
  return re.search(field + r':\\s+(\\d+) kB', text)[1]

start = status('VmRSS')
convert_hf.main(sys.argv[2:])
print('MEMORY', start, status('VmHWM'))
"""


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", default="qwen2_5_vl_3b")
  parser.add_argument("--dir", type=pathlib.Path, required=True)
  parser.add_argument("--repeats", type=int, default=3)
  given = parser.parse_args()
  source = given.dir / given.size
  if not source.exists():
    make(given.size, source)
  size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
  orbax, back, copied = (given.dir / name for name in ("orbax", "hf", "copy"))
  seconds: dict[str, list[float]] = {"cp": [], "to-orbax": [], "to-hf": []}
  memory: dict[str, float] = {}
  for _ in range(given.repeats):
    for path in (orbax, back, copied):
      shutil.rmtree(path, ignore_errors=True)
    seconds["cp"].append(copy(source, copied))
    for command, first, second in (
      ("to-orbax", source, orbax),
      ("to-hf", orbax, back),
    ):
      taken, peak = convert(command, first, second)
      seconds[command].append(taken)
      memory[command] = max(peak, memory.get(command, 0.0))
    check(source, back)
  median = {name: statistics.median(taken) for name, taken in seconds.items()}
  record = {
    "size": given.size,
    "gigabytes": size / 1e9,
    "seconds": median,
    "ratio_to_cp": {name: median[name] / median["cp"] for name in memory},
    "peak_gigabytes_beyond_start": memory,
    "repeats": given.repeats,
  }
  print(json.dumps(record))


def make(size: str, directory: pathlib.Path) -> None:
  """A Hugging Face directory of random bfloat16 weights."""
  network = models.Network(
    config=models.find_size(size),
    dtype="bfloat16",
    param_dtype="bfloat16",
    remat="none",
    attention="plain",
  )
  rng = np.random.default_rng(0)

  def draw(weight: Weight) -> object:
    if not weight.stacked:
      return 0.02 * rng.standard_normal(weight.layer_shape, np.float32)
    return (
      0.02 * rng.standard_normal(weight.layer_shape, np.float32)
      for _ in weight.names
    )

  directory.mkdir(parents=True)
  raw = {**network.config.to_hf(), "dtype": "bfloat16"}
  (directory / "config.json").write_text(json.dumps(raw))
  hf.write(
    models.weights(network),
    directory,
    dtype="bfloat16",
    rename=models.hub_name(network),
    fetch=draw,
    progress=lambda count: None,
  )


def copy(source: pathlib.Path, destination: pathlib.Path) -> float:
  started = time.monotonic()
  subprocess.run(["cp", "-r", source, destination], check=True)
  subprocess.run(["sync"], check=True)
  return time.monotonic() - started


def convert(
  command: str, source: pathlib.Path, destination: pathlib.Path
) -> tuple[float, float]:
  """Seconds, and gigabytes beyond the process's start."""
  started = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", PROBE, TOOL, command, source, destination],
    check=True,
    capture_output=True,
    text=True,
  )
  subprocess.run(["sync"], check=True)
  taken = time.monotonic() - started
  start, peak = map(int, done.stdout.rsplit("MEMORY", 1)[1].split())
  return taken, (peak - start) * 1024 / 1e9


def check(source: pathlib.Path, back: pathlib.Path) -> None:
  for file in source.glob("*.safetensors"):
    subprocess.run(["cmp", file, back / file.name], check=True)


if __name__ == "__main__":
  main()
