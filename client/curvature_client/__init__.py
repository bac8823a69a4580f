"""Ask a Curvature server for individual gradients, GGN diagonals and Kronecker factors of any TorchScript model.

from curvature_client import Client, KFAC

with Client() as client:
    result = client.analyze(model, (inputs, targets), ["diag_ggn_mc", KFAC(mc_samples=4, label="kfac4")])
    result["diag_ggn_mc"]["0.weight"]
"""

from curvature_client._client import Client
from curvature_client._errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    CurvatureError,
    InternalServerError,
    JobCancelled,
    JobError,
    JobFailed,
    ModelConversionError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    ServiceUnavailableError,
    UnprocessableError,
    WaitTimeout,
)
from curvature_client._extensions import (
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchDot,
    BatchGrad,
    BatchL2,
    BatchLoss,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    Extension,
    Grad,
    GradientNoiseScale,
    Outputs,
    Saliency,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from curvature_client._inspections import Inspection
from curvature_client._jobs import Job
from curvature_client._plans import Plan
from curvature_client._results import KroneckerFactors, Result, ResultGroup
from curvature_client._sweeps import Sweep, SweepRow

__all__ = [
    "KFAC",
    "KFLR",
    "KFRA",
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchDot",
    "BatchGrad",
    "BatchL2",
    "BatchLoss",
    "Client",
    "ConflictError",
    "CurvatureError",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "Extension",
    "Grad",
    "GradientNoiseScale",
    "Inspection",
    "InternalServerError",
    "Job",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "KroneckerFactors",
    "ModelConversionError",
    "NotFoundError",
    "Outputs",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "Plan",
    "RateLimitError",
    "Result",
    "ResultGroup",
    "Saliency",
    "ServiceUnavailableError",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Sweep",
    "SweepRow",
    "UnprocessableError",
    "Variance",
    "WaitTimeout",
]
