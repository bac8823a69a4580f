"""What an exported program takes for granted of its inputs, checked before it runs.

torch specialises a program on everything that was not declared dynamic: an axis is a fixed number or an expression in
symbols; relations between symbols are *guards*, kept as text of Python expressions. Nothing of that text is evaluated
as Python: only arithmetic and comparisons of sizes are read, and anything else refuses.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature_engine.errors import EngineError
from curvature_engine.operators import LAYOUT_QUESTIONS

_DYNAMIC = "export it with dynamic_shapes, e.g. {0: torch.export.Dim.DYNAMIC} for each input's batch axis"


class InputShapes:
    """The sizes and dtypes that the inputs must have.

    Args:
        inputs: each tensor input's name for messages, sizes (numbers, or expressions' texts), and dtype.
        ranges: symbol → (least, largest), None for no bound.
        guards: relations that must hold, in terms of `L['input']`.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[str, Sequence[int | str], torch.dtype]],
        ranges: Mapping[str, tuple[int | None, int | None]],
        guards: Sequence[str],
    ) -> None:
        self._inputs, self._ranges, self._guards = inputs, ranges, guards
        self.asks_layout = any(question in guard for guard in guards for question in LAYOUT_QUESTIONS)

    @property
    def fixed_samples(self) -> int | None:
        """The first input's first size, where no axis of any input may vary."""
        every = [size for _, sizes, _ in self._inputs for size in sizes]
        first = next((sizes[0] for _, sizes, _ in self._inputs if sizes), None)
        return first if isinstance(first, int) and all(isinstance(size, int) for size in every) else None

    def check(self, values: Sequence[Any], roots: Mapping[str, Any]) -> None:
        """Refuse inputs that the program was not made for.

        Args:
            values: one per tensor input.
            roots: forward's own arguments, by name, as guards know them.

        Raises:
            EngineError: `invalid_inputs`.
        """
        symbols: dict[str, int] = {}
        later: list[tuple[str, int, str, int]] = []
        for (name, sizes, dtype), value in zip(self._inputs, values, strict=True):
            _check_form(name, sizes, dtype, value)
            for axis, (expected, size) in enumerate(zip(sizes, value.shape, strict=True)):
                if isinstance(expected, int):
                    if size != expected:
                        raise _fixed(name, axis, expected, size)
                elif (symbol := _symbol(expected)) is not None and symbol not in symbols:
                    symbols[symbol] = size
                else:
                    later.append((name, axis, expected, size))
        for name, axis, expected, size in later:
            _check_expression(name, axis, expected, size, symbols)
        self._check_ranges(symbols)
        for guard in self._guards:
            if not _holds(guard, roots):
                raise _broken(f"the exported program takes for granted that {guard}")

    def _check_ranges(self, symbols: Mapping[str, int]) -> None:
        for symbol, size in symbols.items():
            least, largest = self._ranges.get(symbol, (None, None))
            if (least is not None and size < least) or (largest is not None and size > largest):
                bounds = f"from {least} to {'any' if largest is None else largest}"
                message = f"the exported program takes sizes {bounds} along an axis that is {size} here"
                # torch.export takes 0 and 1 for sizes apart, so that no dynamic axis mends this.
                raise _broken(message, "give more samples, or script the module" if least == 2 and size == 1 else None)


def _check_form(name: str, sizes: Sequence[int | str], dtype: torch.dtype, value: Any) -> None:
    came = f"{value.dtype} with {value.dim()} axes" if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or value.dim() != len(sizes) or value.dtype != dtype:
        raise EngineError(
            "invalid_inputs",
            f"the program was exported for input {name} of {dtype} with {len(sizes)} axes; got {came}",
            param=f"inputs.{name}",
            remedy="give a tensor of that dtype and rank, or export the model anew with such inputs",
        )


def _fixed(name: str, axis: int, expected: int, size: int) -> EngineError:
    what = "batch size is baked in" if axis == 0 else "size is baked in"
    return EngineError(
        "invalid_inputs",
        f"input {name} has {size} along axis {axis}; the program was exported for {expected} alone (its {what})",
        param=f"inputs.{name}",
        remedy=f"give {expected}, or {_DYNAMIC}",
    )


def _broken(message: str, remedy: str | None = None) -> EngineError:
    remedy = remedy or f"give other sizes, or {_DYNAMIC}"
    return EngineError("invalid_inputs", message, param="inputs", remedy=remedy)


def _check_expression(name: str, axis: int, text: str, size: int, symbols: dict[str, int]) -> None:
    expression = ast.parse(text, mode="eval").body
    free = _free_symbols(expression) - symbols.keys()
    if len(free) == 1:  # the symbol stands on no axis alone: two values of it tell a line that it may lie on
        symbol = free.pop()
        at_0, at_1, at_2 = (_expressed(expression, {**symbols, symbol: at}) for at in (0, 1, 2))
        slope = at_1 - at_0
        if slope and at_2 - at_1 == slope and (size - at_0) % slope == 0:
            symbols[symbol] = (size - at_0) // slope
    if _free_symbols(expression) - symbols.keys() or _expressed(expression, symbols) != size:
        where = ", ".join(f"{symbol} = {value}" for symbol, value in symbols.items())
        raise _broken(f"input {name} has {size} along axis {axis}; the exported program expects {text} with {where}")


# Expressions in sympy's own notation, e.g. Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(1))


def _symbol(text: str) -> str | None:
    """The symbol that an expression is, where it is but one."""
    node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Symbol":
        return str(ast.literal_eval(node.args[0]))
    return None


def _free_symbols(node: ast.expr) -> set[str]:
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return {str(ast.literal_eval(c.args[0])) for c in calls if isinstance(c.func, ast.Name) and c.func.id == "Symbol"}


_SYMPY: dict[str, Callable[..., Any]] = {
    "Integer": int,
    "Add": lambda *terms: sum(terms),
    "Mul": lambda *factors: math.prod(factors),
    "Pow": operator.pow,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Max": max,
    "Min": min,
}


def _expressed(node: ast.expr, symbols: Mapping[str, int]) -> int:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "Symbol":
            return symbols[str(ast.literal_eval(node.args[0]))]
        if node.func.id == "Integer":
            return int(ast.literal_eval(node.args[0]))
        if node.func.id in _SYMPY:
            return int(_SYMPY[node.func.id](*(_expressed(argument, symbols) for argument in node.args)))
    raise _unchecked(ast.unparse(node))


def _unchecked(text: str) -> EngineError:
    return EngineError(
        "unsupported_model",
        f"the exported program's condition on its inputs cannot be checked: {text:.200}",
        param="model",
        remedy="export it with simpler dynamic shapes, or script it",
    )


# Guards: Python expressions such as L['x'].size()[0] == L['y'].size()[1]

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_METHODS: dict[str, Callable[[Tensor], Any]] = {
    "size": lambda t: tuple(t.shape),
    "stride": lambda t: t.stride(),
    "storage_offset": lambda t: t.storage_offset(),
    "dim": lambda t: t.dim(),
}


def _holds(guard: str, roots: Mapping[str, Any]) -> bool:
    try:
        return bool(_value(ast.parse(guard, mode="eval").body, roots))
    except (KeyError, IndexError, TypeError, SyntaxError, ZeroDivisionError) as error:
        raise _unchecked(guard) from error


def _value(node: ast.expr, roots: Mapping[str, Any]) -> Any:
    """A guard's value, of the few forms that guards have."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == "L":
        return roots
    if isinstance(node, ast.Subscript):
        return _value(node.value, roots)[ast.literal_eval(node.slice)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
        return _method(node.func, [_value(argument, roots) for argument in node.args], roots)
    if isinstance(node, ast.BoolOp):
        values = (_value(each, roots) for each in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand, roots))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, roots), _value(node.right, roots))
    if isinstance(node, ast.Compare) and all(type(op) in _OPERATORS for op in node.ops):
        values_ = [_value(each, roots) for each in (node.left, *node.comparators)]
        pairs = zip(node.ops, values_, values_[1:], strict=False)
        return all(_OPERATORS[type(op)](a, b) for op, a, b in pairs)
    raise _unchecked(ast.unparse(node))


def _method(called: ast.Attribute, arguments: Sequence[Any], roots: Mapping[str, Any]) -> Any:
    owner = _value(called.value, roots)
    if isinstance(owner, Tensor) and called.attr in _METHODS:
        found = _METHODS[called.attr](owner)
        return found[arguments[0]] if arguments else found
    raise _unchecked(ast.unparse(called))
