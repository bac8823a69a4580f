"""The registry of losses: the only list of them.

A new loss is one file here and one line below.
"""

from curvature_engine.losses.base import LossKind
from curvature_engine.losses.binary_cross_entropy import BCE_WITH_LOGITS
from curvature_engine.losses.cross_entropy import CROSS_ENTROPY
from curvature_engine.losses.gaussian import GAUSSIAN_NLL
from curvature_engine.losses.log_likelihood import NLL
from curvature_engine.losses.poisson import POISSON_NLL
from curvature_engine.losses.robust import HUBER, L1_LOSS, SMOOTH_L1
from curvature_engine.losses.squared_error import MSE

LOSSES: dict[str, LossKind] = {
    "cross_entropy": CROSS_ENTROPY,
    "mse": MSE,
    "bce_with_logits": BCE_WITH_LOGITS,
    "nll": NLL,
    "gaussian_nll": GAUSSIAN_NLL,
    "poisson_nll": POISSON_NLL,
    "huber": HUBER,
    "smooth_l1": SMOOTH_L1,
    "l1": L1_LOSS,
}
