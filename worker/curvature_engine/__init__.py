"""The maths engine: a model file becomes a program, a program and a batch become curvature tensors.

import curvature_engine as engine

analysis = engine.analyze("model.pt", inputs, targets, ["variance", "diag_ggn_exact"])
analysis["variance"]["0.weight"]
"""

from curvature_engine.analysis import analyze, plan
from curvature_engine.catalogue import catalogue
from curvature_engine.contributions import Contribution
from curvature_engine.errors import DoesNotFit, EngineError
from curvature_engine.extensions import (
    WHOLE,
    Accumulator,
    Extension,
    KroneckerFactors,
    Merger,
    Setting,
    Sketch,
    State,
)
from curvature_engine.inspection import Inspection, inspect, inspect_program
from curvature_engine.losses import BoundLoss, LossKind
from curvature_engine.merging import Merged, PartGroup, PartResult, merge
from curvature_engine.parts import DataSetPart, LabelMerging, plan_merging
from curvature_engine.plans import ParameterPlan, Plan, RequestPlan
from curvature_engine.program import Program, digest, load
from curvature_engine.results import Analysis, Appended, Group
from curvature_engine.rules import Match, Rule
from curvature_engine.stores import TensorFile, save_tensors
from curvature_engine.version import __version__

__all__ = [
    "WHOLE",
    "Accumulator",
    "Analysis",
    "Appended",
    "BoundLoss",
    "Contribution",
    "DataSetPart",
    "DoesNotFit",
    "EngineError",
    "Extension",
    "Group",
    "Inspection",
    "KroneckerFactors",
    "LabelMerging",
    "LossKind",
    "Match",
    "Merged",
    "Merger",
    "ParameterPlan",
    "PartGroup",
    "PartResult",
    "Plan",
    "Program",
    "RequestPlan",
    "Rule",
    "Setting",
    "Sketch",
    "State",
    "TensorFile",
    "__version__",
    "analyze",
    "catalogue",
    "digest",
    "inspect",
    "inspect_program",
    "load",
    "merge",
    "plan",
    "plan_merging",
    "save_tensors",
]
