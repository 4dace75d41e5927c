"""The numbers of a run as TensorBoard events."""

import os
import pathlib
import secrets
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jaxvlm import paths

_SEND = 30.0  # seconds between copies of a growing file to a bucket


class Events:
  """TensorBoard events, written at once; to a bucket every half a minute.

  tensorboardX's SummaryWriter hands events to a thread, which loses the last
  of them at a kill and blocks its caller for good when the disk is full.
  """

  def __init__(self, directory: pathlib.Path, resume_step: int) -> None:
    self._directory, self._sent = directory, time.monotonic()
    if paths.remote(directory):
      self._directory = paths.here()
    self._directory.mkdir(exist_ok=True)
    # The name holds the second; two starts within it must not collide.
    suffix = f".{os.getpid()}.{secrets.token_hex(4)}"
    self._place = directory
    self._writer = EventsWriter(str(self._directory / "events"), suffix)
    # TensorBoard drops what earlier files hold from this step on.
    start = SessionLog(status=SessionLog.START)
    self._write(Event(step=resume_step + 1, session_log=start))

  def write(self, step: int, numbers: Mapping[str, float]) -> None:
    values = [
      Summary.Value(tag=name, simple_value=number)
      for name, number in numbers.items()
    ]
    self._write(Event(step=step, summary=Summary(value=values)))

  def close(self) -> None:
    self._writer.close()
    self._send()

  def _write(self, event: Event) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)
    self._writer.flush()
    if time.monotonic() - self._sent > _SEND:
      self._send()

  def _send(self) -> None:
    self._sent = time.monotonic()
    if self._place != self._directory:
      for file in self._directory.iterdir():
        paths.write(self._place / file.name, file.read_bytes())
