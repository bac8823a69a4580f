"""Whatever torch.jit.save writes of an honest model is admitted, and the repacked file is the same model."""

import pytest
import torch
from tests.engine.models import CASES, build, torchscript
from torch import nn

from curvature_worker.admission import admit


class Spaced(nn.Module):
    """Operators that raise the file format's version."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(5, 4)

    def forward(self, x):
        steps = torch.linspace(0.0, 1.0, 4, dtype=x.dtype) + torch.logspace(0.0, 1.0, 4, dtype=x.dtype)
        return nn.functional.gelu(self.l(x) * steps)


def check(script, inputs, tmp_path):
    torch.jit.save(script, tmp_path / "model")
    assert admit(tmp_path / "model", tmp_path / "admitted") is None
    loaded = torch.jit.load(tmp_path / "admitted")
    with torch.jit.optimized_execution(False):
        assert torch.equal(loaded(*inputs), script(*inputs))


@pytest.mark.parametrize(
    ("case", "way"),
    [pytest.param(case, way, id=f"{case.name}-{way}") for case in CASES for way in case.ways],
)
def test_every_model_of_the_engines_table_is_admitted(tmp_path, case, way):
    module, inputs = build(case)
    check(torchscript(module, inputs, way), inputs, tmp_path)


@pytest.mark.parametrize("way", ["scripted", "traced"])
def test_files_of_newer_versions_of_the_format_are_admitted(tmp_path, way):
    inputs = (torch.randn(3, 5, dtype=torch.float64),)
    check(torchscript(Spaced().double().eval(), inputs, way), inputs, tmp_path)
