"""Column expressions: "pass_rate > 0 and pass_rate < 1", said in a config.

Names are columns, dotted ones included; beside them stand numbers, text,
True and False, comparisons (also chained), `in` a list, and, or, not, + - * /.
Nothing else is Python's, and nothing is executed.

A missing value (None or NaN) makes what it enters unknown, as in SQL: a
comparison or a sum with it is unknown, `unknown and False` is False, `unknown
or True` is True, `not unknown` is unknown. `x is None` asks for it.
"""

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
  ast.Eq: operator.eq,
  ast.NotEq: operator.ne,
  ast.Lt: operator.lt,
  ast.LtE: operator.le,
  ast.Gt: operator.gt,
  ast.GtE: operator.ge,
  ast.In: lambda a, b: a in b,
  ast.NotIn: lambda a, b: a not in b,
}
_SUMS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}


class Expression:
  """A parsed expression, to be asked of one row after another."""

  def __init__(self, text: str):
    """Parses it.

    Raises:
      ValueError: it is none, or has what an expression does not take.
    """
    self.text = text
    try:
      self._root = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
      raise ValueError(f"{text!r} is no expression: {error}.") from error
    self.names = frozenset(self._find_names(self._root))

  def check(self, columns: Collection[str]) -> None:
    """Raises ValueError for a name that is not among these columns."""
    for name in sorted(self.names):
      if name not in columns:
        raise ValueError(
          f"{self.text!r}: no column {name!r}; there are "
          f"{', '.join(sorted(columns)) or 'none'}."
        )

  def __call__(self, columns: Mapping[str, Any]) -> Any:
    """The value for a row; None: unknown.

    Raises:
      ValueError: its values cannot be compared or computed so.
    """
    return self._value(self._root, columns)

  def truth(self, columns: Mapping[str, Any]) -> bool | None:
    """The value as True, False or None; ValueError where it is another."""
    return self._truth(self._root, columns)

  def number(self, columns: Mapping[str, Any]) -> float | None:
    """The value as a number or None; ValueError where it is another."""
    value = self(columns)
    if value is not None and not isinstance(value, int | float):
      self._refuse(self._root, f"is {value!r}; expected a number")
    return None if value is None else float(value)

  def _find_names(self, node: ast.expr) -> list[str]:
    """The columns below a node; refuses what is not taken."""
    match node:
      case ast.Name() | ast.Attribute():
        return [self._name(node)]
      case ast.Constant(value=bool() | int() | float() | str()):
        return []
      case ast.BoolOp():
        below = node.values
      case ast.UnaryOp(op=ast.Not() | ast.USub()):
        below = [node.operand]
      case ast.BinOp() if type(node.op) in _SUMS:
        below = [node.left, node.right]
      case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
        if not _is_none(node.comparators[0]):
          self._refuse(node, "`is` is for `is None` alone; use ==")
        below = [node.left]
      case ast.Compare() if all(type(op) in _COMPARISONS for op in node.ops):
        below = [node.left]
        for op, right in zip(node.ops, node.comparators, strict=True):
          below += self._right(op, right)
      case _:
        self._refuse(node, "is not taken in an expression")
    return [name for part in below for name in self._find_names(part)]

  def _right(self, op: ast.cmpop, right: ast.expr) -> list[ast.expr]:
    if not isinstance(op, ast.In | ast.NotIn):
      return [right]
    if not isinstance(right, ast.Tuple | ast.List) or not all(
      isinstance(one, ast.Constant) for one in right.elts
    ):
      self._refuse(right, "is no list of values; write `x in ('a', 'b')`")
    return list(right.elts)

  def _name(self, node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
      return f"{self._name(node.value)}.{node.attr}"
    if not isinstance(node, ast.Name):
      self._refuse(node, "is not taken in an expression")
    return node.id

  def _value(self, node: ast.expr, columns: Mapping[str, Any]) -> Any:
    match node:
      case ast.Constant():
        return node.value
      case ast.Name() | ast.Attribute():
        value = columns.get(self._name(node))
        missing = isinstance(value, float) and math.isnan(value)
        return None if missing else value
      case ast.BoolOp():
        return self._joined(node, columns)
      case ast.UnaryOp(op=ast.Not()):
        truth = self._truth(node.operand, columns)
        return None if truth is None else not truth
      case ast.UnaryOp():
        value = self._value(node.operand, columns)
        return self._apply(node, operator.neg, value)
      case ast.BinOp():
        sides = [self._value(side, columns) for side in (node.left, node.right)]
        return self._apply(node, _SUMS[type(node.op)], *sides)
      case ast.Compare():
        return self._compared(node, columns)
    raise AssertionError(node)

  def _compared(
    self, node: ast.Compare, columns: Mapping[str, Any]
  ) -> bool | None:
    left = self._value(node.left, columns)
    if isinstance(node.ops[0], ast.Is | ast.IsNot):
      return (left is None) == isinstance(node.ops[0], ast.Is)
    unknown = False
    for op, comparator in zip(node.ops, node.comparators, strict=True):
      if isinstance(comparator, ast.Tuple | ast.List):
        right: Any = [self._value(one, columns) for one in comparator.elts]
      else:
        right = self._value(comparator, columns)
      found = self._apply(node, _COMPARISONS[type(op)], left, right)
      if found is False:
        return False
      unknown |= found is None
      left = right
    return None if unknown else True

  def _joined(
    self, node: ast.BoolOp, columns: Mapping[str, Any]
  ) -> bool | None:
    settles = isinstance(node.op, ast.Or)
    unknown = False
    for part in node.values:
      truth = self._truth(part, columns)
      if truth is settles:
        return settles
      unknown |= truth is None
    return None if unknown else not settles

  def _truth(self, node: ast.expr, columns: Mapping[str, Any]) -> bool | None:
    value = self._value(node, columns)
    if value is not None and not isinstance(value, bool):
      self._refuse(node, f"is {value!r}; expected true or false, as `x > 0`")
    return value

  def _apply(
    self, node: ast.expr, function: Callable[..., Any], *values: Any
  ) -> Any:
    if any(value is None for value in values):
      return None
    try:
      return function(*values)
    except (TypeError, ArithmeticError) as error:
      self._refuse(node, f"cannot be computed: {error}", error)

  def _refuse(
    self, node: ast.AST, why: str, error: Exception | None = None
  ) -> NoReturn:
    part = ast.unparse(node)
    place = "" if part == self.text.strip() else f"{part!r} "
    raise ValueError(f"{self.text!r}: {place}{why}.") from error


def _is_none(node: ast.expr) -> bool:
  return isinstance(node, ast.Constant) and node.value is None
