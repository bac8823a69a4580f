"""Pins: what is pinned, no limit removes, and nobody deletes before it is unpinned."""

from curvature_protocol.artefacts import Artefact, ArtefactKind
from curvature_protocol.jobs import Job
from curvature_state import artefacts, jobs
from curvature_state.database import Database
from curvature_state.tables import ArtefactRow, JobRow


def pin_job(database: Database, job_id: str, *, pinned: bool) -> Job | None:
    """Pin a job and its result, or unpin them; None: there is no such job."""
    with database.write() as session:
        row = session.get(JobRow, job_id, with_for_update=True)
        if row is None:
            return None
        row.pinned = pinned
        return jobs.view(row)


def pin_artefact(database: Database, kind: ArtefactKind, sha256: str, *, pinned: bool) -> Artefact | None:
    """Pin an upload, or unpin it; None: there is no such upload."""
    with database.write() as session:
        row = session.get(ArtefactRow, (kind, sha256), with_for_update=True)
        if row is None:
            return None
        row.pinned = pinned
        return artefacts.view(row)
