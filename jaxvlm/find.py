"""How a config names code: a name is a file of this package, or a path."""

import importlib
import importlib.util
import pathlib
import pkgutil
from collections.abc import Callable
from typing import Any


def find(package: str, name: str, attribute: str) -> Callable[..., Any]:
  """The callable that `name` stands for.

  Args:
    package: subpackage of jaxvlm, as "rewards" or "data.sources".
    name: a module there ("format"), or a user's "file.py:function".
    attribute: what to take from a module of the package.

  Raises:
    ValueError: no such module, file or attribute; says what there is.
  """
  if ".py:" in name:
    path, _, attribute = name.rpartition(":")
    return _attribute(_load(path), attribute, name)
  home = importlib.import_module(f"jaxvlm.{package}")
  known = sorted(m.name for m in pkgutil.iter_modules(home.__path__))
  if name not in known:
    raise ValueError(
      f"{package}: no {name!r}. There are: {', '.join(known)}; "
      "or give your own as path/to/file.py:function."
    )
  module = importlib.import_module(f"jaxvlm.{package}.{name}")
  return _attribute(module, attribute, name)


def _load(path: str) -> Any:
  file = pathlib.Path(path).expanduser().resolve()
  if not file.is_file():
    raise ValueError(f"{path}: no such file (looked for {file}).")
  spec = importlib.util.spec_from_file_location(file.stem, file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _attribute(module: Any, attribute: str, name: str) -> Callable[..., Any]:
  if not callable(getattr(module, attribute, None)):
    raise ValueError(f"{name}: has no function {attribute!r}.")
  return getattr(module, attribute)
