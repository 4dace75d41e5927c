"""What every arm shares: the fields of a config, and of a stage."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import presets


def base(**overrides: object) -> ConfigDict:
  """A run without stages; `overrides` are top-level fields."""
  config = ConfigDict(
    {
      "seed": 0,
      "workdir": "runs/jaxvlm",
      # Compiled programs, for later starts; "": none are kept. The environment's
      # JAX_COMPILATION_CACHE_DIR comes first.
      "compilation_cache": "~/.cache/jaxvlm",
      # Devices along each mesh axis; -1 takes what the others leave.
      # The data axis goes over all slices (of a multi-slice TPU pod; -1: found).
      "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "slices": -1},
      "model": {
        # A Hugging Face directory; "": make one as `scratch` says.
        "checkpoint": "",
        "scratch": None,
        "dtype": "float32",  # of activations
        "param_dtype": "float32",  # of weights
        # none | dots | offload | full: the backward pass computes again nothing,
        # all but products with weights (offload: kept in the host's memory), all
        # but what passes between layers.
        "remat": "none",
        # plain | fused: kernels for GPU and TPU | auto: fused where there are.
        "attention": "auto",
      },
      "inputs": {
        "max_prompt_length": 2048,  # tokens; longer rows are dropped, counted
        # Pixels of a picture after resizing; None: as the checkpoint says.
        "min_pixels": placeholder(int),
        "max_pixels": placeholder(int),
        "prompt_suffix": "",  # ends every user turn
        "system_prompt": placeholder(str),  # None: as the chat template has it
      },
      # Completions that decode at once, over all devices, while other questions
      # wait; 0: all of a rollout.
      "sampler": {"slots": 0},
      "rewards": {"num_workers": 2, "timeout": 10.0},  # processes, seconds
      "limits": {
        "skipped_updates": 5,  # updates with a non-finite gradient, in a stage
        "programs": 50,  # shapes that a program of a stage is compiled for
        "failed_groups": 100,  # groups whose reward failed, in a stage
        # Steps between checks that a question's completions are less or more
        # likely with another's pictures; 0: never.
        "blind_every": 50,
        # Seconds that hosts wait for one another, as for one whose rewards or
        # rows are slow, before all end.
        "host_wait": 600.0,
        # Seconds without a sign of life after which a host is given up as killed,
        # and all end.
        "heartbeat": 100.0,
      },
      "checkpoint": {
        "every": 20,
        "keep_last": 2,
        "keep_best": 1,
        "export_stages": False,  # a HF directory after each stage, hf_STAGE
      },
      "log": {
        "samples_every": 10,  # steps; 0: none
        "samples": 4,
        "tensorboard": True,
        "wandb_project": placeholder(str),
      },
      "evaluation": {
        "every": 0,  # steps within a stage; 0: at its end alone
        "capabilities": (),  # names of sets, in the order of the table
        "sets": {},
        "batch_questions": 64,
        "num_completions": 8,
        "max_completion_length": 2048,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
      },
      # Order is here alone: a config's fields are sorted by name.
      "schedule": (),
      # Stages in a row that share one learning-rate schedule and optimizer
      # state, so that an order is compared without its restarts.
      "hold_schedule": (),
      # What may differ between this arm and those it is compared with.
      "allows": (),
      "stages": {},
    }
  )
  config.update(overrides)
  return config


def stage(preset: str = "easyr1", **overrides: object) -> ConfigDict:
  """A GRPO stage with the settings of a preset; `overrides` are its fields."""
  fields = {
    "kind": "grpo",
    "data": {},
    "shuffle": True,
    "order": "",  # a column expression to sort the draws by, "-pass_rate"
    "rewards": (),
    "steps": 100,
    # Columns of packed rows that a data shard works at at once; memory grows with
    # them.
    "microbatch_tokens": 16384,
    "freeze": (),  # of vision_tower, merger, decoder
    "reset_optimizer": True,
    "promote": "latest",  # latest | best
    "metric": "",  # held-out metric that ranks checkpoints; "": none
    "logprob_chunk": 256,
  }
  return ConfigDict(fields | presets.load(preset) | overrides)


def data(source: str, **fields: object) -> ConfigDict:
  """A data entry of a stage or a held-out set: which rows, and how many.

  Args:
    source: a file of jaxvlm/data/sources, or "file.py:function".
    **fields: of this entry, and the source's own arguments.
  """
  entry = ConfigDict(
    {
      "source": source,
      "weight": 1.0,  # share of the stage's stream
      # A column expression, "pass_rate > 0 and pass_rate < 1"; "": all rows.
      "filter": "",
      "limit": placeholder(int),  # rows, of those that the filter leaves
      # A parquet or JSONL file of further columns by row_id; "": none.
      "annotations": "",
      "rewards": (),  # (name, weight) of these rows; (): the stage's
      # Multiple choice in another order at each draw, letters and answer too.
      "shuffle_options": False,
      "report_as": "",  # metrics are kept apart by this; "": the stage's name
    }
  )
  entry.update(fields)
  return entry
