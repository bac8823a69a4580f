"""The wire schema that client, service and worker share: requests, jobs, results, catalogue, errors, names."""

from curvature_protocol.artefacts import Artefact, ArtefactKind
from curvature_protocol.catalogue import Catalogue, ExtensionEntry, LossEntry
from curvature_protocol.errors import FAMILIES, ErrorFamily, Problem, family_of
from curvature_protocol.events import JobEvent
from curvature_protocol.health import Health, Readiness, WorkerView
from curvature_protocol.inspections import InspectedModel, Inspection
from curvature_protocol.jobs import FINAL, Job, JobKind, JobPage, JobStatus, Progress
from curvature_protocol.plans import Plan, PlanJob
from curvature_protocol.requests import (
    BatchReference,
    DataSet,
    DataSetPart,
    ExtensionRequest,
    InlineBatch,
    JobRequest,
    LossReference,
    LossRequest,
    Requirements,
    Webhook,
)
from curvature_protocol.results import (
    Manifest,
    PrecisionError,
    Provenance,
    ResultGroup,
    Source,
    StoredPart,
    TensorEntry,
)
from curvature_protocol.sweeps import Sweep, SweepPage, SweepRequest, SweepRows, SweepRowView, SweepStates
from curvature_protocol.uploads import PartAddress, Upload, UploadPart, UploadRequest

__all__ = [
    "FAMILIES",
    "FINAL",
    "Artefact",
    "ArtefactKind",
    "BatchReference",
    "Catalogue",
    "DataSet",
    "DataSetPart",
    "ErrorFamily",
    "ExtensionEntry",
    "ExtensionRequest",
    "Health",
    "InlineBatch",
    "InspectedModel",
    "Inspection",
    "Job",
    "JobEvent",
    "JobKind",
    "JobPage",
    "JobRequest",
    "JobStatus",
    "LossEntry",
    "LossReference",
    "LossRequest",
    "Manifest",
    "PartAddress",
    "Plan",
    "PlanJob",
    "PrecisionError",
    "Problem",
    "Progress",
    "Provenance",
    "Readiness",
    "Requirements",
    "ResultGroup",
    "Source",
    "StoredPart",
    "Sweep",
    "SweepPage",
    "SweepRequest",
    "SweepRowView",
    "SweepRows",
    "SweepStates",
    "TensorEntry",
    "Upload",
    "UploadPart",
    "UploadRequest",
    "Webhook",
    "WorkerView",
    "family_of",
]
