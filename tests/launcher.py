"""Runs `python -m jaxvlm.main` again and again, its imports made once.

A server on stdin and stdout: each line in is a JSON object, each line out a
number. {"argv": [...], "env": {...}, "out": file, "err": file, "script": ""}
forks a process that runs the module, or the script, and answers its pid;
{"wait": pid} answers its exit status (negative: the signal that killed it).
With arguments it is no server, but one run of the module with these. Either way neither torch nor torchvision
can be imported, as on a machine where PyTorch is not installed.
"""

import gc
import importlib
import importlib.machinery
import json
import os
import runpy
import sys

# What main imports, be it late; not main, which defines its flags once only.
_IMPORTS = (
  "absl.app",
  "ml_collections.config_flags",
  "pandas",
  "pyarrow.compute",
  "pyarrow.parquet",
  "transformers.models.auto.tokenization_auto",
  "jaxvlm.data.sources.files",
  "jaxvlm.display",
  "jaxvlm.models.qwen2_5_vl",
  "jaxvlm.train",
)


def hide(*packages: str) -> None:
  finder = importlib.machinery.PathFinder
  find_spec = finder.find_spec

  def find(name, *arguments):
    hidden = name.partition(".")[0] in packages
    return None if hidden else find_spec(name, *arguments)

  finder.find_spec = find  # type: ignore


def serve() -> str | None:
  """Answers until stdin ends; in a run that is to begin, its script."""
  while line := sys.stdin.readline():
    request = json.loads(line)
    if "wait" in request:
      _, status = os.waitpid(request["wait"], 0)
      answer = os.waitstatus_to_exitcode(status)
    else:
      answer = os.fork()
      if not answer:
        become(**request)
        return request["script"]
    print(answer, flush=True)
  return None


def become(
  argv: list[str], env: dict[str, str], out: str, err: str, script: str
) -> None:
  """Takes on what the process of a run would have been started with."""
  for name, descriptor in ((out, 1), (err, 2)):
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, descriptor)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.environ.update(env)
  sys.argv = [script or "jaxvlm.main", *argv]


def main() -> None:
  hide("torch", "torchvision")
  script: str | None = ""
  if len(sys.argv) == 1:
    # As main does.
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    for module in _IMPORTS:
      importlib.import_module(module)
    # A run's garbage is small; looking for it took a tenth of its seconds.
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    script = serve()
  if script:
    runpy.run_path(script, run_name="__main__")
  elif script is not None:
    runpy.run_module("jaxvlm.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
