"""Files of this machine and of buckets, gs://BUCKET/...: what differs is here.

A path is a pathlib.Path, or epath's twin of it where it is an address. In a
bucket a file appears whole or not at all, none grows, and a directory is no
thing of its own: it is there as long as it has files.
"""

import atexit
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

Path = str | os.PathLike[str]
_PIECE = 2**24  # bytes that are copied at once


def path(name: Path) -> Any:
  """What a user's path names: absolute, "~" expanded, or in a bucket.

  Raises:
    ValueError: an address that is not gs://.
  """
  text = os.fspath(name)
  if remote(text):
    try:
      _ask("/".join(text.split("/")[:3]))
    except ImportError as error:
      raise ValueError(
        f"{text}: {error}. `pip install 'jaxvlm[gcs]'` reads and writes buckets."
      ) from error
    return epath.Path(text)
  if "://" in text:
    raise ValueError(
      f"{text}: expected a path of this machine, or gs://BUCKET/..."
    )
  return pathlib.Path(text).expanduser().absolute()


@functools.cache
def _ask(bucket: str) -> None:
  """Raises ImportError where what reads buckets is not installed."""
  epath.Path(bucket).exists()


def local_path(name: str) -> pathlib.Path:
  """A path of this machine, for what reads and writes nowhere else.

  Raises:
    ValueError: an address.
  """
  if "://" in name:
    raise ValueError(f"{name}: expected a path of this machine; copy it here.")
  return pathlib.Path(name)


def remote(name: Path) -> bool:
  """Whether a path is in a bucket."""
  return os.fspath(name).startswith("gs://")


def files(directory: Any) -> Iterator[Any]:
  """All files below a directory."""
  for entry in sorted(directory.iterdir()):
    if entry.is_dir():
      yield from files(entry)
    else:
      yield entry


def write(file: Any, content: bytes) -> None:
  """Replaces a file in one step: a reader sees the old or the new one."""
  if remote(file):
    file.write_bytes(content)
    return
  aside = file.with_name(f".{file.name}.{os.getpid()}")
  try:
    aside.write_bytes(content)
    put(aside, file)
  finally:
    aside.unlink(missing_ok=True)


def put(aside: pathlib.Path, file: Any) -> None:
  """Gives a file that was written aside its place, in one step."""
  if remote(file):
    with open(aside, "rb") as read, file.open("wb") as write:
      shutil.copyfileobj(read, write, _PIECE)
    return
  with open(aside, "rb") as stream:
    os.fsync(stream.fileno())
  os.replace(aside, file)


def append(file: Any, content: bytes) -> None:
  """Puts more at the end of a file, or makes it."""
  if remote(file):
    before = file.read_bytes() if file.exists() else b""
    file.write_bytes(before + content)
    return
  # Opened each time: a full disk raises here and leaves nothing buffered that
  # would raise once more at close.
  with open(file, "ab") as stream:
    stream.write(content)


def remove(directory: Any) -> None:
  """Takes away a directory and all below, if it is there."""
  if not remote(directory):
    shutil.rmtree(directory, ignore_errors=True)
  elif directory.exists():
    directory.rmtree()


def move(directory: Any, place: Any) -> None:
  """Gives a directory another name, of which there is nothing yet."""
  if not remote(directory):
    directory.rename(place)
    return
  for file in list(files(directory)):
    file.copy(place / file.relative_to(directory))
  directory.rmtree()


def local(name: Any, leave: Collection[str] = ()) -> pathlib.Path:
  """A file or directory on this machine; one of a bucket is copied, once.

  Args:
    name: of `path`.
    leave: directories within that are made and not filled.
  """
  if not remote(name):
    return pathlib.Path(name)
  return _copied(epath.Path(name), tuple(leave))


@functools.cache
def _copied(source: Any, leave: tuple[str, ...]) -> pathlib.Path:
  found = here() / source.name
  _copy(source, found, leave)
  return found


def here() -> pathlib.Path:
  """An empty directory of this machine, for as long as this process lives."""
  home = tempfile.mkdtemp(prefix="jaxvlm_")
  atexit.register(shutil.rmtree, home, ignore_errors=True)
  return pathlib.Path(home)


def _copy(source: Any, here: pathlib.Path, leave: Collection[str]) -> None:
  if not source.is_dir():
    with source.open("rb") as read, open(here, "wb") as write:
      shutil.copyfileobj(read, write, _PIECE)
    return
  here.mkdir()
  for entry in source.iterdir():
    if entry.name in leave:
      (here / entry.name).mkdir()
    else:
      _copy(entry, here / entry.name, leave)
