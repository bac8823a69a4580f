"""The same numbers on a CUDA device as on the CPU, in float64."""

import pytest
import torch
from tests.engine.losses import LOSS_CASES
from tests.engine.models import CASES, build, targets_for, torchscript
from tests.engine.test_kfra import CASES as CHAINS
from tests.engine.test_table import PER_PARAMETER, REQUESTS, TOLERANCE, error

import curvature_engine as engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MONTE_CARLO = [{"name": "diag_ggn_mc", "options": {"mc_samples": 3}}, {"name": "kfac", "options": {"mc_samples": 2}}]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_gpu_computes_what_the_cpu_does(case, loss):
    module, inputs = build(case)
    targets = targets_for(module(*inputs), loss)
    script = torchscript(module, inputs, case.ways[0])
    requests = [*REQUESTS, *MONTE_CARLO]
    there = engine.analyze(script, inputs, targets, requests, loss=loss, device="cuda")
    here = engine.analyze(script, inputs, targets, requests, loss=loss)
    assert error(there.loss.cpu(), here.loss) <= TOLERANCE
    for extension in [*PER_PARAMETER, "diag_ggn_mc"]:
        for parameter, value in here[extension].items():
            assert there[extension][parameter].device.type == "cuda"
            assert error(there[extension][parameter].cpu(), value) <= TOLERANCE, (extension, parameter)
    for parameter, pair in here["kfac"].items():
        assert error(there["kfac"][parameter].B.cpu(), pair.B) <= TOLERANCE, parameter


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
def test_a_gpu_averages_as_the_cpu_does(case):
    module, inputs = build(case)
    targets = targets_for(module(*inputs), "mse")
    script = torch.jit.script(module)
    here, there = (
        engine.analyze(script, inputs, targets, ["kfra"], loss="mse", device=device)["kfra"]
        for device in ("cpu", "cuda")
    )
    for parameter, pair in here.items():
        assert error(there[parameter].B.cpu(), pair.B) <= TOLERANCE, parameter


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.id)
def test_a_gpu_computes_the_losses_that_the_cpu_does(case):
    module, inputs, targets = case.build()
    requests = ["batch_grad", *["diag_ggn_exact", MONTE_CARLO[0]] * case.second_order]
    here, there = (
        engine.analyze(torch.jit.script(module), inputs, targets, requests, loss=case.request, device=device)
        for device in ("cpu", "cuda")
    )
    assert error(there.loss.cpu(), here.loss) <= TOLERANCE
    for extension, group in here.groups.items():
        for parameter, value in group.by_parameter.items():
            assert error(there[extension][parameter].cpu(), value) <= TOLERANCE, (extension, parameter)
