"""The registry of losses: the only list of them.

A new loss is one file here and one line below.
"""

from curvature_engine.losses.base import LossKind
from curvature_engine.losses.cross_entropy import CROSS_ENTROPY
from curvature_engine.losses.squared_error import MSE

LOSSES: dict[str, LossKind] = {
    "cross_entropy": CROSS_ENTROPY,
    "mse": MSE,
}
