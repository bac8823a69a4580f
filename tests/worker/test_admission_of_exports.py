"""Exported programs: honest ones pass and stay the same model; whatever could run code on loading does not."""

import io
import json
import pickle
import warnings
import zipfile

import pytest
import torch
from tests.engine.models import CASES, build, exported
from torch import nn

import curvature_engine as engine
from curvature_worker import admission_of_exports
from curvature_worker.admission import admit

BY_NAME = {case.name: case for case in CASES}


class Holding(nn.Module):
    """A parameter, a buffer, a constant, and a buffer that is not saved with the others."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 3)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("loose", torch.ones(3), persistent=False)
        self.constant = torch.ones(3)

    def forward(self, x):
        return self.l(x) * self.kept + self.loose + self.constant + torch.tensor([1.0, 2.0, 3.0])


def entries_of(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"notes.txt": "mine"})
    with zipfile.ZipFile(buffer) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def entries():
    return entries_of(exported(Holding().eval(), (torch.randn(2, 4),)))


@pytest.fixture
def judge(tmp_path):
    def run(entries, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / "model", "w", compression) as archive:
            for name, data in entries.items():
                archive.writestr(f"m/{name}", data)
        refusal = admit(tmp_path / "model", tmp_path / "admitted")
        assert (tmp_path / "admitted").exists() == (refusal is None)
        return refusal

    return run


@pytest.mark.parametrize("name", ["mlp", "tied_embedding", "in_place", "lstm", "residual_batchnorm"])
def test_an_honest_program_is_admitted_and_stays_the_same_model(tmp_path, name):
    module, inputs = build(BY_NAME[name])
    torch.export.save(exported(module, inputs), tmp_path / "model.pt2")
    assert admit(tmp_path / "model.pt2", tmp_path / "admitted") is None
    targets = torch.zeros(len(inputs[0]), dtype=torch.long)
    first, second = (
        engine.analyze(tmp_path / f, inputs, targets, ["outputs", "grad"]) for f in ("model.pt2", "admitted")
    )
    assert torch.equal(first["outputs"], second["outputs"])
    assert first.info["aliases"] == second.info["aliases"]


def test_what_the_engine_does_not_read_is_left_out(judge, entries, tmp_path):
    assert judge(entries) is None
    with zipfile.ZipFile(tmp_path / "admitted") as archive:
        kept = {name.split("/", 1)[1] for name in archive.namelist()}
    assert {"models/model.json", "data/constants/tensor_0", "data/weights/weight_0"} < kept
    assert not any(name.startswith(("data/sample_inputs", "extra", ".data")) for name in kept)
    x = torch.randn(2, 4)
    result = engine.analyze(tmp_path / "admitted", x, torch.tensor([0, 1]), ["outputs"])
    assert result["outputs"].shape == (2, 3)


def test_example_inputs_are_never_unpickled(judge, entries):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    assert judge({**entries, "data/sample_inputs/model.pt": pickle.dumps(Bomb())}) is None


@pytest.mark.parametrize(
    "name",
    [
        "data/aotinductor/model/x.so",
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/weights/model.pt",
        "models/other.json",
        "data/executorch/x.pte",
        "xl_model_weights/x",
        "data/weights/../../x",
    ],
)
def test_other_entries_are_refused(judge, entries, name):
    refusal = judge({**entries, name: b"x"})
    assert "does not write" in refusal.message or "outside" in refusal.message
    assert refusal.remedy


@pytest.mark.parametrize("kind", ["weights", "constants"])
@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"use_pickle": True}, "no plain tensor"),
        ({"path_name": "custom_obj_0"}, "no plain tensor"),
        ({"path_name": "../../models/model.json"}, "no plain tensor"),
        ({"path_name": None}, "no plain tensor"),
    ],
)
def test_tensors_that_are_pickled_or_lie_elsewhere_are_refused(judge, entries, kind, change, part):
    config = f"data/{kind}/model_{kind}_config.json"
    described = json.loads(entries[config])
    next(iter(described["config"].values())).update(change)
    assert part in judge({**entries, config: json.dumps(described).encode()}).message


def test_a_tensor_without_its_bytes_is_refused(judge, entries):
    del entries["data/weights/weight_0"]
    assert "is not in the archive" in judge(entries).message


@pytest.mark.parametrize("missing", ["archive_format", "models/model.json", "data/weights/model_weights_config.json"])
def test_a_part_that_is_missing_is_named(judge, entries, missing):
    del entries[missing]
    assert missing in judge(entries).message


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"graph_module": 3}', b"\xff\xfe", b"[" * 200_000, b'{"a":' * 200_000]
)
def test_a_description_that_is_none_is_refused(judge, entries, data):
    assert judge({**entries, "models/model.json": data}) is not None


def test_a_description_too_large_to_read_is_refused(judge, entries, monkeypatch):
    monkeypatch.setattr(admission_of_exports, "_MAX_JSON_BYTES", 10)
    assert "10 are accepted" in judge(entries).message


def test_another_format_of_archive_is_refused(judge, entries):
    assert "not pt2" in judge({**entries, "archive_format": b"pt3"}).message


class Subclass(torch.Tensor):
    pass


def test_pickled_subclasses_are_refused_by_name(judge):
    net = nn.Linear(4, 3)
    net.weight = nn.Parameter(net.weight.detach().as_subclass(Subclass))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            entries = entries_of(torch.export.export(net.eval(), (torch.randn(2, 4),)))
        except Exception as error:  # noqa: BLE001 (torch's own refusal serves as well)
            pytest.skip(f"torch does not export it: {str(error)[:80]}")
    assert "no plain tensor" in judge(entries).message
