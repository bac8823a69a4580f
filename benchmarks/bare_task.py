"""A bare Celery worker: one task that computes what a job computes, in its own process, and writes a file.

    python benchmarks/bare_task.py BROKER_URL MODEL BATCH FOLDER EXTENSION...

What a job has beside it (a record, a lease, admission, confinement, checks, a manifest, an answer) it has not.
"""

import sys
import warnings
from pathlib import Path

import torch
from celery import Celery
from safetensors.torch import load_file, save_file

import curvature_engine as engine

QUEUE = "bare"
TASK = "bare.analyze"


def make_app(url: str) -> Celery:
    """The application, of worker and sender."""
    app = Celery("bare", broker=url)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_default_queue=QUEUE,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
    )
    return app


def main() -> None:
    """Work until ended."""
    url, model, batch, folder, *extensions = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*superuser privileges")
    program = engine.load(Path(model))
    app = make_app(url)

    @app.task(name=TASK)
    def analyze(name: str, seed: int) -> None:
        tensors = load_file(batch)
        found = engine.analyze(program, tensors["inputs"], tensors["targets"], extensions, seed=seed)
        for label, group in found.groups.items():
            save_file(dict(group.tensors), Path(folder) / f"{name}.{label}.safetensors")

    app.Worker(
        pool_cls="solo",
        queues=[QUEUE],
        loglevel="WARNING",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    ).start()


if __name__ == "__main__":
    main()
