"""How often a checkpoint answers each row of a stage's source rightly.

  python tools/annotate.py --config=configs/staged.py:qwen3_vl_8b \
    --config.model.checkpoint=DIR --stage=visual_perception --source=files \
    --config.stages.visual_perception.data.files.path=rows.parquet \
    --completions=1 --temperature=0 --output=annotated.parquet \
    --views=image,caption,none --caption_key=caption

samples completions of each row that the run would use, from its pictures
(image), with a caption in their place (caption), and with nothing there
(none), and grades them with the first of the stage's or the source's rewards.
The output has the rows' own columns, row_id, completions, and for each view
pass_rate, mean_length (tokens) and truncated (share cut off), which end in
_caption and _blind for the other two. It can be read as a source of files, or
joined to the rows as `annotations`. A killed command goes on where it was.
"""

import contextlib
import os
import sys

if __name__ == "__main__":
  sys.path[0] = os.getcwd()  # as python -m has it: configs import each other

from absl import app, flags, logging

from jaxvlm import (
  annotate,
  annotations,
  checkpoint,
  compiling,
  heap,
  hosts,
  job,
  main,
  paths,
)
from jaxvlm.display import Display, make_console

_STAGE = flags.DEFINE_string("stage", None, "A stage of the config.")
_SOURCE = flags.DEFINE_string("source", None, "One of its data entries.")
_COMPLETIONS = flags.DEFINE_integer("completions", None, "Of a row, each view.")
_OUTPUT = flags.DEFINE_string("output", None, "The .parquet file to write.")
_VIEWS = flags.DEFINE_list(
  "views", ["image"], f"Some of {', '.join(annotations.VIEWS)}."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", None, "0: the likeliest tokens. By default the stage's."
)
_CAPTION_KEY = flags.DEFINE_string(
  "caption_key", "", "The column that has the captions."
)
_CAPTION_PROMPT = flags.DEFINE_string(
  "caption_prompt", "", "What the checkpoint is asked to make captions itself."
)


def run(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f"annotate: unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  sys.unraisablehook = checkpoint.print_unraisable
  config = main.CONFIG.value.to_dict()
  heap.keep()
  main.join("annotate", config)
  del config["workdir"]
  compiling.keep(config.pop("compilation_cache"))
  output = paths.path(_OUTPUT.value)
  with hosts.together(), contextlib.ExitStack() as stack:
    display = stack.enter_context(Display(make_console()))
    try:
      if output.suffix != ".parquet" or not (
        paths.remote(output) or output.parent.is_dir()
      ):
        raise ValueError(
          f"output: got {output}; expected a .parquet file in a directory that "
          "exists."
        )
      plan = annotate.Plan(
        stage=_STAGE.value,
        source=_SOURCE.value,
        views=tuple(_VIEWS.value),
        completions=_COMPLETIONS.value,
        temperature=_TEMPERATURE.value,
        caption_key=_CAPTION_KEY.value,
        caption_prompt=_CAPTION_PROMPT.value,
      )
      config = annotate.narrowed(config, plan)
      prepared = job.prepare(config, annotate.parts_of(output), display)
      annotate.run(prepared, plan, output, display)
    except (OSError, ValueError) as error:
      sys.exit(f"annotate: {error}")


if __name__ == "__main__":
  flags.mark_flags_as_required(
    ["config", "stage", "source", "completions", "output"]
  )
  app.run(run, flags_parser=main.parse)
