"""What is kept, and for how long."""

from dataclasses import dataclass
from datetime import timedelta

TARGET_SHARE = 0.9
"""Eviction goes on down to this share of the limit, so that it does not begin anew with every upload."""
GRACE = timedelta(minutes=10)


@dataclass(frozen=True)
class Policy:
    """Limits; None: there is none.

    Attributes:
        keep_results: since a result was last used: read, or taken as an answer of the cache.
        keep_jobs: since a job was over.
        keep_plans: since a plan or an inspection was last read.
        keep_uploads: since a job last asked for an upload.
        max_stored_bytes: of uploads and results together.
        grace: what was used so lately is not evicted for its size.
    """

    keep_results: timedelta | None = None
    keep_jobs: timedelta | None = None
    keep_plans: timedelta | None = None
    keep_uploads: timedelta | None = None
    max_stored_bytes: int | None = None
    grace: timedelta = GRACE
