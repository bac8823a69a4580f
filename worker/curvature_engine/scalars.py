"""TorchScript operators on Python values: numbers, strings, lists, tuples and dictionaries.

Containers are shared by reference in TorchScript, so these run on Python's own containers: passing a list through
the dispatcher would copy it.
"""

import math
import operator
from collections.abc import Callable
from typing import Any


def _append(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return values


def _set_item(container: Any, key: Any, value: Any) -> Any:
    container[key] = value
    return container


def _delete(container: Any, key: Any) -> None:
    del container[key]


def _slice(values: Any, start: int | None, end: int | None, step: int) -> Any:
    return values[slice(start, end, step)]


def _truncated_division(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _derive_index(index: int, start: int, step: int) -> int:
    return start + index * step


def _range_length(start: int, end: int, step: int) -> int:
    return len(range(start, end, step))


def _sort(values: list[Any], reverse: bool = False) -> None:
    values.sort(reverse=reverse)


def _pop(container: Any, *key: Any) -> Any:
    return container.pop(*key)


def _round(value: float, *digits: int) -> float:
    return float(round(value, *digits))


def _list(values: Any) -> list[Any]:
    return list(values)


def _format(template: str, *values: Any) -> str:
    """TorchScript replaces each plain `{}` and nothing else; Python's own would follow attributes."""
    parts = template.split("{}")
    filled = [str(value) for value in values[: len(parts) - 1]] + ["{}"] * (len(parts) - 1 - len(values))
    return "".join(part + value for part, value in zip(parts, [*filled, ""], strict=True))


def _division(a: float, b: float) -> float:
    """As C++ divides floating-point numbers."""
    if b != 0:
        return a / b
    return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1.0, b)


def _floor_division(a: float, b: float) -> float:
    if b == 0 and (isinstance(a, float) or isinstance(b, float)):
        return _division(a, b)
    return a // b


def _power(a: float, b: float) -> float:
    """As C++'s `pow`; zero to a negative power is an error there, too."""
    try:
        return math.pow(a, b)
    except OverflowError:
        return -math.inf if a < 0 and b % 2 == 1 else math.inf
    except ValueError:
        if a == 0:
            raise
        return math.nan


def integer_power(a: int, b: int) -> int:
    """Whole numbers to a whole number, low 64 bits alone: the exact power may not fit any memory."""
    return pow(a, b, 2**64) if b >= 0 else int(_power(a, b))


def _ieee(function: Callable[[float], float]) -> Callable[[float], float]:
    """A function of Python's with C++'s infinities and NaN instead of exceptions."""

    def evaluated(x: float) -> float:
        try:
            return function(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return -math.inf if x == 0 else math.nan

    return evaluated


def as_it_is(value: Any) -> Any:
    """No conversion."""
    return value


def _as_int64(value: Any) -> Any:
    """Whole numbers wrap at 64 bits."""
    if type(value) is bool or not isinstance(value, int):
        return value
    low = value & (2**64 - 1)
    return low - 2**64 if low >= 2**63 else low


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value


TYPED: dict[str, Callable[[Any], Any]] = {"IntType": _as_int64, "FloatType": _as_float}
"""Kind of TorchScript type → conversion of what Python computed."""


def _identity_of(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, int | float | str) and isinstance(b, int | float | str) and a == b)


OPERATORS: dict[str, Callable[..., Any]] = {
    "aten::add": operator.add,
    "aten::sub": operator.sub,
    "aten::mul": operator.mul,
    "aten::div": _division,
    "aten::floordiv": _floor_division,
    "aten::remainder": operator.mod,
    "aten::__round_to_zero_floordiv": _truncated_division,
    "aten::pow": _power,
    "aten::neg": operator.neg,
    "aten::abs": abs,
    "aten::eq": operator.eq,
    "aten::ne": operator.ne,
    "aten::lt": operator.lt,
    "aten::le": operator.le,
    "aten::gt": operator.gt,
    "aten::ge": operator.ge,
    "aten::__not__": operator.not_,
    "aten::__and__": operator.and_,
    "aten::__or__": operator.or_,
    "aten::__xor__": operator.xor,
    "aten::__lshift__": operator.lshift,
    "aten::__rshift__": operator.rshift,
    "aten::__is__": _identity_of,
    "aten::__isnot__": lambda a, b: not _identity_of(a, b),
    "aten::__contains__": operator.contains,
    "aten::__getitem__": operator.getitem,
    "aten::_set_item": _set_item,
    "aten::Delete": _delete,
    "aten::len": len,
    "aten::slice": _slice,
    "aten::append": _append,
    "aten::extend": lambda a, b: a.extend(b),
    "aten::insert": lambda a, i, v: a.insert(i, v),
    "aten::remove": lambda a, v: a.remove(v),
    "aten::pop": _pop,
    "aten::clear": lambda a: a.clear(),
    "aten::reverse": lambda a: a.reverse(),
    "aten::sort": _sort,
    "aten::sorted": sorted,
    "aten::copy": lambda a: a.copy(),
    "aten::list": _list,
    "aten::index": lambda a, v, *r: a.index(v),
    "aten::count": lambda a, v: a.count(v),
    "aten::keys": lambda a: list(a.keys()),
    "aten::values": lambda a: list(a.values()),
    "aten::items": lambda a: list(a.items()),
    "aten::get": lambda a, *k: a.get(*k),
    "aten::setdefault": lambda a, k, v: a.setdefault(k, v),
    "aten::update": lambda a, b: a.update(b),
    "aten::dict": dict,
    "aten::Int": int,
    "aten::Float": float,
    "aten::Bool": bool,
    "aten::str": str,
    "aten::format": _format,
    "aten::percentFormat": lambda t, *v: t % v,
    "aten::join": lambda s, v: s.join(v),
    "aten::startswith": lambda s, p, *r: s.startswith(p, *r),
    "aten::endswith": lambda s, p, *r: s.endswith(p, *r),
    "aten::lower": lambda s: s.lower(),
    "aten::upper": lambda s: s.upper(),
    "aten::ceil": math.ceil,
    "aten::floor": math.floor,
    "aten::round": _round,
    "aten::sqrt": _ieee(math.sqrt),
    "aten::exp": _ieee(math.exp),
    "aten::log": _ieee(math.log),
    "aten::sin": _ieee(math.sin),
    "aten::cos": _ieee(math.cos),
    "aten::tanh": _ieee(math.tanh),
    "aten::warn": lambda *a: None,
    "aten::__range_length": _range_length,
    "aten::__derive_index": _derive_index,
    "aten::range_length": _range_length,
    "aten::isinstance": isinstance,
    "prim::min": min,
    "prim::max": max,
    "prim::abs": abs,
    "prim::Print": lambda *a: None,
    "prim::unchecked_cast": lambda a: a,
    "prim::unchecked_unwrap_optional": lambda a: a,
    "aten::_unwrap_optional": lambda a: a,
    "prim::StringIndex": operator.getitem,
}
"""TorchScript name → function, used where no argument is a tensor."""
