"""Whether each thing the server needs answers."""

from collections.abc import Callable
from contextlib import suppress

from redis import ResponseError
from sqlalchemy.exc import SQLAlchemyError

from curvature_protocol.health import Readiness, WorkerView
from curvature_service.resources import Resources
from curvature_state.broker import require_noeviction
from curvature_state.workers import list_workers


def known_workers(resources: Resources) -> tuple[WorkerView, ...]:
    """Workers seen lately; none while the database cannot say."""
    try:
        return tuple(list_workers(resources.database))
    except SQLAlchemyError:
        return ()


def check_readiness(resources: Resources, *, with_worker: bool = True) -> Readiness:
    """Ask database, storage, broker and workers."""

    def broker() -> None:
        resources.redis.ping()
        with suppress(ResponseError):  # one that does not let us ask is told of at the start
            require_noeviction(resources.redis)

    def worker() -> None:
        if not list_workers(resources.database):
            raise RuntimeError("no worker has published itself lately; start one with `curvature worker`")

    probes: dict[str, Callable[[], object]] = {
        "database": resources.database.ping,
        "storage": resources.objects.ping,
        "broker": broker,
        **({"worker": worker} if with_worker else {}),
    }
    checks = {name: _outcome(probe) for name, probe in probes.items()}
    if with_worker and checks["database"] != "ok":
        checks["worker"] = "not known while the database does not answer"
    return Readiness(ready=all(outcome == "ok" for outcome in checks.values()), checks=checks)


def _outcome(probe: Callable[[], object]) -> str:
    try:
        probe()
    except Exception as error:  # noqa: BLE001 (whatever fails, its reason is the answer)
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return "ok"
