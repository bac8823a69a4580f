"""Memory of the API process, and the rates, while 1 GiB is uploaded, at once and in parts, and 1 GiB is downloaded.

Real processes: the API, SQLite, a folder as its object store, a Redis-protocol server. The result is planted: one
job, finished in the database, with one safetensors file in the store.

    python benchmarks/transfer.py [--gib 1] [--output transfer.json]
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil

from curvature_client._parted_uploads import PartedUpload
from curvature_client._payloads import Payload
from curvature_client._progress import ProgressBar
from curvature_client._transport import Transport
from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest, Provenance, ResultGroup, TensorEntry
from curvature_service.embedded.broker import broker_command, find_broker
from curvature_state import Database, ObjectStore, jobs, migrate
from curvature_state.endings import Success, succeed
from curvature_state.jobs import NewJob
from curvature_state.turns import Claimant, claim_next

MIB = 2**20
LIMIT_MIB = 64
_CHUNK = os.urandom(MIB)  # disks and networks that compress gain nothing on it
_SAMPLE_SECONDS = 0.005


class MemoryWatch:
    """Samples a process's resident memory."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.baseline = self.peak = self._process.memory_info().rss
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def start_api(folder: Path, stack: ExitStack) -> tuple[psutil.Popen, httpx.Client, Database, ObjectStore]:
    """Broker and API on a folder; ended with the stack."""
    socket = folder / "broker.sock"
    broker = subprocess.Popen(broker_command(find_broker(), socket, folder), stdout=subprocess.DEVNULL)
    stack.callback(end, broker)
    settings = {
        "CURVATURE_DATABASE_URL": f"sqlite:///{folder / 'curvature.db'}",
        "CURVATURE_STORAGE_URL": (folder / "objects").as_uri(),
        "CURVATURE_REDIS_URL": f"unix://{socket}?db=0",
    }
    migrate(settings["CURVATURE_DATABASE_URL"])
    command = [sys.executable, "-m", "curvature_service", "--port", "0"]
    log = stack.enter_context((folder / "api.log").open("w+"))
    api = psutil.Popen(command, env={**os.environ, **settings}, stderr=log)
    stack.callback(end, api)
    line = await_line(folder / "api.log", "Uvicorn running on")
    url = line.split("running on ")[1].split()[0]
    client = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=600))
    database = Database(settings["CURVATURE_DATABASE_URL"])
    stack.callback(database.close)
    return api, client, database, ObjectStore(settings["CURVATURE_STORAGE_URL"])


def await_line(path: Path, words: str) -> str:
    """The first line of a growing file that has some words."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in path.read_text().splitlines():
            if words in line:
                return line
        time.sleep(0.05)
    raise TimeoutError(f"{path} says nothing of {words!r}: {path.read_text()}")


def end(process: "subprocess.Popen[bytes] | psutil.Popen") -> None:
    process.terminate()
    process.wait()


def plant_result(database: Database, objects: ObjectStore, size_mib: int) -> str:
    """A succeeded job whose one tensor has `size_mib` MiB; returns its id."""
    job = jobs.create_job(database, NewJob({}, "benchmark")).job
    held = claim_next(database, Claimant("benchmark"), 600)
    assert held is not None
    tensor = {"dtype": "F32", "shape": [size_mib * MIB // 4], "data_offsets": [0, size_mib * MIB]}
    header = json.dumps({"w": tensor}).encode()

    def file() -> Iterator[bytes]:
        yield struct.pack("<Q", len(header)) + header
        for _ in range(size_mib):
            yield _CHUNK

    size = objects.put_stream(result_key(job.id, held.attempt, "grad.safetensors"), file())
    manifest = describe(job.id, held.attempt, size, size_mib)
    objects.put_bytes(result_key(job.id, held.attempt, "manifest.json"), manifest.model_dump_json().encode())
    assert succeed(database, job.id, held.attempt, Success([], size))
    return job.id


def describe(job_id: str, attempt: int, size: int, size_mib: int) -> Manifest:
    common = {"reduction": "mean", "Z": 1.0, "dtype": "float32", "device": "cpu", "engine_version": "benchmark"}
    entry = TensorEntry(
        name="w",
        parameter="w",
        dtype="F32",
        shape=(size_mib * MIB // 4,),
        byte_start=size - size_mib * MIB,
        byte_end=size,
        provenance=Provenance(method="planted", verified=False, **common),
    )
    group = ResultGroup(
        label="grad", extension="grad", kind="parameters", convention="", file_bytes=size, tensors=(entry,)
    )
    return Manifest(
        job_id=job_id,
        attempt=attempt,
        created_at=datetime.now(UTC),
        loss=None,
        loss_name="mse",
        seed=0,
        isolation="none",
        groups=(group,),
        **common,
    )


def upload(client: httpx.Client, size_mib: int) -> float:
    """Upload `size_mib` MiB; returns the seconds taken, hashing by the client not counted."""
    digest = hashlib.sha256()
    for _ in range(size_mib):
        digest.update(_CHUNK)
    started = time.perf_counter()
    reply = client.put(f"/v1/models/{digest.hexdigest()}", content=(_CHUNK for _ in range(size_mib)))
    seconds = time.perf_counter() - started
    assert reply.status_code == 201, reply.text
    return seconds


def upload_in_parts(url: str, folder: Path, size_mib: int) -> float:
    """Upload `size_mib` MiB of a file as the client does; returns the seconds taken, with hashing and putting together.

    The client hashes every part before it sends it, the server the whole when it puts the parts together.
    """
    path = folder / "payload"
    with path.open("wb") as file:
        for _ in range(size_mib):
            file.write(_CHUNK[::-1])  # other bytes than those of the upload at once
    payload = Payload.of_file(path)
    transport = Transport(url, None, 600.0, 0, None)
    started = time.perf_counter()
    assert PartedUpload(transport, "models", payload, ProgressBar(shown=False)).run()
    seconds = time.perf_counter() - started
    transport.close()
    path.unlink()
    return seconds


def download(client: httpx.Client, job_id: str, size_mib: int) -> float:
    """Download a result; returns the seconds taken."""
    started, received = time.perf_counter(), 0
    with client.stream("GET", f"/v1/jobs/{job_id}/result/grad.safetensors") as reply:
        assert reply.status_code == 200
        for chunk in reply.iter_raw(MIB):
            received += len(chunk)
    assert received >= size_mib * MIB
    return time.perf_counter() - started


def measure(folder: Path, size_mib: int) -> dict[str, dict[str, float]]:
    with ExitStack() as stack:
        api, client, database, objects = start_api(folder, stack)
        job_id = plant_result(database, objects, size_mib)
        # Warm up, so that what is imported and allocated once does not count as growth.
        upload(client, 8)
        client.get(f"/v1/jobs/{job_id}/result/grad.safetensors", headers={"Range": f"bytes=0-{8 * MIB}"})
        cases = {
            "upload": lambda: upload(client, size_mib),
            "in parts": lambda: upload_in_parts(str(client.base_url), folder, size_mib),
            "download": lambda: download(client, job_id, size_mib),
        }
        return {name: watched(api.pid, case, size_mib) for name, case in cases.items()}


def watched(pid: int, case, size_mib: int) -> dict[str, float]:
    watch = MemoryWatch(pid)
    seconds = case()
    watch.stop()
    return {
        "baseline_mib": watch.baseline / MIB,
        "peak_mib": watch.peak / MIB,
        "growth_mib": (watch.peak - watch.baseline) / MIB,
        "seconds": seconds,
        "rate_mb_per_s": size_mib * MIB / 1e6 / seconds,
    }


def show(figures: dict[str, dict[str, float]], size_mib: int) -> None:
    print(f"{size_mib} MiB each way; resident memory of the API process in MiB")
    print(f"{'':10}{'baseline':>10}{'peak':>10}{'growth':>10}{'seconds':>10}{'MB/s':>10}")
    for name, row in figures.items():
        print(f"{name:10}" + "".join(f"{value:10.1f}" for value in row.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and rates of large transfers through the API.")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the upload and of the result")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--folder", type=Path, help="where to keep the data meanwhile (default: the temporary folder)")
    arguments = parser.parse_args()
    size_mib = round(arguments.gib * 1024)
    with tempfile.TemporaryDirectory(prefix="transfer-", dir=arguments.folder) as name:
        free = shutil.disk_usage(name).free
        if free < 6 * size_mib * MIB:
            sys.exit(f"{name} has {free / 2**30:.1f} GiB free; {6 * arguments.gib:.1f} GiB are needed")
        figures = measure(Path(name), size_mib)
    show(figures, size_mib)
    grown = max(row["growth_mib"] for row in figures.values())
    if arguments.output is not None:
        machine = {"system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
        report = {"machine": machine, "size_mib": size_mib, "limit_growth_mib": LIMIT_MIB, "figures": figures}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if grown > LIMIT_MIB:
        sys.exit(f"memory grew by {grown:.1f} MiB; at most {LIMIT_MIB} MiB are allowed")


if __name__ == "__main__":
    main()
