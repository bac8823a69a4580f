"""One model held to brute force in a few exact quantities, and to which of its parameters have closed forms."""

import torch
from tests.engine.reference import Reference

import curvature_engine as engine

EXTENSIONS = ("batch_grad", "diag_ggn_exact", "batch_l2")


def build(make, *inputs, seed=0):
    """The module in eval mode, float64, and its inputs: shapes stand for normal numbers."""
    torch.manual_seed(seed)
    module = make().double().eval()
    inputs = tuple(torch.randn(s, dtype=torch.float64) if isinstance(s, tuple) else s for s in inputs)
    with torch.no_grad():
        module(*inputs)
    return module, inputs


def traced(module, inputs):
    return torch.jit.trace(module, inputs, check_trace=False)


def check(module, inputs, model, fallback=(), hessian=False):
    """Analyze `model`, which stands for `module`, and compare."""
    outputs = module(*inputs)
    targets = torch.arange(len(outputs)) % outputs.shape[1]
    reference = Reference(module, inputs, targets, "cross_entropy", "mean")
    requests = [*EXTENSIONS, "outputs", *(["batch_diag_hessian"] if hessian else [])]
    result = engine.analyze(model, inputs, targets, requests)
    torch.testing.assert_close(result["outputs"], reference.outputs.detach(), rtol=1e-12, atol=1e-14)
    for extension in EXTENSIONS:
        for parameter, value in reference.expected(extension).items():
            # Some parameters have no gradient but rounding: then measure by the outputs' scale.
            scale = value.abs().max().clamp(min=1e-6)
            error = (result[extension][parameter] - value).abs().max() / scale
            assert error <= 1e-10, (extension, parameter)
    if hessian:
        expected = reference.batch_diag_hessian()
        scale = max(float(value.abs().max()) for value in expected.values())
        for parameter, value in expected.items():
            torch.testing.assert_close(
                result["batch_diag_hessian"][parameter], value, rtol=1e-10, atol=1e-11 * scale, msg=parameter
            )
    provenance = result.groups["batch_grad"].provenance
    assert {p for p, entry in provenance.items() if entry["method"] == "fallback"} == set(fallback)
    return result
