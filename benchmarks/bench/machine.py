"""Where it ran, and how fast memory is there."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.bench.cases import Place
from benchmarks.bench.timing import best_of

import curvature_engine as engine

DISTRIBUTIONS = ("torch", "backpack-for-pytorch", "opacus", "curvlinops-for-pytorch", "numpy")


def machine(place: Place) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu",
        "dtype": str(place.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "engine": engine.__version__,
        **{name: _version(name) for name in DISTRIBUTIONS},
    }


def writing_bandwidth(place: Place, quick: bool) -> float:
    """Bytes a second that a copy writes into memory that is there already."""
    numbers = 10**6 if quick else 5 * 10**7
    source = torch.ones(numbers, device=place.device, dtype=place.dtype)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        place.synchronize()

    copy()
    return source.nbytes / best_of(copy)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def in_float32() -> None:
    """Have everybody's products of float32 numbers be float32's: by itself torch lets cuDNN round to TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
