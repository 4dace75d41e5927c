"""Progress in the terminal: live bars, or plain lines where there is none."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import (
  BarColumn,
  Progress,
  Task,
  TaskID,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")

LINE_SECONDS = 5.0  # plain lines come no closer than this
PLAIN_WIDTH = 100  # columns where the output is no terminal

# What a step shows: record section, name there, label, format.
_FIELDS = (
  ("metrics", "reward", "reward", "{:.3f}"),
  ("metrics", "loss", "loss", "{:.3f}"),
  ("metrics", "accuracy", "accuracy", "{:.1%}"),
  ("metrics", "length", "length", "{:.1f}"),
  ("metrics", "kl", "KL", "{:.4f}"),
  ("timing", "tokens_per_second", "tokens/s", "{:,.0f}"),
)


def make_console() -> Console:
  """A console on stdout; a fixed width where that is not a terminal."""
  console = Console(highlight=False)
  if not console.is_terminal:
    console = Console(highlight=False, width=PLAIN_WIDTH)
  return console


class Display:
  """What is going on, for a person.

  `with Display(console) as display:` then, in any order, `with
  display.stage(...)` around the steps of a stage, `display.progress(items,
  "read rows")` around long work, `display.print(...)` for messages. Hand
  `display.show` to `Logger`: each record moves the bar of its stage.

  On a terminal every stage keeps a bar, with the newest numbers below it.
  Elsewhere lines are printed instead, one in `LINE_SECONDS` at most, and the
  last of each stage or task always.
  """

  def __init__(self, console: Console) -> None:
    self.console = console
    self._live = console.is_terminal
    self._bars = _Bars(
      TextColumn("{task.description:<20}", markup=False),
      BarColumn(bar_width=20),
      TextColumn("{task.completed:>5.0f}/{task.total:<5.0f}", style="green"),
      TimeElapsedColumn(),
      TextColumn("left", style="dim"),
      TimeRemainingColumn(),
      console=console,
      refresh_per_second=4,
      disable=not self._live,
    )
    self._stages: dict[str, TaskID] = {}
    self._last_line = -float("inf")

  def __enter__(self) -> "Display":
    self._bars.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._bars.stop()

  def print(self, *renderables: RenderableType) -> None:
    """Prints above the bars; [brackets] in text are text."""
    self.console.print(*renderables, markup=False)

  @contextlib.contextmanager
  def stage(self, name: str, *, steps: int, done: int) -> Iterator[None]:
    """A bar of `steps` steps, `done` of them by an earlier process."""
    task = self._bars.add_task(name, total=steps, completed=done, numbers="")
    self._stages[name] = task
    self._last_line = -float("inf")
    try:
      yield
    finally:
      # The bar stays on the screen and its clock stands still.
      self._bars.stop_task(task)
      del self._stages[name]

  def show(self, record: dict[str, Any]) -> None:
    """Shows a record of metrics.jsonl, as `Logger` writes it."""
    if record["kind"] == "eval":
      self.print(_evaluation_line(record))
    elif (task := self._stages.get(record["stage"])) is not None:
      self._bars.update(
        task, completed=record["step"], numbers=_numbers(record)
      )
      self._print_line(task)

  @contextlib.contextmanager
  def task(
    self, description: str, *, total: int, done: int = 0
  ) -> Iterator[Callable[[int], None]]:
    """A bar for other long work, `done` of it by an earlier process.

    Yields what advances it by n.
    """
    task = self._bars.add_task(
      description, total=total, completed=done, numbers=""
    )
    self._last_line = time.monotonic()

    def advance(count: int) -> None:
      self._bars.advance(task, count)
      self._print_line(task)

    try:
      yield advance
    finally:
      self._bars.remove_task(task)

  def progress(
    self, items: Iterable[Item], description: str, *, total: int
  ) -> Iterator[Item]:
    """The items, with a bar over `total` of them while they are used."""
    with self.task(description, total=total) as advance:
      for item in items:
        yield item
        advance(1)

  def _print_line(self, task_id: TaskID) -> None:
    task = self._bars.tasks[self._bars.task_ids.index(task_id)]
    now = time.monotonic()
    if self._live or (
      now - self._last_line < LINE_SECONDS and not task.finished
    ):
      return
    self._last_line = now
    words = [
      f"{task.description:<18} {task.completed:.0f}/{task.total:.0f}",
      *filter(None, [task.fields["numbers"]]),
      f"{_clock(task.elapsed)} elapsed",
    ]
    if not task.finished and task.time_remaining is not None:
      words.append(f"{_clock(task.time_remaining)} left")
    self.console.print("  ".join(words), soft_wrap=True, markup=False)


class _Bars(Progress):
  """Bars with a line of numbers below each task that has them."""

  def get_renderables(self) -> Iterator[RenderableType]:
    # The numbers need the whole width, so each bar is a table of its own;
    # columns of fixed width keep them aligned.
    for task in self.tasks:
      yield Group(self.make_tasks_table([task]), *_numbers_below(task))


def _numbers_below(task: Task) -> Iterator[RenderableType]:
  if task.fields["numbers"]:
    line = Text(task.fields["numbers"], style="cyan", overflow="ellipsis")
    yield Padding(line, (0, 0, 0, 2))


def _numbers(record: dict[str, Any]) -> str:
  words = []
  for section, name, label, form in _FIELDS:
    if name == "loss" and "reward" in record["metrics"]:
      continue  # a policy gradient's loss says nothing about progress
    if name in record[section]:
      value = record[section][name]
      text = "nan" if value is None else form.format(value)
      words.append(f"{label} {text}")
  return "  ".join(words)


def _evaluation_line(record: dict[str, Any]) -> Text:
  """Mean@k and greedy accuracy of each capability, in percent."""
  line = Text("evaluation ", style="bold")
  line.append(f"after step {record['global_step']} ({record['stage']}):")
  scores: dict[str, list[str]] = {}
  for name, value in record["metrics"].items():
    capability, _, kind = name.partition("/")
    if kind == "greedy" or kind.startswith("mean@"):
      text = "nan" if value is None else f"{100 * value:.1f}"
      scores.setdefault(capability, []).append(f"{kind} {text}")
  for capability, words in scores.items():
    line.append(f"\n  {capability:<20} {'  '.join(words)}", style="not bold")
  return line


def _clock(seconds: float | None) -> str:
  return str(datetime.timedelta(seconds=int(seconds or 0)))
