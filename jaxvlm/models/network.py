"""What the rest of the package sees of a model: pure functions of a tree."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxvlm import sharding
from jaxvlm.nn import block_attention, fused_attention, kv_cache
from jaxvlm.nn.block_attention import Attend, of_trees
from jaxvlm.nn.decoder import Embeds, visual_columns
from jaxvlm.nn.kv_cache import KVCache
from jaxvlm.nn.layers import HOST_MEMORY
from jaxvlm.nn.rope import Turns
from jaxvlm.sharding import constrain
from jaxvlm.types import Features, Params, Unmerged, Vision

Seen = TypeVar("Seen", Unmerged, Features)

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
REMAT = ("none", "dots", "offload", "full")
ATTENTION = ("plain", "fused")


def find_family(model_type: str | None) -> ModuleType:
  """The module of a model_type of config.json.

  Raises:
    ValueError: a family that is not built here.
  """
  if model_type not in FAMILIES:
    raise ValueError(
      f"model_type {model_type!r} is not supported. There are: "
      f"{', '.join(FAMILIES)}."
    )
  return importlib.import_module(f"jaxvlm.models.{model_type}")


def find_size(name: str) -> Any:
  """The Config of a published size, as "qwen3_vl_8b".

  Raises:
    ValueError: there is no such size.
  """
  sizes = {
    f"{family}_{size}": config
    for family in FAMILIES
    for size, config in find_family(family).SIZES.items()
  }
  if name not in sizes:
    raise ValueError(f"no size {name!r}; there are {', '.join(sizes)}.")
  return sizes[name]


def check_remat(name: str) -> None:
  """Raises ValueError for what is none of REMAT, or not on this backend."""
  if name not in REMAT:
    raise ValueError(
      f"model.remat: got {name!r}; expected one of {', '.join(REMAT)}."
    )
  memories = jax.local_devices()[0].addressable_memories()
  kinds = [memory.kind for memory in memories]
  if name == "offload" and HOST_MEMORY not in kinds:
    raise ValueError(
      f"model.remat: got 'offload', and a device of {jax.default_backend()} has "
      f"no memory {HOST_MEMORY!r} (it has {', '.join(kinds)}); expected dots or "
      "full."
    )


def choose_attention(name: str) -> str:
  """One of ATTENTION, of such a name or "auto": fused where it has kernels.

  Raises:
    ValueError: another name, or fused on a backend without kernels.
  """
  backend = sharding.backend()
  if name not in ("auto", *ATTENTION):
    raise ValueError(
      f"model.attention: got {name!r}; expected one of auto, "
      f"{', '.join(ATTENTION)}."
    )
  if name == "fused" and backend not in fused_attention.BACKENDS:
    raise ValueError(
      f"model.attention: got 'fused', and the backend is {backend}; there are "
      f"kernels for {', '.join(fused_attention.BACKENDS)}. Set it to plain or "
      "auto."
    )
  if name == "auto":
    return "fused" if backend in fused_attention.BACKENDS else "plain"
  return name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
  """An architecture and its dtypes, without weights: static under jit.

  Every method that takes `params` is a pure function of it. Params are nested
  dicts with HF's module names, layer weights stacked on a leading axis.

  Attributes:
    config: the family's Config.
    dtype: of activations; norms, softmax and rope angles stay float32.
    param_dtype: of weights.
    remat: what the backward pass computes again: "none", all but products
      with weights and attention ("dots"; "offload": with the products in the
      host's memory), or all but what passes between layers ("full").
    attention: "plain" JAX, or the backend's "fused" kernels.
  """

  config: Any
  dtype: str
  param_dtype: str
  remat: str
  attention: str

  def __post_init__(self) -> None:
    check_remat(self.remat)
    if self.attention not in ATTENTION:
      raise ValueError(
        f"attention: got {self.attention!r}, expected one of {ATTENTION}."
      )
    choose_attention(self.attention)  # ValueError where it has no kernels
    jnp.dtype(self.dtype), jnp.dtype(self.param_dtype)  # TypeError if unknown

  # -- the tree of weights ---------------------------------------------------

  def init(self, seed: int) -> Params:
    """Random weights, drawn as transformers draws them."""

    def make(key: jax.Array) -> Params:
      return nnx.to_pure_dict(nnx.state(self._make(key, stacked=True)))

    # Optimizing a program that runs once costs a CPU more than running it.
    cpu = sharding.backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if cpu else None
    return jax.jit(make, compiler_options=options)(jax.random.key(seed))

  def shapes(self) -> Params:
    """Params with a ShapeDtypeStruct at each leaf."""
    return nnx.to_pure_dict(nnx.state(self.skeleton))

  def axes(self) -> Params:
    """Params with a tuple of logical axes at each leaf."""
    return self.metadata("axes")

  def metadata(self, name: str) -> Params:
    """Params with what each weight says of itself under `name`."""
    named = jax.tree.map(
      lambda weight: weight.replace(getattr(weight, name)),
      nnx.state(self.skeleton),
      is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return nnx.to_pure_dict(named)

  def part_of(self, path: tuple[str, ...]) -> str:
    """ "vision_tower", "merger" or "decoder": where a leaf of Params lies."""
    if path[0] != "visual":
      return "decoder"
    return "merger" if "merger" in path[1] else "vision_tower"

  @functools.cached_property
  def skeleton(self) -> Any:
    """The model with shapes for weights."""
    return self._abstract(stacked=True)

  def _abstract(self, *, stacked: bool) -> Any:
    make = functools.partial(self._make, stacked=stacked)
    return nnx.eval_shape(make, jax.random.key(0))

  def _make(self, key: jax.Array, *, stacked: bool) -> nnx.Module:
    return find_family(self.config.model_type).Model(
      self.config,
      stacked=stacked,
      dtype=self.param_dtype,
      rngs=nnx.Rngs(key),
    )

  @property
  def num_levels(self) -> int:
    """DeepStack's levels, K; 0 where the family has none."""
    tower = self.config.vision_config
    return len(getattr(tower, "deepstack_visual_indexes", ()))

  # -- training and prefill --------------------------------------------------

  def see(self, params: Params, vision: Vision) -> Unmerged:
    """What the vision tower gives its mergers; padding means nothing."""
    tower = _merge(self.skeleton.visual, params["visual"])
    seen = tower.see(
      vision, dtype=self.dtype, remat=self.remat, attend=self._attend
    )
    return _in_lanes(seen)

  def encode(
    self, params: Params, vision: Vision | Unmerged | Features
  ) -> Features:
    """What the vision tower sees in every lane; padding means nothing.

    What was seen before is merged alone, and features are given back as they
    are.
    """
    if isinstance(vision, Features):
      return vision
    seen = self.see(params, vision) if isinstance(vision, Vision) else vision
    tower = _merge(self.skeleton.visual, params["visual"])
    return _in_lanes(tower.merge(seen, remat=self.remat))

  def embed(
    self,
    params: Params,
    ids: Int[Array, "Q P"],
    vision_index: Int[Array, "Q P"],
    features: Features | None,
  ) -> Embeds:
    """Token vectors, with visual tokens where vision_index is not negative.

    Args:
      params: the tree.
      ids: token ids.
      vision_index: as in `decoder.visual_columns`.
      features: what `encode` gave; None for a batch of text alone.
    """
    tokens, levels = self._embed_tokens(params, ids), None
    if features is not None:
      tokens = visual_columns(features.tokens, vision_index, tokens)
      levels = features.levels
    return Embeds(tokens=tokens, levels=levels, vision_index=vision_index)

  def forward(
    self,
    params: Params,
    embeds: Embeds,
    position_ids: Int[Array, "3 R T"],
    tree_ids: Int[Array, "R T"],
    branch_ids: Int[Array, "R T"],
  ) -> Float[Array, "R T D"]:
    """Hidden states of packed trees, after the last norm.

    A query sees a key of its tree that is not later and lies in the prompt
    (branch 0) or in its own branch. Padding (-1) sees nothing, and no one sees
    it.
    """
    decoder = _merge(self.skeleton.language_model, params["language_model"])
    x, _ = decoder(
      embeds,
      position_ids,
      self._within(tree_ids, branch_ids),
      keep_cache=False,
      remat=self.remat,
    )
    return x

  def head(self, params: Params) -> Float[Array, "D V"]:
    """The output kernel, in param_dtype; takes decode params too."""
    if self.config.tie_word_embeddings:
      return params["language_model"]["embed_tokens"]["embedding"].T
    return params["lm_head"]["kernel"]

  # -- sampling --------------------------------------------------------------

  def read(
    self,
    params: Params,
    embeds: Embeds,
    position_ids: Int[Array, "3 R T"],
    tree_ids: Int[Array, "R T"],
  ) -> tuple[Float[Array, "R T D"], list[KVCache]]:
    """Hidden states of packed prompts as in `forward`, and K and V by layer.

    Those are [R K T H].
    """
    decoder = _merge(self.skeleton.language_model, params["language_model"])
    x, caches = decoder(
      embeds,
      position_ids,
      self._within(tree_ids, jnp.minimum(tree_ids, 0)),
      keep_cache=True,
      remat=self.remat,
    )
    return x, [_layer(caches, i) for i in range(self._num_layers)]

  def init_cache(self, Q: int, G: int, C: int) -> list[KVCache]:
    """Empty buffers for G completions of C tokens, [Q K G C H] a layer."""
    text = self.config.text_config
    shape = (Q, text.num_key_value_heads, G, C, text.head_dim)
    return [
      kv_cache.laid(kv_cache.empty(shape, self.dtype))
      for _ in range(self._num_layers)
    ]

  def unstack(self, params: Params) -> Params:
    """Params for `decode`: no tower, and each layer's weights cut out once."""
    layers = [self.cut(params, i) for i in range(self._num_layers)]
    return self.join(self.cut(params, None), layers)

  def cut(self, params: Params, i: Int[ArrayLike, ""] | None) -> Params:
    """What `decode` reads of layer i; None: of all but the layers."""
    decoder = params["language_model"]
    if i is not None:
      return _layer(decoder["layers"], i)
    around = {key: tree for key, tree in decoder.items() if key != "layers"}
    kept = {key: tree for key, tree in params.items() if key != "visual"}
    return {**kept, "language_model": around}

  def cut_axes(self, i: Int[ArrayLike, ""] | None) -> Params:
    """What `cut` gives, with a tuple of logical axes at each leaf."""
    axes = self.axes()
    if i is None:
      return self.cut(axes, None)
    return jax.tree.map(
      lambda names: names[1:],
      axes["language_model"]["layers"],
      is_leaf=lambda x: isinstance(x, tuple),
    )

  def join(self, around: Params, layers: Sequence[Params]) -> Params:
    """The parts of `cut` -> params for `decode`."""
    decoder = {**around["language_model"], "layers": dict(enumerate(layers))}
    return {**around, "language_model": decoder}

  def turns(self, position_ids: Int[Array, "3 Q 1"]) -> Turns:
    """What the tokens that `decode` is fed are turned by, [Q 1 F].

    Args:
      position_ids: of the token of every completion of a question.
    """
    return self._decode_skeleton.turns(position_ids, self.dtype)

  def decode(
    self,
    decode_params: Params,
    ids: Int[Array, "Q G"],
    turns: Turns,
    prompt_cache: list[KVCache],
    prompt_mask: Bool[Array, "Q P"],
    completion_cache: list[KVCache],
    written: Bool[Array, "Q C"],
    column: Int[Array, ""],
  ) -> tuple[Float[Array, "Q G D"], list[KVCache]]:
    """Feeds one token of every completion; all write the same column.

    Args:
      decode_params: of `unstack`.
      ids: of the tokens.
      turns: of `turns`.
      prompt_cache: K and V of the prompts.
      prompt_mask: which columns of them are real.
      completion_cache: of `init_cache`.
      written: columns that hold tokens of the question's completions, that of
        these ones too.
      column: where they go.

    Returns:
      hidden states after the last norm, and the caches with the column filled.
    """
    decoder = _merge(self._decode_skeleton, decode_params["language_model"])
    x = self._embed_tokens(decode_params, ids)
    return decoder.decode(
      x,
      turns,
      prompt_cache,
      prompt_mask,
      completion_cache,
      written,
      column,
    )

  @functools.cached_property
  def _decode_skeleton(self) -> Any:
    return self._abstract(stacked=False).language_model

  def _embed_tokens(
    self, params: Params, ids: Int[Array, "Q T"]
  ) -> Float[Array, "Q T D"]:
    table = params["language_model"]["embed_tokens"]["embedding"]
    # Whole vectors: what is looked up lies with the questions, not by width.
    table = {"embedding": constrain(table, "vocab", None)}
    embed = _merge(self.skeleton.language_model.embed_tokens, table)
    return constrain(embed(ids, self.dtype), "question", None, None)

  @property
  def _attend(self) -> Callable[..., jax.Array]:
    form = {"plain": block_attention, "fused": fused_attention}[self.attention]
    return form.attend

  def _within(self, tree_ids: jax.Array, branch_ids: jax.Array) -> Attend:
    """Attention of packed trees."""
    visibility = of_trees(tree_ids, branch_ids)
    return functools.partial(self._attend, visibility=visibility)

  @property
  def _num_layers(self) -> int:
    return self.config.text_config.num_hidden_layers


def _in_lanes(seen: Seen) -> Seen:
  """Lanes are split over the mesh, and nothing else is."""
  axes = "lane", *(seen.tokens.ndim - 1) * (None,)
  levels = seen.levels
  if levels is not None:
    levels = constrain(levels, None, *axes)
  return type(seen)(tokens=constrain(seen.tokens, *axes), levels=levels)


def _merge(skeleton: nnx.Module, params: Params) -> Any:
  """The module with these weights in place of its own."""
  return nnx.merge(nnx.graphdef(skeleton), params)


def _layer(stacked: Any, i: Int[ArrayLike, ""]) -> Any:
  return jax.tree.map(lambda x: x[i], stacked)
