"""The README names what is there, and its commands' flags exist."""

import pathlib
import re
import shlex

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.arms import ARMS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")


def _overrides() -> list[str]:
  """Every --config.field=value of the README."""
  words = [
    word
    for line in README.replace("\\\n", " ").splitlines()
    if line.startswith("    ") and "--config." in line
    for word in shlex.split(line, comments=True)
  ]
  return [word for word in words if word.startswith("--config.")]


def _parse(monkeypatch, *arguments: str) -> ConfigDict:
  """The config as main sees it."""
  monkeypatch.chdir(ROOT)
  argv = ["main", *arguments]
  monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  values(argv)
  return values.config


def test_the_tree_lists_every_file_once():
  tree = re.search(r"```\nconfigs/\n.*?```", README, re.DOTALL)
  assert tree is not None
  listed, home = [], ""
  for line in tree[0].splitlines()[1:-2]:
    if line.startswith("  "):
      listed.append(home + line.split()[0])
    else:
      home = line.strip()
  files = [
    str(path.relative_to(ROOT))
    for top in ("configs", "jaxvlm", "tools")
    for path in (ROOT / top).rglob("*.*")
    if path.suffix in (".py", ".sh") and path.name != "__init__.py"
  ]
  assert sorted(listed) == sorted(files)


@pytest.mark.parametrize("path", [f"configs/{name}.py" for name in ARMS])
def test_a_config_without_a_size_is_the_embedded_default(path, monkeypatch):
  assert _parse(monkeypatch, f"--config={path}").model.scratch is not None


def test_the_readme_shows_flags():
  assert len(_overrides()) > 10


@pytest.mark.parametrize("flag", _overrides())
def test_a_flag_of_the_readme_is_taken(flag, monkeypatch):
  config = _parse(monkeypatch, "--config=configs/staged.py:files", flag)
  *parents, last = flag.removeprefix("--config.").partition("=")[0].split(".")
  for name in parents:
    config = config[name]
  assert str(config[last]) == flag.partition("=")[2]


def test_links_and_pictures_exist():
  titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
  anchors = {f"#{title.lower().replace(' ', '-')}" for title in titles}
  for target in re.findall(r"\]\(([^)]+)\)", README):
    assert (ROOT / target).is_file() or target in anchors, target
