"""The real vocabulary of Qwen, rebuilt from the ranks that dashscope ships.

151,643 byte sequences by rank, as tiktoken merges them; Hugging Face's files
hold the same as merges. The added tokens are those of the published files.
"""

import base64
import importlib.util
import itertools
import pathlib
import unicodedata

import numpy as np
import PIL.Image
import pytest
import tiktoken
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from jaxvlm.types import Example

SPECIAL = (
  *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
  *("<|object_ref_start|>", "<|object_ref_end|>"),
  *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
  *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
  *("<|image_pad|>", "<|video_pad|>"),
)
# Whole tokens too, but text: they stay when a completion is decoded.
ADDED = (
  *("<tool_call>", "</tool_call>"),
  *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
  *("<|repo_name|>", "<|file_sep|>"),
)
ADDED_3 = ("<tool_response>", "</tool_response>", "<think>", "</think>")

TEXTS = (
  "How many red cubes are there? (A) 3 (B) 12 (C) none",
  "Let $x^2 + \\frac{1}{2}y = 7$; find \\boxed{x}.",
  "I'll say they'VE done what we'd HOPED, it's 'tis",
  "図の中に赤い立方体はいくつありますか？",
  "图中有多少个红色立方体？请一步一步地思考。",
  "Сколько красных кубов на рисунке? ΑΒΓ δεζ",
  "كم عدد المكعبات الحمراء؟ \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
  "한국어 문장도 있습니다. tiếng Việt có dấu",
  "e\u0301a\u0300o\u0308 \u1e9b\u0323 \uac00\u11a8 ﬁ Ⅳ ½ ㍿",
  "👩‍👩‍👧 🏳️‍🌈 🙂🙂 ☃\ufe0f",
  "def f(x):\n    return  x+1\r\n\r\n\tif x!=2:\n\n\n  pass  \n",
  "   leading, trailing   ",
  "\n\n\t \u00a0\u3000\u2009x\u200b\ufeff",
  "1234567890 3.14159 1e-5 0xFF 2024-01-31 ١٢٣ ²³",
  "https://example.org/a_b?c=d&e=%20#f <b>bold</b> {'k': [1, 2]}",
  "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!????----====____",
  "antidisestablishmentarianism PneumonoultramicroscopicsilicoVolcano",
  "\x00\x01\x7f\x85\u2028\u2029",
  "",
)


@pytest.fixture(scope="session")
def ranks():
  # Found, not imported: dashscope reaches for the network's libraries.
  spec = importlib.util.find_spec("dashscope")
  file = pathlib.Path(spec.origin).parent / "resources" / "qwen.tiktoken"
  lines = (line.split() for line in file.read_bytes().splitlines())
  return {base64.b64decode(token): int(rank) for token, rank in lines}


def split_last(token: bytes, ranks) -> tuple[bytes, bytes]:
  """The two parts whose merge makes the token: all earlier merges applied."""
  parts = [token[i : i + 1] for i in range(len(token))]
  while len(parts) > 2:
    pairs = [a + b for a, b in itertools.pairwise(parts)]
    i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
    parts[i : i + 2] = [pairs[i]]
  return parts[0], parts[1]


@pytest.fixture(scope="session")
def tokenizer(ranks):
  """Qwen2.5-VL's tokenizer.json."""
  letters = bytes_to_unicode()

  def spell(token):
    return "".join(letters[byte] for byte in token)

  merges = [
    tuple(map(spell, split_last(token, ranks)))
    for token in sorted(ranks, key=ranks.get)
    if len(token) > 1
  ]
  vocabulary = {spell(token): rank for token, rank in ranks.items()}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
  made.normalizer = normalizers.NFC()
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(list(SPECIAL))
  made.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ADDED])
  return made


@pytest.fixture(scope="session")
def qwen(family, tokenizer, write_checkpoint, make_processor, tmp_path_factory):
  """The directory and the processor of a family with its real vocabulary."""
  if family == "qwen3_vl":
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens(
      [tokenizers.AddedToken(t, normalized=False) for t in ADDED_3]
    )
  home = tmp_path_factory.mktemp("vocabulary")
  directory = write_checkpoint(home, family, tokenizer)
  return directory, make_processor(directory)


def test_the_vocabulary_is_qwens(ranks, family, qwen):
  _, processor = qwen
  assert sorted(ranks.values()) == list(range(151643))
  known = processor.tokenizer.get_vocab()
  added = (*SPECIAL, *ADDED, *(ADDED_3 if family == "qwen3_vl" else ()))
  assert [known[token] for token in added] == list(
    range(151643, 151643 + len(added))
  )
  assert len(known) == 151643 + len(added)
  assert processor.eos_ids == (151645,)
  assert processor.pad_id == 151643
  assert processor.layout.image_token_id == 151655
  banned = processor.banned_ids(151936)
  assert np.flatnonzero(banned).tolist() == [
    *range(151652, 151657),
    *range(151643 + len(added), 151936),
  ]


def varied_texts():
  """Those above, and pieces of them in other orders and lengths."""
  rng = np.random.default_rng(0)
  letters = list("".join(TEXTS))
  yield from TEXTS
  for _ in range(300):
    a, b = rng.integers(0, len(TEXTS), 2)
    cut, other = rng.integers(0, 40, 2)
    yield TEXTS[a][cut:] + TEXTS[b][:other]
  for _ in range(300):
    yield "".join(rng.choice(letters, rng.integers(1, 60)))


def test_ids_of_text_equal_tiktokens(ranks, qwen):
  _, processor = qwen
  reference = tiktoken.Encoding(
    "qwen",
    pat_str=PRETOKENIZE_REGEX,
    mergeable_ranks=ranks,
    special_tokens={},
  )
  for text in varied_texts():
    written = unicodedata.normalize("NFC", text)
    example = Example(problem="", answer="", response=text)
    ids = processor.question(example, 0).response_ids
    assert ids[:-1].tolist() == reference.encode_ordinary(written), repr(text)
    assert ids[-1] == 151645
    assert processor.decode(ids) == written


IMAGE, START, END = 151655, 151652, 151653
SYSTEM = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
USER, ASSISTANT = [151644, 872, 198], [151644, 77091, 198]
# "Compare ", " with\n" and what comes after the second picture: "<think>" is
# one token of Qwen3-VL's alone, and the system turn Qwen2.5-VL's.
PINNED = {
  "qwen2_5_vl": [
    *(*SYSTEM, *USER, 27374, 220, START, *[IMAGE] * 15, END, 448, 198),
    *(START, *[IMAGE] * 11, END, 28029, 11, 1221, 366, 26865, 14276),
    *(151645, 198, *ASSISTANT),
  ],
  "qwen3_vl": [
    *(*USER, 27374, 220, START, *[IMAGE] * 70, END, 448, 198),
    *(START, *[IMAGE] * 66, END, 28029, 11, 1221, 220, 151667, 13),
    *(151645, 198, *ASSISTANT),
  ],
}


def test_ids_of_a_templated_prompt_with_two_pictures(
  family, qwen, open_hf_processor
):
  directory, processor = qwen
  pictures = tuple(
    np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
    for i, size in enumerate([(96, 130), (300, 40)])
  )
  problem = "Compare <image> with\n<image>图, then <think>."
  example = Example(problem=problem, answer="1", images=pictures)
  question = processor.question(example, 0)
  assert question.prompt_ids.tolist() == PINNED[family]

  texts = iter(problem.split("<image>"))
  parts = [{"type": "text", "text": next(texts)}]
  for picture, text in zip(pictures, texts, strict=True):
    parts.append({"type": "image", "image": PIL.Image.fromarray(picture)})
    parts.append({"type": "text", "text": text})
  hf = open_hf_processor(directory, family, processor.tokenizer)
  want = hf.apply_chat_template(
    [{"role": "user", "content": parts}],
    tokenize=True,
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="np",
  )
  assert want["input_ids"][0].tolist() == PINNED[family]
  np.testing.assert_array_equal(question.pixel_values, want["pixel_values"])
