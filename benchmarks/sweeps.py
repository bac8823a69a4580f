"""Ten thousand jobs, data sets over several workers, fair turns, the cache: how long each takes.

    python benchmarks/sweeps.py [--only sweep data-set tenants cache] [--jobs 10000] [--embedded] [--output sweeps.json]

Real processes: PostgreSQL, a Redis-protocol server, a folder as the object store, one API process, workers of one
thread each. `--embedded` measures the sweep on `curvature serve` (SQLite) instead. Bare Celery tasks that compute the
same run in turn with the jobs, on the same broker. Prints tables, writes JSON.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from sqlalchemy import func, select
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bare_task import TASK, make_app
from benchmarks.transfer import MIB, MemoryWatch
from tests.cluster.cluster import Cluster
from tests.cluster.embedded import Embedded
from tests.cluster.processes import System, cpu_seconds, find, wait_until

from curvature_client import Client, Sweep
from curvature_state import Database
from curvature_state.keys import create_key
from curvature_state.tables import JobRow

EXTENSIONS = ["diag_ggn_mc"]
PARTS = 60
_PART = 4096
"""Samples of each."""
_DATA_SET_EXTENSIONS = ["grad", "variance", "diag_ggn_exact", "diag_ggn_mc", "kfac", "batch_l2"]
_LIMIT_SECONDS = 3600.0
_UNDER_WAY = 20
"""After so many jobs, the workers have a tenant's program loaded."""


class Work:
    """One model and one batch as files; jobs differ in their seeds.

    `tiny` takes about 2 ms of computation, `small` (a convolutional net on 28 × 28) about 20.
    """

    def __init__(self, folder: Path, size: str) -> None:
        torch.manual_seed(0)
        nets = {
            "tiny": (nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)), (32, 20), 5),
            "small": (
                nn.Sequential(
                    *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU()),
                    *(nn.Flatten(), nn.Linear(16 * 4 * 4, 10)),
                ),
                (64, 1, 28, 28),
                10,
            ),
        }
        net, shape, classes = nets[size]
        self.model, self.batch = folder / f"{size}.pt", folder / f"{size}.safetensors"
        torch.jit.save(torch.jit.script(net.eval()), self.model)
        save_file({"inputs": torch.randn(shape), "targets": torch.randint(0, classes, (shape[0],))}, self.batch)
        self._seeds = 0

    def take_seeds(self, count: int) -> list[int]:
        """Seeds that no job had before, so that none is answered from the cache."""
        self._seeds += count
        return list(range(self._seeds - count, self._seeds))


# A sweep of many jobs


def measure_sweep(make: Callable[[Path, int], System], folder: Path, jobs: int, rounds: int) -> dict[str, object]:
    """Accepting, memory, throughput against bare tasks, cost per job by the length of the queue."""
    found: dict[str, object] = {"throughput": [], "sizes": []}
    for workers in (1, 2):
        with make(folder / f"{workers}-workers", workers) as system, Client(system.urls[0], progress=False) as client:
            for size in ("tiny", "small"):
                work = Work(_new(folder / f"{workers}-{size}"), size)
                found["throughput"].append(compare(system, client, work, workers, max(20, jobs // 20), rounds))
            if workers == 2:
                work = Work(_new(folder / "many"), "tiny")
                found["sizes"] = [measure_size(system, client, work, n) for n in (jobs // 100, jobs // 10, jobs)]
    return found


def compare(system: System, client: Client, work: Work, workers: int, jobs: int, rounds: int) -> dict[str, object]:
    """Jobs a second, ours and bare tasks in turn."""
    ours, bare = [], []
    with bare_workers(system.redis_url, work, workers) as run_bare:
        run_ours(system, client, work, 20)  # the model admitted, programs loaded
        run_bare(20)
        for _ in range(rounds):
            ours.append(run_ours(system, client, work, jobs))
            bare.append(run_bare(jobs))
    rates = [(mine["per_second"], theirs["per_second"]) for mine, theirs in zip(ours, bare, strict=True)]
    return {
        "model": work.model.stem,
        "workers": workers,
        "jobs_per_second": statistics.median(mine for mine, _ in rates),
        "bare_per_second": statistics.median(theirs for _, theirs in rates),
        "ratio": statistics.median(mine / theirs for mine, theirs in rates),
        "cpu_ms_per_job": statistics.median(ran["cpu_ms_each"] for ran in ours),
        "cpu_ms_per_bare_task": statistics.median(ran["cpu_ms_each"] for ran in bare),
    }


def measure_size(system: System, client: Client, work: Work, jobs: int) -> dict[str, object]:
    """One sweep of so many jobs: accepted, computed, and what it does to the API's memory."""
    watch = MemoryWatch(find(system, "api")[0].pid)
    ran = run_ours(system, client, work, jobs)
    watch.stop()
    return {
        "jobs": jobs,
        "accept_seconds": ran["accept_seconds"],
        "per_second": ran["per_second"],
        "ms_per_job": 1e3 / ran["per_second"],
        "cpu_ms_per_job": ran["cpu_ms_each"],
        "api_before_mib": watch.baseline / MIB,
        "api_peak_mib": watch.peak / MIB,
    }


def run_ours(system: System, client: Client, work: Work, jobs: int) -> dict[str, float]:
    """A sweep from its submission to its last job; the rate is that of the workers, from first start to last end."""
    begun, used = time.monotonic(), cpu_seconds(system.roots())
    sweep = submit_sweep(client, work, jobs)
    accept_seconds = time.monotonic() - begun
    sweep.wait(_LIMIT_SECONDS)
    used = cpu_seconds(system.roots()) - used
    database = Database(system.database_url)
    with database.read() as session:
        query = select(func.min(JobRow.started_at), func.max(JobRow.finished_at), func.count())
        first, last, succeeded = session.execute(
            query.where(JobRow.sweep_id == sweep.id, JobRow.status == "succeeded")
        ).one()
    database.close()
    if succeeded != jobs:
        raise RuntimeError(f"{succeeded} of {jobs} jobs succeeded")
    return {
        "accept_seconds": accept_seconds,
        "per_second": jobs / (last - first).total_seconds(),
        "cpu_ms_each": 1e3 * used / jobs,
    }


def submit_sweep(client: Client, work: Work, jobs: int) -> Sweep:
    """One model, one batch, many seeds."""
    grid = {"model": [work.model], "batch": [work.batch], "seed": work.take_seeds(jobs)}
    return client.sweep(grid=grid, extensions=EXTENSIONS)


@contextmanager
def bare_workers(url: str, work: Work, workers: int) -> Iterator[Callable[[int], dict[str, float]]]:
    """Bare Celery workers while the block lasts; yields what runs so many tasks and returns tasks a second."""
    with tempfile.TemporaryDirectory(prefix="bare-") as folder:
        broker = url if not url.startswith("unix://") else f"redis+socket://{url[7:].replace('?db=', '?virtual_host=')}"
        command = [sys.executable, str(Path(__file__).with_name("bare_task.py")), broker, str(work.model)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*command, str(work.batch), folder, *EXTENSIONS], env=environment) for _ in range(workers)
        ]
        app = make_app(broker)
        rounds = 0

        def run(tasks: int) -> dict[str, float]:
            nonlocal rounds
            rounds += 1
            pids = [process.pid for process in processes]
            used = cpu_seconds(pids)
            for number, seed in enumerate(work.take_seeds(tasks)):
                app.send_task(TASK, [f"{rounds}-{number}", seed])
            written = Path(folder)
            wait_until(lambda: len(list(written.glob(f"{rounds}-*"))) == tasks, _LIMIT_SECONDS, "bare tasks")
            times = [path.stat().st_mtime for path in written.glob(f"{rounds}-*")]
            used = cpu_seconds(pids) - used
            return {"per_second": (tasks - 1) / (max(times) - min(times)), "cpu_ms_each": 1e3 * used / tasks}

        try:
            yield run
        finally:
            app.close()
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()


# A data set over several workers


def measure_data_set(folder: Path) -> dict[str, object]:
    """60 parts over one, two and three workers, and with a worker killed in the middle; held to one batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10)).double()
    model = torch.jit.script(net.eval())
    inputs, targets = torch.randn(PARTS * _PART, 64, dtype=torch.float64), torch.randint(0, 10, (PARTS * _PART,))
    parts = list(zip(inputs.split(_PART), targets.split(_PART), strict=True))
    rows: list[dict[str, object]] = []
    settings = {"CURVATURE_LEASE_SECONDS": "3"}
    with (
        Cluster(folder / "cluster", workers=1, apis=1, s3=False, settings=settings) as system,
        Client(system.urls[0], progress=False) as client,
    ):
        whole = client.analyze(model, (inputs, targets), _DATA_SET_EXTENSIONS, cache=False)
        for workers, kill in ((1, False), (2, False), (3, False), (3, True)):
            while system.workers() < workers:
                system.add_worker()
            client.submit(model, parts[:workers], ["grad"], cache=False).wait(_LIMIT_SECONDS)
            begun = time.monotonic()
            job = client.submit(model, parts, _DATA_SET_EXTENSIONS, cache=False)
            if kill:
                wait_until(lambda job=job: _parts_done(job) >= PARTS // 3, _LIMIT_SECONDS, "a third of the parts")
                find(system, "worker")[0].kill()
            job.wait(_LIMIT_SECONDS)
            seconds = time.monotonic() - begun
            row = {"workers": workers, "worker_killed": kill, "seconds": seconds}
            rows.append({**row, "error": largest_error(job.result(), whole)})
    for row in rows:
        row["speed_up"] = rows[0]["seconds"] / row["seconds"]
    return {"parts": PARTS, "samples": len(inputs), "runs": rows}


def _parts_done(job) -> int:
    progress = job.refresh().progress
    return progress.done if progress is not None and progress.phase == "shards" else 0


def largest_error(result, whole) -> float:
    """The largest difference of any two tensors, relative to the largest entry."""
    found = 0.0
    for label in whole:
        for name in whole[label]:
            mine, theirs = result[label][name], whole[label][name]
            pairs = zip(mine, theirs, strict=True) if isinstance(theirs, tuple) else [(mine, theirs)]
            for a, b in pairs:
                if b is not None:
                    a, b = torch.as_tensor(a.clone()), torch.as_tensor(b.clone())
                    found = max(found, ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item())
    return found


# Two tenants


def measure_tenants(folder: Path, queued: int, tries: int = 5) -> dict[str, object]:
    """How long another tenant's first job waits behind one tenant's many."""
    work = Work(folder, "small")
    with Cluster(folder / "cluster", workers=2, apis=1, s3=False) as system:
        database = Database(system.database_url)
        (_, busy_key), (_, other_key) = create_key(database, "busy", "busy"), create_key(database, "other", "other")
        database.close()
        url = system.urls[0]
        with (
            Client(url, api_key=busy_key, progress=False) as busy,
            Client(url, api_key=other_key, progress=False) as other,
        ):
            alone = [wait_of_one(other, work) for _ in range(tries)]
            sweep = submit_sweep(busy, work, queued)
            wait_until(lambda: sweep.refresh().counts.get("succeeded", 0) >= _UNDER_WAY, _LIMIT_SECONDS, "some jobs")
            behind = [wait_of_one(other, work) for _ in range(tries)]
            left = queued - sweep.refresh().counts.get("succeeded", 0)
            sweep.cancel()
    return {
        "queued": queued,
        "still_queued_at_the_end": left,
        "alone_seconds": alone,
        "behind_seconds": behind,
        "first_behind_seconds": behind[0],
    }


def wait_of_one(client: Client, work: Work) -> float:
    """Seconds from a job's acceptance to its start."""
    job = client.submit(work.model, work.batch, ["variance"], cache=False).wait(_LIMIT_SECONDS)
    return (job.started_at - job.created_at).total_seconds()


# The cache


def measure_cache(folder: Path, rounds: int = 10) -> dict[str, object]:
    """A request, the same again, and one that asks for one thing more."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 100)).eval()
    model = torch.jit.script(net)
    seconds: dict[str, list[float]] = {"first": [], "again": [], "one_more": [], "the_one_alone": []}
    with (
        Cluster(folder / "cluster", workers=1, apis=1, s3=False) as system,
        Client(system.urls[0], progress=False) as client,
    ):
        for number in range(rounds + 1):
            batch = torch.randn(256, 64), torch.randint(0, 100, (256,))

            def run(extensions, batch=batch, **options):
                begun = time.monotonic()
                result = client.analyze(model, batch, extensions, **options)
                return time.monotonic() - begun, [group.source is not None for group in result.manifest.groups]

            asked = ["diag_ggn_exact", "kflr"]
            times = {
                "first": run(asked),
                "again": run(asked),
                "one_more": run([*asked, "variance"]),
                "the_one_alone": run(["variance"], cache=False),
            }
            expected = {
                "first": [False] * 2,
                "again": [True] * 2,
                "one_more": [True, True, False],
                "the_one_alone": [False],
            }
            if {name: sources for name, (_, sources) in times.items()} != expected:
                raise RuntimeError(f"not answered from the cache as expected: {times}")
            for name, (spent, _) in times.items():
                if number > 0:  # the first round admits the model
                    seconds[name].append(spent)
    return {f"{name}_ms": 1e3 * statistics.median(spent) for name, spent in seconds.items()}


# All together


def main() -> None:
    """Measure what is asked for, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("sweep", "data-set", "tenants", "cache")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--embedded", action="store_true", help="the sweep alone, on `curvature serve`")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = ["sweep"] if arguments.embedded else list(arguments.only)
    found: dict[str, object] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}

    def make(folder: Path, workers: int) -> System:
        if arguments.embedded:
            return Embedded(folder, workers=workers)
        return Cluster(folder, workers=workers, apis=1, s3=False)

    measurements: dict[str, Callable[[Path], dict[str, object]]] = {
        "sweep": lambda folder: measure_sweep(make, folder, arguments.jobs, arguments.rounds),
        "data-set": measure_data_set,
        "tenants": lambda folder: measure_tenants(folder, arguments.jobs // 2),
        "cache": measure_cache,
    }
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="sweeps-") as folder:
            found[name] = measurements[name](Path(folder))
            print(TABLES[name](found[name]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")


def _table(head: str, rows: list[str]) -> str:
    rule = "| " + " | ".join("---:" for _ in head.split("|")) + " |"
    return "\n".join([f"\n| {head} |", rule, *(f"| {row} |" for row in rows)])


def _sweep_table(found) -> str:
    throughput = [
        f"{row['model']} | {row['workers']} | {row['jobs_per_second']:.1f} | {row['bare_per_second']:.1f} | "
        f"{row['ratio']:.2f} | {row['cpu_ms_per_job']:.1f} | {row['cpu_ms_per_bare_task']:.1f}"
        for row in found["throughput"]
    ]
    sizes = [
        f"{row['jobs']} | {row['accept_seconds']:.2f} | {row['per_second']:.1f} | {row['ms_per_job']:.2f} | "
        f"{row['cpu_ms_per_job']:.1f} | "
        f"{row['api_before_mib']:.0f} | {row['api_peak_mib']:.0f}"
        for row in found["sizes"]
    ]
    return "\n".join(
        [
            _table("model | workers | jobs/s | bare tasks/s | ratio | CPU ms per job | per bare task", throughput),
            _table("jobs queued | accepted in s | jobs/s | ms per job | CPU ms | API MiB before | at most", sizes),
        ]
    )


def _data_set_table(found) -> str:
    rows = [
        f"{row['workers']}{', one killed' if row['worker_killed'] else ''} | {row['seconds']:.1f} | "
        f"{row['speed_up']:.2f} | {row['error']:.1e}"
        for row in found["runs"]
    ]
    return _table("workers | s | speed-up | largest relative error", rows)


def _tenants_table(found) -> str:
    alone, behind = (1e3 * statistics.median(found[name]) for name in ("alone_seconds", "behind_seconds"))
    row = f"{found['queued']} | {1e3 * found['first_behind_seconds']:.0f} | {behind:.0f} | {alone:.0f}"
    return _table("queued by the other | first job's wait, ms | median of five | with an empty queue", [row])


def _cache_table(found) -> str:
    names = ("first_ms", "again_ms", "one_more_ms", "the_one_alone_ms")
    row = " | ".join(f"{found[name]:.1f}" for name in names)
    return _table("first, ms | the same again | with one extension more | that one alone, computed", [row])


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


TABLES = {"sweep": _sweep_table, "data-set": _data_set_table, "tenants": _tenants_table, "cache": _cache_table}


if __name__ == "__main__":
    main()
