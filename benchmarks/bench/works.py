"""What is asked of everybody: the engine's extensions, each alone, and some together."""

from dataclasses import dataclass, field
from typing import Any

from curvature_engine.extensions import EXTENSIONS


@dataclass(frozen=True)
class Request:
    """One extension with options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """Extensions that are computed together."""

    name: str
    requests: tuple[Request, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(request.name for request in self.requests)

    @property
    def sampled(self) -> bool:
        return any(name.endswith("_mc") or name == "kfac" for name in self.names)


FIRST_ORDER = ("grad", "batch_grad", "batch_l2", "sum_grad_squared", "variance")
KRONECKER = ("kfac", "kflr", "kfra")
EXACT = {"diag_ggn_exact", "saliency", "kflr", "kflr-expand", "kflr-reduce"}
HESSIAN = {"diag_hessian", "batch_diag_hessian"}
INDIVIDUAL = {"batch_grad", "batch_diag_ggn_mc", "sqrt_ggn_mc", "first_order"}
"""With results [N, *p]."""
INDIVIDUAL_EXACT = {"batch_diag_ggn_exact"}
ROOT = {"sqrt_ggn_exact"}


def _alone(name: str) -> Work:
    options = {"approximation": "backpack"} if name in KRONECKER else {}
    return Work(name, (Request(name, options),))


def _approximated(name: str, approximation: str) -> Work:
    return Work(f"{name}-{approximation}", (Request(name, {"approximation": approximation}),))


_ALL = [
    *map(_alone, EXTENSIONS),
    *(_approximated(name, way) for name in ("kfac", "kflr") for way in ("expand", "reduce")),
    Work("diag_ggn_mc+grad", (Request("grad"), Request("diag_ggn_mc"))),
    Work("first_order", tuple(map(Request, FIRST_ORDER))),
]
WORKS = {work.name: work for work in _ALL}
