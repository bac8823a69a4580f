"""Every model of the table that torch.export takes, exported: equal to brute force and to its TorchScript."""

import pytest
import torch
from tests.engine.models import CASES, build, exported
from tests.engine.test_table import PER_PARAMETER, REQUESTS, TOLERANCE, analysis_of, error, expected_of, reference_of

import curvature_engine as engine

BY_NAME = {case.name: case for case in CASES}
NOT_EXPORTABLE = {"if_and_loop": "torch.export reads no branch on data but torch.cond"}
FALLBACK_WHEN_DECOMPOSED = {"groupnorm": {"3.weight", "3.bias"}}
"""Instance normalisation becomes a batch normalisation of repeated weights, which has no rule."""

BIAS_APART_WHEN_DECOMPOSED = {"sequence_first", "lstm"}
"""Linear layers on sequences that are no views become a product and a sum: there is no joint factor."""


@pytest.mark.parametrize(("form", "loss"), [("training", "cross_entropy"), ("core", "mse")])
@pytest.mark.parametrize("name", [case.name for case in CASES if case.name not in NOT_EXPORTABLE])
def test_an_exported_model_gives_what_its_torchscript_gives(name, form, loss):
    case = BY_NAME[name]
    module, inputs = build(case)
    program = exported(module, inputs, decomposed=form == "core")
    targets = reference_of(name, loss, "mean").targets
    result = engine.analyze(program, inputs, targets, REQUESTS, loss=loss)
    assert result.info["format"] == "export"
    for extension in PER_PARAMETER:
        for parameter, value in expected_of(name, loss, "mean", extension).items():
            assert error(result[extension][parameter], value) <= TOLERANCE, (extension, parameter)
    _, _, of_script = analysis_of(name, loss, "mean", case.ways[0])
    for label, group in of_script.groups.items():
        if form == "core" and name in BIAS_APART_WHEN_DECOMPOSED and group.options.get("joint_bias"):
            continue
        assert set(result.groups[label].tensors) == set(group.tensors)
        for key, tensor in group.tensors.items():
            assert error(result.groups[label].tensors[key], tensor) <= 1e-12, (label, key)
    provenance = result.groups["variance"].provenance
    fallback = set(case.fallback) | (FALLBACK_WHEN_DECOMPOSED.get(name, set()) if form == "core" else set())
    assert {p for p, entry in provenance.items() if entry["method"] == "fallback"} == fallback


@pytest.mark.parametrize("name", NOT_EXPORTABLE)
def test_what_cannot_be_exported_is_known(name):
    with pytest.raises(Exception, match="data-dependent"):
        exported(*build(BY_NAME[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["residual_batchnorm", "tied_embedding", "attention"])
def test_other_dtypes_give_what_torchscript_gives(name, dtype, tmp_path):
    module, inputs = build(BY_NAME[name])
    module = module.to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    torch.export.save(exported(module, inputs), tmp_path / "model.pt2")
    targets = torch.zeros(len(inputs[0]), dtype=torch.long)
    requests = ["outputs", "batch_grad", "diag_ggn_exact"]
    result = engine.analyze(tmp_path / "model.pt2", inputs, targets, requests)
    of_trace = engine.analyze(torch.jit.trace(module, inputs, check_trace=False), inputs, targets, requests)
    for label, group in of_trace.groups.items():
        for key, tensor in group.tensors.items():
            assert torch.equal(result.groups[label].tensors[key], tensor), (label, key)
