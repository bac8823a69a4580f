"""Whether each thing the server needs answers."""

from collections.abc import Callable

from curvature_protocol.health import Readiness
from curvature_service.resources import Resources
from curvature_state.workers import list_workers


def check_readiness(resources: Resources) -> Readiness:
    """Ask database, storage, broker and workers."""

    def storage() -> None:
        resources.objects.head("ready")

    def worker() -> None:
        if not list_workers(resources.database):
            raise RuntimeError("no worker has published itself lately; start one with `curvature worker`")

    probes: dict[str, Callable[[], object]] = {
        "database": resources.database.ping,
        "storage": storage,
        "broker": resources.redis.ping,
        "worker": worker,
    }
    checks = {name: _outcome(probe) for name, probe in probes.items()}
    return Readiness(ready=all(outcome == "ok" for outcome in checks.values()), checks=checks)


def _outcome(probe: Callable[[], object]) -> str:
    try:
        probe()
    except Exception as error:  # noqa: BLE001 (whatever fails, its reason is the answer)
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return "ok"
