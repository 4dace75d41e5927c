"""Rows of files in every form that people write them."""

import base64
import io
import json

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from jaxvlm.data.pictures import load_picture
from jaxvlm.data.sources.files import source

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def png() -> bytes:
  buffer = io.BytesIO()
  PIL.Image.fromarray(PICTURE).save(buffer, "PNG")
  return buffer.getvalue()


def write_parquet(file, rows):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_json(file, rows):
  file.write_text(json.dumps(rows))


def write_jsonl(file, rows):
  file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


WRITERS = {
  "rows.parquet": write_parquet,
  "rows.json": write_json,
  "rows.jsonl": write_jsonl,
}


def rows_of(count, **changes):
  return [
    {"problem": f"p{i}", "answer": str(i)} | changes for i in range(count)
  ]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, name):
  rows = [
    {"problem": "<image>one\u2028line", "answer": "1", "images": ["a.png"]},
    {"problem": "two", "answer": "2", "images": []},
    {"problem": "three", "answer": " 3 ", "images": None},
  ]
  WRITERS[name](tmp_path / name, rows)
  found = source(path=str(tmp_path / name))
  assert len(found) == 3
  assert [e.problem for e in found] == [row["problem"] for row in rows]
  assert [e.answer for e in found] == ["1", "2", "3"]
  assert [e.images for e in found] == [(str(tmp_path / "a.png"),), (), ()]
  assert found[1].name == f"{tmp_path / name}[1]"
  assert found[-1] == found[2]
  assert [e.answer for e in found[1:]] == ["2", "3"]
  with pytest.raises(IndexError):
    found[3]


def test_a_column_task_is_the_rows_task(tmp_path):
  write_json(tmp_path / "rows.json", rows_of(1, task="ocr"))
  example = source(path=str(tmp_path / "rows.json"))[0]
  assert (example.task, example.columns) == ("ocr", {"task": "ocr"})


def encoded():
  text = base64.b64encode(png()).decode()
  return {
    "bytes": png(),
    "{bytes}": {"bytes": png(), "path": None},
    "{path}": {"bytes": None, "path": "pictures/a.png"},
    "path": "pictures/a.png",
    "base64": text,
    "wrapped base64": "\n".join([text[:76], text[76:]]),
    "data url": f"data:image/png;base64,{text}",
  }


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("kind", encoded())
def test_pictures_come_in_every_form(tmp_path, kind, several):
  (tmp_path / "pictures").mkdir()
  (tmp_path / "pictures" / "a.png").write_bytes(png())
  picture = encoded()[kind]
  row = {"problem": "<image>", "answer": "1"}
  row["images"] = [picture, picture] if several else picture
  write_parquet(tmp_path / "rows.parquet", [row])
  images = source(path=str(tmp_path / "rows.parquet"))[0].images
  assert len(images) == (2 if several else 1)
  for image in images:
    np.testing.assert_array_equal(load_picture(image), PICTURE)


def test_relative_paths_start_where_the_config_says(tmp_path):
  write_json(tmp_path / "rows.json", rows_of(1, images=["a.png"]))
  found = source(path=str(tmp_path / "rows.json"), image_dir="/pictures")
  assert found[0].images == ("/pictures/a.png",)


def test_columns_have_the_names_of_the_config(tmp_path):
  write_jsonl(
    tmp_path / "rows.jsonl",
    [{"question": "q", "solution": 4.5, "image": "a.png", "trace": "t"}],
  )
  example = source(
    path=str(tmp_path / "rows.jsonl"),
    problem_key="question",
    answer_key="solution",
    images_key="image",
    response_key="trace",
  )[0]
  assert (example.problem, example.answer, example.response) == (
    "q",
    "4.5",
    "t",
  )
  assert example.images == (str(tmp_path / "a.png"),)


def test_a_written_response_needs_no_answer(tmp_path):
  write_jsonl(tmp_path / "rows.jsonl", [{"problem": "p", "response": "r"}])
  path = str(tmp_path / "rows.jsonl")
  example = source(path=path, response_key="response")[0]
  assert (example.answer, example.response) == ("", "r")
  with pytest.raises(ValueError, match="no column 'answer'"):
    source(path=path)


def test_several_files_and_patterns_are_one_set(tmp_path):
  for i, name in enumerate(("b.jsonl", "a.jsonl", "c.parquet")):
    rows = [{"problem": f"{i}{j}", "answer": 1} for j in range(2)]
    writer = write_parquet if name.endswith("parquet") else write_jsonl
    writer(tmp_path / name, rows)
  pattern = str(tmp_path / "*.jsonl")
  found = source(path=(str(tmp_path / "c.parquet"), pattern))
  problems = [e.problem for e in found]
  assert problems == ["20", "21", "10", "11", "00", "01"]
  assert [e.problem for e in source(path=pattern)] == problems[2:]


@pytest.mark.parametrize("name", WRITERS)
def test_further_numbers_texts_and_truths_are_columns(tmp_path, name):
  more = {"pass_rate": 0.5, "level": 3, "kind": "ocr", "good": True}
  others = {"none": None, "list": [1], "extra": {"split": "a", "of": {"n": 1}}}
  rows = rows_of(1, images=[], **more, **others)
  WRITERS[name](tmp_path / name, rows)
  example = source(path=str(tmp_path / name))[0]
  flat = {"none": None, "extra.split": "a", "extra.of.n": 1}
  assert example.columns == more | flat
  assert example.task == ""
  assert example.image_root == str(tmp_path)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([], "no rows"),
    ([*rows_of(2), {"problem": "p"}], r"\[2\]: no 'answer'; each row"),
    (rows_of(1, answer=""), r"\[0\]: no 'answer'"),
    (rows_of(1, answer=" "), r"\[0\]: no 'answer'"),
    (rows_of(1, answer=["a"]), r"\[0\]: the answer is \['a'\]; expected"),
    (rows_of(1, problem=None), r"\[0\]: 'problem' is None; expected text"),
    (rows_of(1, problem=[]), r"\[0\]: 'problem' is \[\]; expected text or a"),
    (rows_of(1, problem={"a": 1}), r"\[0\]: 'problem' is {'a': 1}; expect"),
    ([{"answer": "1"}], "no column 'problem'; there are answer"),
    ([{"problem": "p"}], "no column 'answer'"),
    ([*rows_of(1), *rows_of(1, videos=["a.mp4"])], r"\[1\]: has videos; only"),
    ([*rows_of(1), *rows_of(1, video="a.mp4")], r"\[1\]: has videos; only"),
    (["p"], r"\[0\]: is 'p'; expected an object"),
  ],
)
def test_a_bad_set_is_one_clear_error(tmp_path, rows, message):
  write_json(tmp_path / "rows.json", rows)
  with pytest.raises(ValueError, match=message):
    source(path=str(tmp_path / "rows.json"))


def test_videos_of_no_row_are_no_matter(tmp_path):
  write_json(tmp_path / "rows.json", rows_of(2, videos=[], video=None))
  assert len(source(path=str(tmp_path / "rows.json"))) == 2


@pytest.mark.parametrize(
  ("name", "kinds"),
  [
    ("rows.parquet", ("bytes", "{bytes}", "{path}", "path", "data url")),
    ("rows.jsonl", ("{path}", "path", "base64", "data url")),
  ],
)
def test_message_lists_hold_pictures_in_every_form(tmp_path, name, kinds):
  (tmp_path / "pictures").mkdir()
  (tmp_path / "pictures" / "a.png").write_bytes(png())
  for kind in kinds:
    picture = encoded()[kind]
    if kind == "{path}":
      picture = {"path": "pictures/a.png"}
    turns = [
      [
        {"type": "image", "image": picture},
        {"type": "text", "text": "one"},
        {"type": "image"},
      ],
      [{"type": "text", "text": "Sure."}],
      [{"type": "text", "text": "two"}, {"type": "image", "image": picture}],
    ]
    roles = ("user", "assistant", "user")
    prompt = [
      {"role": role, "content": turn}
      for role, turn in zip(roles, turns, strict=True)
    ]
    row = {"prompt": prompt, "solution": "1", "image": "other.png"}
    WRITERS[name](tmp_path / name, [row, row])
    example = source(
      path=str(tmp_path / name),
      problem_key="prompt",
      answer_key="solution",
      images_key="image",
    )[1]
    assert [len(m["content"]) for m in example.messages] == [3, 1, 2]
    assert example.messages[2]["content"] == [
      {"type": "text", "text": "two"},
      {"type": "image"},
    ]
    assert example.problem == "two<image>"
    assert example.images[1] == str(tmp_path / "other.png")
    for image in (example.images[0], example.images[2]):
      np.testing.assert_array_equal(load_picture(image), PICTURE)


def test_message_lists_of_text_take_the_rows_pictures(tmp_path, processor):
  (tmp_path / "a.png").write_bytes(png())
  rows = [
    {"problem": [{"role": "user", "content": content}], "answer": "1"}
    | {"images": [{"bytes": None, "path": "a.png"}]}
    for content in ("what?", "<image>what?")
  ]
  write_parquet(tmp_path / "rows.parquet", rows)
  plain, marked = source(path=str(tmp_path / "rows.parquet"))
  assert plain.messages == marked.messages
  assert plain.problem == "<image>what?"
  assert processor.length(plain) == processor.length(marked)


def test_a_message_list_that_cannot_be_is_named(tmp_path):
  messages = [{"role": "user", "content": [{"type": "video"}]}]
  write_json(tmp_path / "rows.json", rows_of(2, problem=messages))
  rows = source(path=str(tmp_path / "rows.json"))
  with pytest.raises(ValueError, match=r"rows\.json\[1\]: .* is 'video'; "):
    rows[1]


@pytest.mark.parametrize(
  "picture", ["https://a.org/a.png", "HTTP://a.org/a.png", "s3://a/a.png"]
)
def test_remote_pictures_are_refused_wherever_they_stand(tmp_path, picture):
  part = {"type": "image", "url": picture}
  for row in (
    rows_of(1, images=[picture]),
    rows_of(1, images=[{"path": picture}]),
    rows_of(1, problem=[{"role": "user", "content": [part]}]),
  ):
    write_json(tmp_path / "rows.json", row)
    with pytest.raises(
      ValueError, match=rf"rows\.json\[0\]: .* address {picture}; download"
    ):
      source(path=str(tmp_path / "rows.json"))[0]


def test_addresses_of_local_files_are_paths(tmp_path):
  (tmp_path / "a.png").write_bytes(png())
  address = (tmp_path / "a.png").as_uri()
  write_json(tmp_path / "rows.json", rows_of(1, images=[address]))
  assert source(path=str(tmp_path / "rows.json"))[0].images == (
    str(tmp_path / "a.png"),
  )


@pytest.mark.parametrize("picture", [3, "", {"bytes": None, "path": None}])
def test_a_picture_of_another_kind_is_refused(tmp_path, picture):
  write_json(tmp_path / "rows.json", rows_of(1, images=[picture]))
  with pytest.raises(ValueError, match=r"rows\.json\[0\]: a picture is"):
    source(path=str(tmp_path / "rows.json"))[0]
  write_json(tmp_path / "rows.json", rows_of(1, images=3))
  with pytest.raises(ValueError, match=r"rows\.json\[0\]: the pictures are"):
    source(path=str(tmp_path / "rows.json"))[0]


def test_bad_base64_of_a_part_is_called_so(tmp_path):
  def asked(text):
    part = {"type": "image", "base64": text}
    row = rows_of(1, problem=[{"role": "user", "content": [part]}])
    write_json(tmp_path / "rows.json", row)
    return source(path=str(tmp_path / "rows.json"))[0].images

  (tmp_path / "a.png").write_bytes(png())
  for text in ("@@@", "a.png", "aGVsbG8="):
    with pytest.raises(ValueError, match=rf"\[0\]: the base64 .*'{text}', is"):
      asked(text)
  for kind in ("base64", "data url"):
    np.testing.assert_array_equal(
      load_picture(asked(encoded()[kind])[0]), PICTURE
    )


def test_files_that_cannot_be_read_are_named(tmp_path):
  for path in (str(tmp_path / "gone.json"), str(tmp_path / "*.parquet")):
    with pytest.raises(ValueError, match="files: no such file"):
      source(path=path)
  with pytest.raises(ValueError, match="path is empty"):
    source(path=())
  (tmp_path / "rows.csv").write_text("problem,answer")
  for path in (str(tmp_path / "rows.csv"), str(tmp_path)):
    with pytest.raises(ValueError, match=r"expected a \.parquet"):
      source(path=path)
  write_jsonl(tmp_path / "good.jsonl", rows_of(1))
  with pytest.raises(ValueError, match="no form 'vrel'; there are easyr1, trl"):
    source(path=str(tmp_path / "good.jsonl"), form="vrel")
  (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
  with pytest.raises(ValueError, match=r"cut\.parquet: not readable"):
    source(path=str(tmp_path / "cut.parquet"))
  (tmp_path / "bad.jsonl").write_text('{"problem": "p", "answer": 1}\n{"pro')
  with pytest.raises(ValueError, match=r"bad\.jsonl: line 2 is not JSON"):
    source(path=str(tmp_path / "bad.jsonl"))
  (tmp_path / "bad.json").write_text("[\n{},\n{]")
  with pytest.raises(ValueError, match=r"bad\.json: line 3 is not JSON"):
    source(path=str(tmp_path / "bad.json"))


def test_a_missing_picture_is_named_when_it_is_read(tmp_path, processor):
  write_json(
    tmp_path / "rows.json",
    rows_of(1, problem="<image>", images=["gone.png"]),
  )
  example = source(path=str(tmp_path / "rows.json"))[0]
  with pytest.raises(
    ValueError,
    match=r"rows\.json\[0\]: picture 1: .* no such file: .*gone\.png",
  ):
    processor.length(example)


# -- other trainers' rows ------------------------------------------------------


def read(tmp_path, row, **arguments):
  write_parquet(tmp_path / "rows.parquet", [row])
  return source(path=str(tmp_path / "rows.parquet"), **arguments)[0]


def verl_row(content="<image>How many?", images=1):
  """As verl's examples/data_preprocess/geo3k.py writes it."""
  return {
    "data_source": "hiyouga/geometry3k",
    "prompt": [{"role": "user", "content": content}],
    "images": [{"bytes": png(), "path": None}] * images,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 7, "answer": "4"},
  }


def test_verls_rows_are_read_with_their_source_as_a_column(tmp_path):
  example = read(tmp_path, verl_row(), form="verl")
  assert (example.problem, example.answer) == ("<image>How many?", "4")
  np.testing.assert_array_equal(load_picture(example.images[0]), PICTURE)
  assert example.columns == {
    "data_source": "hiyouga/geometry3k",
    "ability": "math",
    "reward_model.style": "rule",
    "extra_info.split": "train",
    "extra_info.index": 7,
    "extra_info.answer": "4",
  }
  other = read(
    tmp_path, verl_row(), form="verl", answer_key="extra_info.answer"
  )
  assert "extra_info.answer" not in other.columns


@pytest.mark.parametrize(
  ("content", "images"),
  [("How many?", 1), ("<image><image>", 1), ("<image>", 0)],
)
def test_verls_markers_are_as_many_as_its_pictures(tmp_path, content, images):
  row = verl_row(content, images) | ({} if images else {"images": None})
  with pytest.raises(ValueError, match=r"rows\.parquet\[0\]: . image parts"):
    read(tmp_path, row, form="verl")


def test_a_row_without_the_key_of_its_form_is_refused(tmp_path):
  row = verl_row() | {"reward_model": {"style": "rule"}}
  with pytest.raises(ValueError, match=r"\[0\]: no 'reward_model\.ground_tr"):
    read(tmp_path, row, form="verl")
  del row["reward_model"]
  with pytest.raises(
    ValueError, match=r"no column 'reward_model\.ground_truth'"
  ):
    read(tmp_path, row, form="verl")


@pytest.mark.parametrize("pictures", ["image", "images"])
def test_trls_rows_are_read(tmp_path, pictures):
  picture = {"bytes": png(), "path": None}
  row = {
    "prompt": [{"role": "user", "content": "What color is the sky?"}],
    pictures: picture if pictures == "image" else [picture],
    "solution": "blue",
    "level": 2,
  }
  example = read(tmp_path, row, form="trl")
  assert example.problem == "<image>What color is the sky?"
  assert (example.answer, example.columns) == ("blue", {"level": 2})
  assert len(example.images) == 1


def test_ms_swifts_rows_are_read(tmp_path):
  messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>How many?"},
    {"role": "assistant", "content": "<think>2+2</think> 4"},
  ]
  row = {"messages": messages, "images": ["a.png"], "solution": "4"}
  example = read(tmp_path, row, form="ms_swift")
  assert [m["role"] for m in example.messages] == ["system", "user"]
  assert example.problem == "<image>How many?"
  assert (example.answer, example.response) == ("4", "<think>2+2</think> 4")
  example = read(tmp_path, row | {"messages": messages[:2]}, form="ms_swift")
  assert (example.answer, example.response) == ("4", None)


def test_vlm_r1s_rows_are_read(tmp_path):
  row = {
    "id": 3,
    "image": "a.png",
    "conversations": [
      {"from": "human", "value": "<image>How many?"},
      {"from": "gpt", "value": "4"},
    ],
  }
  example = read(tmp_path, row, form="vlm_r1")
  assert (example.problem, example.answer) == ("<image>How many?", "4")
  assert example.images == (str(tmp_path / "a.png"),)
  assert example.columns == {"id": 3}
  assert example.messages[-1]["role"] == "user"


def test_a_text_may_be_asked_of_every_row(tmp_path):
  message = {"role": "user", "content": "<image>a <image>b"}
  for problem in ("<image>a <image>b", [message]):
    row = {
      "problem": problem,
      "images": ["a.png", "b.png"],
      "caption": "A dog.",
    }
    asked = {"problem": "Describe.", "response_key": "caption"}
    example = read(tmp_path, row, **asked)
    assert example.problem == "<image><image>Describe."
    assert (example.response, example.messages) == ("A dog.", ())
  del row["problem"]
  assert read(tmp_path, row, **asked) == example
  with pytest.raises(ValueError, match="no column 'problem'"):
    read(tmp_path, row, response_key="caption")


@pytest.mark.parametrize("answer", ["B", "(B)", "dog"])
@pytest.mark.parametrize(
  "options", [["cat", "dog"], {"A": "cat", "B": "dog", "C": None}]
)
def test_options_of_a_column_stand_below_the_problem(tmp_path, options, answer):
  row = {"problem": "Which?", "answer": answer, "choices": options}
  example = read(tmp_path, row, options_key="choices")
  assert (example.problem, example.answer) == ("Which?\nA. cat\nB. dog", "B")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"answer": "C"}, r"\[0\]: the answer 'C' is not the letter or the text"),
    ({"answer": "1"}, r"\[0\]: the answer '1' is not"),
    ({"choices": ["cat"]}, r"\[0\]: the options are \['cat'\]; expected 2"),
    ({"choices": None}, r"\[0\]: the options are None; expected a list"),
    (
      {"problem": [{"role": "user", "content": "a"}]},
      r"\[0\]: options beside messages",
    ),
  ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, changes, message):
  row = {"problem": "Which?", "answer": "A", "choices": ["cat", "dog"]}
  with pytest.raises(ValueError, match=message):
    read(tmp_path, row | changes, options_key="choices")


@pytest.mark.filterwarnings("ignore")  # of datasets' own imports
def test_verls_and_trls_rows_are_read_as_datasets_writes_them(tmp_path):
  import datasets  # slow, and of these tests alone

  datasets.disable_progress_bars()
  picture = PIL.Image.fromarray(PICTURE)
  user = {"role": "user", "content": "<image>How many?"}
  verl = {
    "data_source": "geo",
    "prompt": [user],
    "images": [picture],
    "reward_model": {"style": "rule", "ground_truth": "4"},
  }
  plain = user | {"content": "How many?"}
  trl = {"prompt": [plain], "image": picture, "solution": "4"}
  for form, row in (("verl", verl), ("trl", trl)):
    made = datasets.Dataset.from_list([row] * 3)
    made.to_parquet(tmp_path / f"{form}.parquet")
    made.save_to_disk(tmp_path / form)
    for path in (f"{form}.parquet", form):
      found = source(path=str(tmp_path / path), form=form)
      assert len(found) == 3
      assert found[1].problem == "<image>How many?"
      assert found[1].answer == "4"
      (image,) = found[1].images
      np.testing.assert_array_equal(load_picture(image), PICTURE)


@pytest.mark.filterwarnings("ignore")  # of datasets' own imports
def test_what_datasets_saves_is_what_it_reads(tmp_path):
  import datasets

  datasets.disable_progress_bars()
  picture = PIL.Image.fromarray(PICTURE)
  saved = datasets.Dataset.from_dict(
    {
      "problem": ["<image>a", "b", "<image><image>c"],
      "answer": [1, 2, 3],
      "images": [[picture], [], [picture, picture]],
      "kind": ["x", "y", None],
    },
    features=datasets.Features(
      {
        "problem": datasets.Value("string"),
        "answer": datasets.Value("int64"),
        "images": datasets.Sequence(datasets.Image()),
        "kind": datasets.Value("string"),
      }
    ),
  )
  saved.save_to_disk(tmp_path / "one", num_shards=2)
  fewer = saved.filter(lambda row: row["answer"] != 2)
  splits = datasets.DatasetDict({"train": saved, "dev": fewer})
  splits.save_to_disk(tmp_path / "several")
  (tmp_path / "hub" / "data").mkdir(parents=True)
  (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
  for name, split in splits.items():
    split.to_parquet(tmp_path / f"hub/data/{name}-00000-of-00001.parquet")
  for path, expected in (
    ("one", saved),
    ("one@train", saved),
    ("several@train", saved),
    ("several@dev", fewer),
    ("hub@train", saved),
    ("hub@dev", fewer),
    ("hub/data/*@dev", fewer),
  ):
    found = source(path=str(tmp_path / path))
    assert len(found) == len(expected)
    for example, row in zip(found, expected, strict=True):
      assert example.problem == row["problem"]
      assert example.answer == str(row["answer"])
      assert example.columns == {"kind": row["kind"]}
      pictures = [load_picture(image) for image in example.images]
      assert len(pictures) == len(row["images"])
      for ours, theirs in zip(pictures, row["images"], strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs))
  for path, message in (
    ("several", "has the splits train, dev; got ''. Choose one, as .*@train"),
    ("several@test", "has the splits train, dev; got 'test'"),
    ("one@dev", "is one data set without a split 'dev'"),
    ("hub", "has the splits train, validation; choose one, as"),
    ("hub@test", "has no split 'test'; its files are data/dev-00000"),
  ):
    with pytest.raises(ValueError, match=message):
      source(path=str(tmp_path / path))
