"""A batch as a data set: cut into parts, each analyzed by itself, and what they leave merged."""

import json
from itertools import accumulate

import torch
from safetensors.torch import load_file

import curvature_engine as engine

EVERYTHING = [
    *("batch_loss", "outputs", "grad", "batch_grad", "batch_l2", "sum_grad_squared", "variance"),
    *("gradient_noise_scale", "diag_ggn_exact", "batch_diag_ggn_exact", "sqrt_ggn_exact", "saliency", "kflr"),
    *({"name": name, "options": {"mc_samples": 2}} for name in ("diag_ggn_mc", "batch_diag_ggn_mc", "sqrt_ggn_mc")),
    {"name": "batch_l2", "label": "norms", "options": {"over": "model", "scale": "sample"}},
    *(
        {"name": name, "label": f"{name} of samples", "options": {"scale": "sample"}}
        for name in ("batch_grad", "sum_grad_squared", "variance")
    ),
    {"name": "saliency", "label": "drawn saliency", "options": {"diagonal": "mc", "mc_samples": 2}},
    *(
        {"name": "kfac", "label": f"kfac {fisher} {approximation}", "options": {**options, "fisher": fisher}}
        for fisher, approximation, options in (
            ("mc", "expand", {"mc_samples": 2}),
            ("mc", "reduce", {"approximation": "reduce"}),
            ("empirical", "expand", {"joint_bias": True}),
            ("empirical", "backpack", {"approximation": "backpack"}),
            ("type2", "reduce", {"approximation": "reduce", "joint_bias": True}),
        )
    ),
]
FIRST_ORDER = [
    *("batch_loss", "outputs", "grad", "batch_grad", "batch_l2", "sum_grad_squared", "variance"),
    *("gradient_noise_scale", {"name": "kfac", "options": {"fisher": "empirical"}}),
]
HESSIAN = ["diag_hessian", "batch_diag_hessian"]


def cut(inputs, targets, sizes, axis=0):
    """(first sample, inputs, targets) of every part."""
    starts = [0, *accumulate(sizes)]
    for start, n in zip(starts, sizes, strict=False):
        yield start, tuple(x.narrow(axis, start, n) for x in inputs), targets[start : start + n]


def analyze_parts(program, inputs, targets, extensions, sizes, folder, axis=0, **options):
    """What the parts leave, through files and JSON, as workers hand it on."""
    found = []
    for k, (first, x, t) in enumerate(cut(inputs, targets, sizes, axis)):
        part = engine.DataSetPart(first)
        found.append(stored(engine.analyze(program, x, t, extensions, part=part, **options), folder / f"part{k}"))
    return found


def stored(analysis, folder):
    """What an analyzed part leaves."""
    folder.mkdir(parents=True)
    groups = {}
    for label, group in analysis.groups.items():
        path = folder / f"{label}.safetensors"
        engine.save_tensors(path, group.tensors)
        assert load_file(path).keys() == group.provenance.keys()
        provenance, missing = json.loads(json.dumps([group.provenance, group.missing]))
        groups[label] = engine.PartGroup(missing, provenance, path)
    return engine.PartResult(
        float(analysis.loss), json.loads(json.dumps(analysis.info)), groups, tuple(analysis.warnings)
    )


def in_parts(program, inputs, targets, extensions, sizes, folder, results_dir=None, **options):
    """The result of a data set, and its tensors by label and key, rows put together."""
    parts = analyze_parts(program, inputs, targets, extensions, sizes, folder, **options)
    merged = engine.merge(extensions, parts, results_dir=results_dir)
    return merged, {label: tensors_of(group, parts) for label, group in merged.groups.items()}


def tensors_of(group, parts):
    if group.appended is None:
        return dict(group.tensors)
    assert not group.tensors
    files = [load_file(part.groups[group.label].path) for part in parts]
    found = {}
    for key, (shape, _) in group.appended.layout.items():
        found[key] = torch.cat([file[key] for file in files], group.appended.axis) * group.appended.factor
        assert found[key].shape == shape
    return found


def check_equal(whole, merged, tensors, tolerance=1e-12):
    """The result of a data set is that of one batch, its provenance included."""
    assert list(merged.groups) == list(whole.groups)
    for label, group in whole.groups.items():
        other = merged.groups[label]
        assert (other.missing, other.convention, other.kind) == (group.missing, group.convention, group.kind), label
        assert list(tensors[label]) == list(group.tensors) == list(other.provenance), label
        for key, tensor in group.tensors.items():
            if group.extension == "gradient_noise_scale":
                check_scale(tensors[label][key], tensor, merged.info["samples"], tolerance)
            else:
                check_close(tensors[label][key], tensor, tolerance, (label, key))
            entry = {**group.provenance[key], "samples_per_chunk": None, "verification": None, "Z": None}
            found = {**other.provenance[key], "samples_per_chunk": None, "verification": None, "Z": None}
            assert found == entry, (label, key)
            assert abs(other.provenance[key]["Z"] / group.provenance[key]["Z"] - 1) <= tolerance
    assert abs(merged.loss - float(whole.loss)) <= tolerance * abs(float(whole.loss))
    assert abs(merged.info["Z"] / whole.info["Z"] - 1) <= tolerance
    assert {**whole.info, "Z": None} == {
        name: value for name, value in {**merged.info, "Z": None}.items() if name not in ("samples", "parts")
    }


def check_scale(found, expected, N, tolerance):
    """Of B = v/(‖mean‖² − v/N), whose difference may cancel: compare ‖mean‖²/v."""
    of_both = [1 / B + 1 / N for B in (found, expected)]
    check_close(of_both[0], of_both[1], tolerance, "gradient_noise_scale")


def check_close(found, expected, tolerance, place):
    assert found.shape == expected.shape, place
    assert found.dtype == expected.dtype, place
    assert torch.equal(found.isnan(), expected.isnan()), place
    difference = (found - expected).nan_to_num(0.0).abs().max() if expected.numel() else 0.0
    size = expected.nan_to_num(0.0).abs().max() if expected.numel() else 0.0
    assert difference <= tolerance * size or difference <= 1e-15, (place, float(difference / size))
