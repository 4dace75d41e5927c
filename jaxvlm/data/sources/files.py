"""Rows of files: parquet, JSON, JSONL, and what the datasets library saves."""

from collections.abc import Sequence

from jaxvlm.data.forms import read_examples
from jaxvlm.data.tables import open_tables
from jaxvlm.types import Example


def source(
  *,
  path: str | Sequence[str],
  form: str = "easyr1",
  problem_key: str = "",
  answer_key: str = "",
  images_key: str = "",
  response_key: str = "",
  options_key: str = "",
  image_dir: str = "",
  problem: str = "",
) -> Sequence[Example]:
  """Reads files; pictures are opened when a row is used.

  Args:
    path: a file, glob pattern or directory, or several; @split after it takes
      one split (`jaxvlm.data.tables`).
    form: whose rows they are: a name in `jaxvlm.data.forms.FORMS`.
    problem_key: column of the text or the messages; "object.column" for one
      of an object. "": the form's, as for the next two.
    answer_key: column of the answer, text or a number.
    images_key: column of the pictures; rows without any are text alone.
    response_key: column of a written response, for SFT; "": there is none.
    options_key: column of a list of options (or an object of them by letter),
      which become lines "A. text" below the problem; "": there is none.
    image_dir: where relative paths start; "": beside the file.
    problem: asked of every row in place of its own, after its pictures; "":
      each row's own.

  Raises:
    ValueError: a missing or broken file, no rows, a missing column, or a row
      without problem or answer or with a video; names file and row.
  """
  examples = read_examples(
    open_tables(path),
    form=form,
    problem_key=problem_key,
    answer_key=answer_key,
    images_key=images_key,
    response_key=response_key,
    options_key=options_key,
    image_dir=image_dir,
    problem=problem,
  )
  if not len(examples):
    raise ValueError(f"files: no rows in {path!r}.")
  return examples
