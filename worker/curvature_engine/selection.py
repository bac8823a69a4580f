"""Which parameters are asked for: the trainable ones, all, or those whose names match patterns."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from curvature_engine.errors import EngineError
from curvature_engine.program import Parameter, Program

_SHOWN_NAMES = 20

COMPLEX = "curvature is defined for real parameters only"

Wanted = str | Sequence[str]


def select(program: Program, wanted: Wanted) -> dict[str, Parameter]:
    """The parameters asked for, in the model's order.

    Args:
        program: whose parameters.
        wanted: "trainable", "all" (frozen ones, too), or one or several shell-style patterns (`*`, `?`, `[…]`) of
            trainable parameters' names; a shared parameter answers to all its names.

    Raises:
        EngineError: `no_parameters` where none is left or a pattern matches none, `invalid_option`,
            `unsupported_model` for complex ones.
    """
    if wanted in ("trainable", "all"):
        found = _all(program, frozen=wanted == "all")
    else:
        names = {name for pattern in _patterns(wanted) for name in _matching(program, pattern)}
        found = {name: p for name, p in program.parameters.items() if name in names}
    for name, parameter in found.items():
        if parameter.tensor.is_complex():
            raise EngineError(
                "unsupported_model",
                f"parameter {name} is complex: {COMPLEX}",
                param=name,
                remedy="keep its real and imaginary parts as two parameters",
            )
    return found


def _all(program: Program, *, frozen: bool) -> dict[str, Parameter]:
    found = {
        name: p
        for name, p in program.parameters.items()
        if (p.tensor.is_floating_point() or p.tensor.is_complex()) and (frozen or p.trainable)
    }
    if not found:
        raise EngineError(
            "no_parameters",
            "no parameter of the model requires a gradient",
            param="parameters",
            remedy='pass parameters="all", or save the model with requires_grad=True',
        )
    return found


def _patterns(wanted: Wanted) -> list[str]:
    patterns = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise EngineError(
            "invalid_option",
            f'parameters are "trainable", "all", or patterns of names; got {wanted!r:.200}',
            param="parameters",
            remedy='e.g. parameters="layer4.*"',
        )
    return list(patterns)


def _matching(program: Program, pattern: str) -> list[str]:
    """The trainable parameters that a pattern matches.

    Raises:
        EngineError: `no_parameters`, saying what the pattern does match.
    """
    matched = [p for p in program.parameters.values() if any(fnmatchcase(n, pattern) for n in (p.name, *p.aliases))]
    if not matched:
        raise _unmatched(program, pattern)
    trainable = [p.name for p in matched if p.trainable]
    if not trainable:
        raise EngineError(
            "no_parameters",
            f"{_listed([p.name for p in matched])} matched by {pattern!r} does not require a gradient",
            param="parameters",
            remedy='save the model with requires_grad=True, or pass parameters="all" for every parameter',
        )
    return trainable


def _unmatched(program: Program, pattern: str) -> EngineError:
    known = [*program.parameters, *program.aliases]
    buffers = [name for name in program.buffers if fnmatchcase(name, pattern)]
    if buffers:
        message = f"{_listed(buffers)} matched by {pattern!r} is a buffer: it has no gradient"
    else:
        close = difflib.get_close_matches(pattern, known, 1)
        message = f"no parameter matches {pattern!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    return EngineError(
        "no_parameters", message, param="parameters", remedy=f"the model's parameters are: {_listed(known)}"
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
