"""What attempts work with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from curvature_protocol.catalogue import Catalogue
from curvature_state import Database, ObjectStore
from curvature_state.cache import LoadedModel
from curvature_worker.cache import ArtefactCache
from curvature_worker.pool import ChildPool
from curvature_worker.reporter import Reporter
from curvature_worker.settings import WorkerSettings


@dataclass(frozen=True)
class Tools:
    """What attempts work with.

    Attributes:
        catalogue: what this worker can compute.
        has_larger: whether a worker that lives has more memory than this one.
        digests: canonical digests of models seen before.
    """

    settings: WorkerSettings
    database: Database
    objects: ObjectStore
    cache: ArtefactCache
    pool: ChildPool
    reporter: Reporter
    scratch: Path
    stopping: Event
    catalogue: Callable[[], Catalogue]
    has_larger: Callable[[int], bool]
    digests: dict[LoadedModel, str] = field(default_factory=dict)
