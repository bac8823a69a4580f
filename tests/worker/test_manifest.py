import copy

import pytest
import torch
from safetensors.torch import save_file

from curvature_worker.errors import JobRefused
from curvature_worker.manifest import build_manifest

PROVENANCE = {
    "method": "closed form",
    "reduction": "mean",
    "Z": 6.0,
    "dtype": "float32",
    "device": "cpu",
    "engine_version": "1",
    "verified": True,
}


ERROR = {"measured": "…", "samples": 6, "outputs": 0.01, "gradient": 0.02, "parameters": {"0.weight": None}}


def group(label, kind, names):
    return {
        "label": label,
        "extension": label,
        "options": {},
        "kind": kind,
        "convention": "[*p]: …",
        "missing": {},
        "provenance": {name: dict(PROVENANCE) for name in names},
    }


@pytest.fixture
def reply():
    return {
        "loss": 1.5,
        "groups": [
            group("variance", "parameters", ["0.weight"]),
            group("kfac", "factors", ["0.weight/A", "0.weight/B"]),
            group("batch_loss", "tensor", ["batch_loss"]),
        ],
        "info": {
            "engine_version": "1",
            "format": "export",
            "loss_name": "cross_entropy",
            "loss_options": {"ignore_index": -100},
            "loss_output": "logits",
            "reduction": "mean",
            "Z": 6.0,
            "seed": 0,
            "dtype": "float32",
            "device": "cpu",
            "aliases": {},
            "precision": "float32",
            "channels_last": False,
        },
        "warnings": ["the child's"],
        "timings_ms": {"load": 1.0, "compute": 2.0, "write": 3.0},
    }


@pytest.fixture
def files(tmp_path):
    tensors = {
        "variance": {"0.weight": torch.zeros(2, 3)},
        "kfac": {"0.weight/B": torch.zeros(2, 2), "0.weight/A": torch.zeros(3, 3)},
        "batch_loss": {"batch_loss": torch.zeros(6)},
    }
    for label, group in tensors.items():
        save_file(group, tmp_path / f"{label}.safetensors")
    return {label: tmp_path / f"{label}.safetensors" for label in tensors}


def build(reply, files, warnings=()):
    return build_manifest(
        reply, files, job_id="j", attempt=1, isolation="landlock+seccomp+rlimits", warnings=list(warnings)
    )


def test_every_tensor_is_described(reply, files):
    manifest = build(reply, files)
    shapes = {t.name: t.shape for g in manifest.groups for t in g.tensors}
    assert shapes == {"0.weight": (2, 3), "0.weight/A": (3, 3), "0.weight/B": (2, 2), "batch_loss": (6,)}


def test_factors_are_told_apart_from_their_parameter(reply, files):
    kfac = build(reply, files).groups[1]
    assert {(t.parameter, t.factor) for t in kfac.tensors} == {("0.weight", "A"), ("0.weight", "B")}


def test_a_quantity_of_the_whole_model_has_no_parameter(reply, files):
    assert build(reply, files).groups[2].tensors[0].parameter is None


def test_the_clients_warnings_come_first(reply, files):
    assert build(reply, files, ["the client's"]).warnings == ("the client's", "the child's")


def change(*path, to):
    def apply(reply):
        place = reply
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return apply


def remove(*path):
    def apply(reply):
        place = reply
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return apply


@pytest.mark.parametrize(
    "lie",
    [
        change("groups", 0, "label", to="../../etc/passwd"),
        change("groups", 0, "label", to="other"),
        change("groups", 0, "label", to=["variance"]),
        change("groups", to=[]),
        change("groups", to=None),
        change("groups", to={"a": 1}),
        change("groups", 0, to="variance"),
        lambda reply: reply["groups"].append(reply["groups"][0]),
        lambda reply: reply["groups"].reverse(),
        remove("groups", 1),
        change("groups", 0, "kind", to="secret"),
        change("groups", 2, "kind", to="parameters") and change("groups", 2, "provenance", to={"x": PROVENANCE}),
        change("groups", 0, "kind", to="tensor"),
        change("groups", 0, "options", to=[1]),
        change("groups", 0, "missing", to={"a": {}}),
        change("groups", 0, "provenance", to={}),
        change("groups", 0, "provenance", to=None),
        change("groups", 0, "provenance", "0.weight", to=[]),
        change("groups", 0, "provenance", "0.weight", "Z", to=float("inf")),
        remove("groups", 0, "provenance", "0.weight", "method"),
        change("info", "Z", to=float("nan")),
        change("info", "Z", to="six"),
        change("info", "seed", to="x"),
        change("info", to=None),
        change("info", "precision_error", to="small"),
        change("info", "precision_error", to={"gradient": 0.1}),
        change("info", "precision_error", to={**ERROR, "gradient": float("nan")}),
        change("info", "precision_error", to={**ERROR, "parameters": {"0.weight": float("inf")}}),
        change("groups", 0, "provenance", "0.weight", "precision_error", to=float("nan")),
        remove("info", "engine_version"),
        change("loss", to="low"),
        remove("loss"),
        change("warnings", to="text"),
        change("warnings", to=[1]),
        change("timings_ms", "load", to=float("nan")),
        change("timings_ms", to=[]),
    ],
)
def test_a_reply_that_makes_no_sense_fails_the_job(reply, files, lie):
    told = copy.deepcopy(reply)
    lie(told)
    with pytest.raises(JobRefused) as caught:
        build(told, files)
    assert caught.value.code == "internal_error"


def test_what_was_measured_of_a_precision_stands_in_the_manifest(reply, files):
    assert build(reply, files).precision_error is None
    reply["info"] |= {"precision": "bf16", "precision_error": ERROR}
    manifest = build(reply, files)
    assert (manifest.precision, manifest.precision_error.model_dump()) == ("bf16", ERROR)


def test_what_the_child_adds_is_not_believed(reply, files):
    reply["info"] |= {"job_id": "another", "isolation": "perfect", "attempt": 9}
    reply["timings_ms"]["queue"] = 0.0
    manifest = build(reply, files)
    assert (manifest.job_id, manifest.attempt, manifest.isolation) == ("j", 1, "landlock+seccomp+rlimits")
    assert set(manifest.timings_ms) == {"load", "compute", "write"}


def test_a_file_that_holds_something_else_fails_the_job(reply, files):
    save_file({"1.weight": torch.zeros(2, 3)}, files["variance"])
    with pytest.raises(JobRefused, match="other tensors"):
        build(reply, files)


def test_a_loss_that_is_not_finite_is_none(reply, files):
    reply["loss"] = None
    assert build(reply, files).loss is None
