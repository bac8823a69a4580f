"""A part of the zoo in the ordinary suite: every model in one of its files; all of it is `make coverage`."""

import pytest
import torch
from tests.engine.models import targets_for
from tests.engine.zoo import FAMILIES
from tests.engine.zoo.judge import CHECKS, TOLERANCE, judge, model_file, refusal, ways_of
from tests.engine.zoo.truth import Truth

import curvature_engine as engine
from curvature_engine.extensions import EXTENSIONS

ENTRIES = [e for family, entries in FAMILIES.items() if family != "refused" for e in entries]
# The ways take turns, so that neighbours, which resemble each other, come in different files.
TURNS = [(entry, ways[i % len(ways)]) for i, entry in enumerate(ENTRIES) for ways in [ways_of(entry)]]
SLOW = {"diag_hessian", "batch_diag_hessian", "kfra"}
REFUSED = [(entry, way) for entry in FAMILIES["refused"] for way in ways_of(entry)]


def named(pairs):
    return [pytest.param(entry, way, id=f"{entry.name}-{way}") for entry, way in pairs]


@pytest.mark.parametrize(("entry", "way"), named(TURNS))
def test_individual_gradients_equal_brute_force(entry, way):
    for extension, cell in judge(Truth(entry), way, ("outputs", "batch_grad", "batch_l2")).items():
        assert not cell.refusal, (extension, cell.refusal)
        assert cell.error <= TOLERANCE, extension


@pytest.mark.parametrize(("entry", "way"), named(TURNS[1::3]))
def test_every_extension_equals_brute_force(entry, way):
    cells = judge(Truth(entry), way, tuple(e for e in EXTENSIONS if e not in SLOW))
    for extension, cell in cells.items():
        assert not cell.refusal, (extension, cell.refusal)
        assert cell.error is None or cell.error <= TOLERANCE, extension


@pytest.mark.parametrize(("entry", "way"), named(TURNS[::9]))
def test_hessians_and_kfra_equal_brute_force(entry, way):
    cells = judge(Truth(entry), way, tuple(SLOW))
    for extension, cell in cells.items():
        assert not cell.wrong, extension
        assert extension == "kfra" or bool(cell.refusal) == (not entry.hessian), cell.refusal


@pytest.mark.parametrize(("entry", "way"), named(REFUSED))
def test_refused_with_the_reason(entry, way):
    error = refusal(entry, way)
    assert error is not None
    assert error.code == entry.refused
    assert error.remedy


def test_every_extension_is_compared():
    assert set(EXTENSIONS) == set(CHECKS)


def test_names_are_unique_and_many():
    names = [entry.name for entries in FAMILIES.values() for entry in entries]
    assert len(set(names)) == len(names) >= 80


def cast(module, inputs, dtype):
    return module.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def gradients(module, inputs, entry, targets):
    """Individual gradients by plain autograd, all parameters in one row per sample: [N, P]."""
    outputs = module(*inputs)
    outputs = outputs if entry.output is None else outputs[entry.output]
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for n in range(len(outputs)):
        f, t = outputs[n : n + 1], targets[n : n + 1]
        if entry.loss == "mse":
            loss = ((f - t) ** 2).sum() / outputs.numel()
        else:
            f = f.movedim(entry.class_axis, 1)
            loss = torch.nn.functional.cross_entropy(f, t, reduction="sum") / targets.numel()
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
            )
        )
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in ENTRIES[::2]])
def test_lower_precision_is_as_near_as_eager_autograd(entry, dtype):
    """Against float64 on the same rounded parameters: at most a few times as far as eager autograd is."""
    module, inputs = cast(*entry.build(), dtype)
    module64, inputs64 = cast(*entry.build(), dtype)
    module64, inputs64 = cast(module64, inputs64, torch.float64)
    with torch.no_grad():
        outputs = module64(*inputs64)
    outputs = outputs if entry.output is None else outputs[entry.output]
    targets = targets_for(outputs.movedim(entry.class_axis, 1), entry.loss).to(
        dtype if entry.loss == "mse" else torch.int64
    )
    exact = gradients(module64, inputs64, entry, targets.double() if entry.loss == "mse" else targets)
    eager = gradients(module, inputs, entry, targets).double()
    options = {} if entry.output is None else {"output": entry.output}
    options |= {"class_axis": "last"} if entry.class_axis == -1 else {}
    way = "scripted" if "scripted" in entry.ways else "traced"
    way = way if way in entry.ways else entry.ways[0]
    result = engine.analyze(
        model_file(module, inputs, way),
        inputs,
        targets,
        ["batch_grad", "diag_ggn_exact"],
        loss={"name": entry.loss, "options": options},
    )
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    own = torch.cat([result["batch_grad"][n].reshape(len(outputs), -1) for n in names], 1).double()
    allowed = 4 * (eager - exact).norm() + 4 * torch.finfo(dtype).eps * exact.norm()
    assert (own - exact).norm() <= allowed
    assert all(bool(torch.isfinite(d).all()) for d in result["diag_ggn_exact"].values())
    assert all(entry["verified"] for entry in result.groups["batch_grad"].provenance.values())
