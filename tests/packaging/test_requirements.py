"""What an extra installs is enough for the code that it is for.

The environment of the tests has everything, so a requirement that was forgotten would not be missed there. Here each
part is imported with only those distributions visible that its extra brings.
"""

import json
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DRIVERS = ["kombu.transport.redis", "psycopg"]  # imported by their URLs' schemes
LIMITED = """
import importlib, json, pkgutil, sys

hidden = set(json.loads(sys.argv[1]))

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
for name in sys.argv[2:]:
    module = importlib.import_module(name.removesuffix(".*"))
    for inner in pkgutil.walk_packages(module.__path__, f"{module.__name__}.") if name.endswith(".*") else []:
        # Alembic runs migrations; kernels are imported where there is Triton, which torch's CUDA builds bring.
        if ".migrations" not in inner.name and ".kernels." not in inner.name:
            importlib.import_module(inner.name)
"""


def brought_by(extra):
    """Names of all distributions that `curvature[extra]` brings, with their own requirements."""
    found, wanted = set(), [("curvature", extra)]
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                wanted += [(needed, ""), *((needed, inner) for inner in requirement.extras)]
    return {name for name, _ in found}


def hidden_without(extra):
    """Top-level modules that only distributions outside the extra provide."""
    brought = brought_by(extra)
    providers = packages_distributions().items()
    return [module for module, names in providers if brought.isdisjoint(map(canonicalize_name, names))]


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        ("", ["curvature_protocol.*", "curvature_client", "curvature_client.command"]),
        ("service", ["curvature_service.*", "curvature_state.*", *DRIVERS]),
        ("worker", ["curvature_worker.*", "curvature_engine.*", "curvature_state.*", *DRIVERS]),
    ],
)
def test_an_extra_brings_what_its_code_imports(extra, modules):
    command = [sys.executable, "-c", LIMITED, json.dumps(hidden_without(extra)), *modules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
