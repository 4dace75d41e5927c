"""A stand-in for buckets: gs://NAME/... is a directory below HOME.

`Bucket` takes gcsfs's place below epath, `serve` answers what tensorstore asks
Google, and as in a bucket no file grows, none is renamed in place, and a
directory is there as long as it has files. As a script it is main, on buckets
below the HOME of the environment.
"""

import contextlib
import http.server
import json
import os
import pathlib
import re
import sys
import threading
import types
import urllib.parse

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
  """What epath sees, with the paths of a bucket."""

  home = ""

  @classmethod
  def _strip_protocol(cls, path):
    path = os.fspath(path)
    if path.startswith(("gs://", "gcs://")):
      path = f"{cls.home}/{path.partition('://')[2]}"
    return path.rstrip("/")

  def glob(self, path, **options):
    found = super().glob(path, **options)
    return [name.removeprefix(f"{self.home}/") for name in found]

  def isdir(self, path):
    here = pathlib.Path(self._strip_protocol(path))
    return any(one.is_file() for one in here.rglob("*"))

  def exists(self, path, **options):
    return os.path.isfile(self._strip_protocol(path)) or self.isdir(path)

  def _open(self, path, mode="rb", **options):
    assert "a" not in mode, f"{path}: no file of a bucket grows"
    if "w" in mode:
      pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    return super()._open(path, mode, **options)

  def mkdir(self, path, create_parents=True, **options):
    pass  # a bucket has no empty directories

  makedirs = mkdir

  def rename(self, *paths, **options):
    raise AssertionError(f"{paths}: a bucket renames nothing")

  mv = rename


def install(home):
  """Lets gs:// of this process be directories below `home`."""
  Bucket.home = str(home)
  fsspec.register_implementation("gcs", Bucket, clobber=True)
  # Orbax asks Google whether a bucket has directories of its own.
  client = types.SimpleNamespace(get_bucket=lambda name: None)
  storage = types.ModuleType("google.cloud.storage")
  storage.Client = lambda: client
  cloud = types.ModuleType("google.cloud")
  cloud.storage = storage
  sys.modules |= {"google.cloud": cloud, "google.cloud.storage": storage}


@contextlib.contextmanager
def serve(home):
  """Yields the environment in which tensorstore's gs:// is `home` too."""
  handler = type("Handler", (_Handler,), {"home": pathlib.Path(home)})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
      "HOME_OF_BUCKETS": str(home),
      "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
    }
    server.shutdown()
    thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  """The part of Google Cloud Storage's JSON API that tensorstore uses."""

  protocol_version = "HTTP/1.1"
  home: pathlib.Path

  def log_message(self, *_):
    pass

  def _asked(self):
    """The bucket's directory, the object's name and the query."""
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    found = re.match(r"(?:/upload)?/storage/v1/b/([^/]+)/o/?(.*)", url.path)
    name = urllib.parse.unquote(found[2]) or query.get("name", "")
    return self.home / found[1], name, query

  def _answer(self, status, content=b"", **headers):
    self.send_response(status)
    self.send_header("Content-Length", str(len(content)))
    for key, value in headers.items():
      self.send_header(key.replace("_", "-"), value)
    self.end_headers()
    self.wfile.write(content)

  def do_GET(self):
    bucket, name, query = self._asked()
    if not name:
      self._answer(200, json.dumps(_listed(bucket, query)).encode())
      return
    file = bucket / name
    if not file.is_file():
      self._answer(404)
      return
    content, generation = file.read_bytes(), _generation(file)
    if query.get("ifGenerationNotMatch") == generation:
      self._answer(304)
      return
    status, headers = 200, {"x_goog_generation": generation}
    if part := re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
      size = len(content)
      start = int(part[1]) if part[1] else max(size - int(part[2]), 0)
      end = int(part[2]) + 1 if part[1] and part[2] else size
      content = content[start:end]
      status = 206
      headers["Content_Range"] = f"bytes {start}-{min(end, size) - 1}/{size}"
    self._answer(status, content, **headers)

  def do_POST(self):
    bucket, name, query = self._asked()
    content = self.rfile.read(int(self.headers["Content-Length"]))
    file = bucket / name
    wanted = query.get("ifGenerationMatch")
    if wanted is not None and wanted != _generation(file):
      self._answer(412)
      return
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{threading.get_ident()}")
    aside.write_bytes(content)
    aside.rename(file)
    self._answer(200, json.dumps(_described(bucket, name)).encode())

  def do_DELETE(self):
    bucket, name, _ = self._asked()
    (bucket / name).unlink(missing_ok=True)
    self._answer(204)


def _generation(file):
  return str(file.stat().st_mtime_ns) if file.is_file() else "0"


def _described(bucket, name):
  file = bucket / name
  return {
    "name": name,
    "bucket": bucket.name,
    "size": str(file.stat().st_size),
    "generation": _generation(file),
    "metageneration": "1",
    "updated": "2026-01-01T00:00:00Z",
    "timeCreated": "2026-01-01T00:00:00Z",
  }


def _listed(bucket, query):
  files = (one for one in bucket.rglob("*") if one.is_file())
  names = sorted(str(one.relative_to(bucket)) for one in files)
  start, end = (
    query.get("startOffset", ""),
    query.get("endOffset", "\U0010ffff"),
  )
  prefix = query.get("prefix", "")
  found = [n for n in names if n.startswith(prefix) and start <= n < end]
  return {"items": [_described(bucket, name) for name in found]}


if __name__ == "__main__":
  from jaxvlm import main

  install(os.environ["HOME_OF_BUCKETS"])
  main.cli()
