"""Losses: value, gradient, and square root of the Hessian in the model's outputs, exact and sampled.

A new loss is one file here and one line in `registry`.
"""

from curvature_engine.losses.base import BoundLoss, LossKind
from curvature_engine.losses.registry import LOSSES
from curvature_engine.losses.spec import LossSpec
from curvature_engine.precision import accumulation_dtype

__all__ = ["LOSSES", "BoundLoss", "LossKind", "LossSpec", "accumulation_dtype"]
