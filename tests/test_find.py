"""A name in a config is a file."""

import pytest

from jaxvlm.find import find
from jaxvlm.rewards import exact


def test_a_name_is_a_module_of_the_package():
  assert find("rewards", "exact", "reward") is exact.reward


def test_an_unknown_name_lists_what_there_is():
  with pytest.raises(
    ValueError, match=r"rewards: no 'exakt'. There are: .*exact, format"
  ):
    find("rewards", "exakt", "reward")


def test_a_path_is_a_users_own_function(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("def length(completion, example):\n  return len(completion)")
  assert find("rewards", f"{file}:length", "reward")("four", None) == 4


def test_a_relative_path_is_read_from_the_working_directory(
  tmp_path, monkeypatch
):
  (tmp_path / "mine.py").write_text("one = lambda: 1")
  monkeypatch.chdir(tmp_path)
  assert find("rewards", "mine.py:one", "reward")() == 1


def test_a_missing_file_is_named_with_the_place_that_was_looked_at(tmp_path):
  with pytest.raises(ValueError, match=rf"no such file.*{tmp_path}/gone\.py"):
    find("rewards", f"{tmp_path}/gone.py:score", "reward")


@pytest.mark.parametrize("text", ["", "score = 3"])
def test_a_file_without_the_function_is_refused(tmp_path, text):
  file = tmp_path / "mine.py"
  file.write_text(text)
  with pytest.raises(ValueError, match="has no function 'score'"):
    find("rewards", f"{file}:score", "reward")


def test_a_module_without_the_attribute_is_refused():
  with pytest.raises(ValueError, match="exact: has no function 'source'"):
    find("rewards", "exact", "source")
