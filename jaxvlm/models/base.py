"""What the families share: config.json, and the tree of weights."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar

from flax import nnx

from jaxvlm.nn.decoder import Decoder, TextConfig
from jaxvlm.nn.layers import Linear
from jaxvlm.nn.vision import VisionConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """An architecture; `from_hf` reads it, `to_hf` writes it.

  A family's file fills in the class variables and may add checks.
  """

  model_type: ClassVar[str]
  architecture: ClassVar[str]  # HF's class
  vision_class: ClassVar[type[VisionConfig]]
  vision_act: ClassVar[str]
  # transformers' own values for a file without the field.
  text_defaults: ClassVar[Mapping[str, Any]]

  text_config: TextConfig
  vision_config: VisionConfig
  image_token_id: int
  video_token_id: int
  vision_start_token_id: int
  vision_end_token_id: int
  tie_word_embeddings: bool

  def __post_init__(self) -> None:
    text, tower = self.text_config, self.vision_config
    check_whole(
      "heads / num_key_value_heads",
      text.num_attention_heads,
      text.num_key_value_heads,
    )
    check_whole(
      "vision hidden_size / num_heads / 4",
      tower.hidden_size // 4,
      tower.num_heads,
    )
    check_equal(
      "vision out_hidden_size", tower.out_hidden_size, text.hidden_size
    )

  @property
  def vocab_size(self) -> int:
    return self.text_config.vocab_size

  @classmethod
  def from_hf(cls, raw: Mapping[str, Any]) -> Self:
    """Reads config.json, text fields nested or (older files) at the root.

    Raises:
      ValueError: another family, a missing field, a feature not built here.
    """
    if raw.get("model_type") != cls.model_type:
      raise ValueError(
        f"config.json: model_type is {raw.get('model_type')!r}, expected "
        f"{cls.model_type!r}."
      )
    if raw.get("quantization_config"):
      raise ValueError(
        "config.json: quantization_config is not supported; take the model "
        "in bfloat16."
      )
    text = raw.get("text_config") or raw
    tower = raw.get("vision_config") or {}
    for field in ("use_sliding_window", "attention_bias"):
      if text.get(field):
        raise ValueError(f"config.json: {field} is not supported.")
    text = {"initializer_range": 0.02, **cls.text_defaults, **text}
    tower = {
      "in_channels": 3,
      "initializer_range": 0.02,
      "rope_theta": 10000.0,
      **tower,
    }
    return cls(
      text_config=_read(TextConfig, cls.text_fields(text), act="silu"),
      vision_config=_read(cls.vision_class, tower, act=cls.vision_act),
      image_token_id=raw.get("image_token_id", 151655),
      video_token_id=raw.get("video_token_id", 151656),
      vision_start_token_id=raw.get("vision_start_token_id", 151652),
      vision_end_token_id=raw.get("vision_end_token_id", 151653),
      tie_word_embeddings=cls.is_tied(raw),
    )

  @classmethod
  def text_fields(cls, text: dict[str, Any]) -> dict[str, Any]:
    """The decoder's fields, with those that the family works out."""
    return text

  @classmethod
  def is_tied(cls, raw: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding."""
    return bool(raw.get("tie_word_embeddings"))

  def to_hf(self) -> dict[str, Any]:
    """config.json in the nested form that transformers 5.23 writes."""
    raw = dataclasses.asdict(self)
    text, tower = raw["text_config"], raw["vision_config"]
    text |= {
      "model_type": f"{self.model_type}_text",
      "hidden_act": "silu",
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": text.pop("mrope_section"),
      },
    }
    tower |= {
      "model_type": f"{self.model_type}_vision",
      "hidden_act": self.vision_act,
      "rope_parameters": {
        "rope_type": "axial",
        "rope_theta": tower.pop("rope_theta"),
      },
    }
    head = {"architectures": [self.architecture], "model_type": self.model_type}
    return _lists(head | raw)


class Model(nnx.Module):
  """The whole tree of weights, with HF's names."""

  def __init__(
    self,
    config: Config,
    *,
    tower: Callable[..., nnx.Module],
    axis_of: tuple[int, ...],
    qkv_bias: bool,
    qk_norm: bool,
    stacked: bool,
    dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Draws the weights.

    Args:
      config: of the family.
      tower: its class.
      axis_of: as in Decoder.
      qkv_bias: as in Decoder.
      qk_norm: as in Decoder.
      stacked: layers as one stack; False: a list, for decoding.
      dtype: of the weights.
      rngs: of flax.
    """
    text = config.text_config
    self.visual = tower(config.vision_config, dtype=dtype, rngs=rngs)
    self.language_model = Decoder(
      text,
      axis_of=axis_of,
      qkv_bias=qkv_bias,
      qk_norm=qk_norm,
      stacked=stacked,
      dtype=dtype,
      rngs=rngs,
    )
    if not config.tie_word_embeddings:
      self.lm_head = Linear(
        (text.hidden_size,),
        (text.vocab_size,),
        axes=("embed", "vocab"),
        use_bias=False,
        std=text.initializer_range,
        dtype=dtype,
        rngs=rngs,
      )


def check_whole(name: str, size: int, parts: int) -> None:
  """Raises ValueError if the parts do not divide the size."""
  if size % parts:
    raise ValueError(f"config: {name} is {size} / {parts}, not whole.")


def check_equal(name: str, got: int, expected: int) -> None:
  """Raises ValueError if they differ."""
  if got != expected:
    raise ValueError(f"config: {name} is {got}, expected {expected}.")


def _read(cls: type[T], raw: Mapping[str, Any], *, act: str) -> T:
  if raw.get("hidden_act", act) != act:
    raise ValueError(
      f"config.json: hidden_act {raw['hidden_act']!r}, expected {act!r}."
    )
  raw = {**raw, **_rope(raw)}
  names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
  if missing := [name for name in names if name not in raw]:
    raise ValueError(f"config.json: {cls.__name__} lacks {missing}.")
  return cls(
    **{
      name: tuple(raw[name]) if isinstance(raw[name], list) else raw[name]
      for name in names
    }
  )


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
  """rope_theta and mrope_section, from either of the forms in use."""
  given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  for key in ("type", "rope_type"):
    kind = given.get(key, "default")
    if kind not in ("default", "mrope", "axial"):
      raise ValueError(f"config.json: {key} {kind!r} is not supported.")
  found = {key: given[key] for key in ("mrope_section",) if key in given}
  return {
    "rope_theta": float(given.get("rope_theta", raw["rope_theta"])),
    **found,
  }


def _lists(raw: Any) -> Any:
  """JSON's lists for tuples."""
  if isinstance(raw, dict):
    return {key: _lists(value) for key, value in raw.items()}
  return list(raw) if isinstance(raw, tuple) else raw
