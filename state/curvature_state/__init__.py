"""What service and worker share: records in SQL, bytes in an object store, events and the bell on Redis.

The database is the truth; Redis can be wiped without losing a job.
"""

from curvature_state.database import Database, migrate
from curvature_state.objects import ObjectStore
from curvature_state.settings import StateSettings

__all__ = ["Database", "ObjectStore", "StateSettings", "migrate"]
