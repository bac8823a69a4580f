"""What installed packages bring, in interpreters that have some more on their path."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import curvature_engine as engine
from curvature_engine.extensions import EXTENSIONS
from curvature_engine.plugins import load_plugins

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_extension"

GOOD = """
from curvature_batch_lp import BATCH_LP, BatchLp
from curvature_engine import Extension, LossKind
from curvature_engine.losses.squared_error import MSE
from dataclasses import replace

TWIN = replace(BATCH_LP, name="batch_lp_twin")
LOSS = replace(MSE, summary="squared error once more")
"""


class Site:
    """A folder on the path with packages installed in it."""

    def __init__(self, folder):
        self.folder = folder

    def install(self, name, source, **groups):
        """A module with entry points: group → {name: object of the module}."""
        (self.folder / f"{name}.py").write_text(source)
        information = self.folder / f"{name}-2.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
        lines = []
        for group, points in groups.items():
            lines.append(f"[curvature_engine.{group}]")
            lines += [f"{point} = {name}:{attribute}" for point, attribute in points.items()]
        (information / "entry_points.txt").write_text("\n".join(lines))

    def run(self, code):
        path = f"{self.folder}:{EXAMPLE}"
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={"PYTHONPATH": path, "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_extensions_and_losses_of_packages_are_in_the_catalogue_in_the_packages_order(site):
    site.install("zeta", GOOD, extensions={"x": "TWIN"})
    site.install("alpha", GOOD, extensions={"x": "BATCH_LP"}, losses={"mse_again": "LOSS"})
    done = site.run("import curvature_engine, json; print(json.dumps(curvature_engine.catalogue()))")
    found = json.loads(done.stdout)
    assert [(e["name"], e["package"]) for e in found["extensions"] if "package" in e] == [
        ("batch_lp", "alpha 2.0"),
        ("batch_lp_twin", "zeta 2.0"),
    ]
    assert [(e["name"], e["package"]) for e in found["losses"] if "package" in e] == [("mse_again", "alpha 2.0")]


def test_a_package_imported_before_the_engine_is_no_trouble(site):
    site.install("alpha", GOOD, extensions={"x": "BATCH_LP"})
    done = site.run("import alpha, curvature_engine; print(len(curvature_engine.catalogue()['extensions']))")
    assert done.returncode == 0, done.stderr


def test_a_loss_and_a_rule_of_a_package_are_used(site):
    rule = (
        GOOD
        + """
from curvature_engine import Match, Rule

class TanhOfParameter(Rule):
    row_axes = 1

    def per_sample(self, role, saved, g):
        return g.sum(1)

def match_minimum(name, arguments, watched, output):
    return None
"""
    )
    site.install("alpha", rule, losses={"mse_again": "LOSS"}, rules={"minimum": "match_minimum"})
    done = site.run(
        """
import torch, curvature_engine as engine
net, x, y = torch.nn.Linear(2, 1).double(), torch.randn(3, 2).double(), torch.randn(3, 1).double()
values = [engine.analyze(net, x, y, ["diag_ggn_exact"], loss=name) for name in ("mse", "mse_again")]
assert torch.equal(*[v["diag_ggn_exact"]["weight"] for v in values])
from curvature_engine.rules import RULES
assert len(RULES["minimum"]) == 1
assert engine.catalogue()["rules"] == ["alpha 2.0"], engine.catalogue()["rules"]
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "points", "expected"),
    [
        ("raise ValueError('not today')", {"x": "A"}, "cannot be imported: ValueError: not today"),
        ("import nowhere_at_all", {"x": "A"}, "cannot be imported: ModuleNotFoundError"),
        ("A = 3", {"x": "B"}, "cannot be imported: AttributeError"),
        ("A = 3", {"x": "A"}, "is int, not a curvature_engine.Extension"),
        (GOOD + "A = replace(TWIN, name='kfac')", {"x": "A"}, "is named 'kfac', as is one of the engine itself"),
        (GOOD + "A = TWIN", {"x": "A", "y": "A"}, "is named 'batch_lp_twin', as is one of {package} 2.0"),
        (GOOD + "A = replace(TWIN, name='../x')", {"x": "A"}, "is named '../x'"),
        (GOOD + "A = replace(TWIN, name='manifest')", {"x": "A"}, "is named 'manifest'"),
        (GOOD + "A = replace(TWIN, accumulator=None)", {"x": "A"}, "has no accumulator"),
        (GOOD + "A = replace(TWIN, columns='all')", {"x": "A"}, "has columns='all'"),
        (GOOD + "A = replace(TWIN, merging='somehow')", {"x": "A"}, "has merging='somehow'"),
        (GOOD + "A = replace(TWIN, degree='two')", {"x": "A"}, "has degree='two'"),
        (GOOD + "A = replace(TWIN, merger=BatchLp)", {"x": "A"}, "has a merger that is none"),
        (GOOD + "A = replace(TWIN, adapt=lambda o: {'no': 1})", {"x": "A"}, "fails to adapt to its options"),
        (GOOD + "A = replace(TWIN, columns='sampled')", {"x": "A"}, "without an option mc_samples"),
        (GOOD + "A = replace(TWIN, options={'p': {}})", {"x": "A"}, "no JSON schemas with defaults"),
        (GOOD + "A = replace(TWIN, options={'p': {'type': 'number', 'default': 'x'}})", {"x": "A"}, "do not fit"),
    ],
)
def test_a_broken_package_is_refused_by_name(site, monkeypatch, request, source, points, expected):
    name = f"broken{abs(hash(request.node.name))}"  # imported modules stay imported
    site.install(name, source, extensions=points)
    for folder in (EXAMPLE, site.folder):
        monkeypatch.syspath_prepend(folder)
    before = dict(EXTENSIONS)
    load_plugins.cache_clear()
    try:
        with pytest.raises(engine.EngineError) as caught:
            engine.catalogue()
    finally:
        load_plugins.cache_clear()
    assert expected.format(package=name) in str(caught.value)
    assert f"{name} 2.0, in group curvature_engine.extensions" in str(caught.value)
    assert before == EXTENSIONS
