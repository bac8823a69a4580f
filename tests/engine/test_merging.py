"""A data set in parts gives what one batch of all its samples gives."""

import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.engine.losses import LOSS_CASES
from tests.engine.models import CASES, N, exported, targets_for, torchscript
from tests.engine.sharding import (
    EVERYTHING,
    FIRST_ORDER,
    HESSIAN,
    analyze_parts,
    check_close,
    check_equal,
    in_parts,
    stored,
)
from tests.engine.test_custom_losses import focal_free
from torch import Tensor, nn

import curvature_engine as engine
from curvature_engine import merging, planner

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
BY_NAME = {case.name: case for case in CASES}
LOSSES = {case.id: case for case in LOSS_CASES}
BATCH_WIDE = ("if_and_loop",)
SHARDINGS = [(7,), (1,) * 7, (6, 1), (2, 2, 3)]


def build(case, count=7):
    """A model, and a batch of `count` samples: several of its own batches, one after another."""
    torch.manual_seed(0)
    module = case.make()
    batches = [case.inputs() for _ in range(-(-count // N))]
    inputs = tuple(torch.cat(each)[:count] for each in zip(*batches, strict=True))
    module = module.double().eval()
    with torch.no_grad():
        module(*inputs)
    return module, inputs


def both(program, inputs, targets, requests, sizes, folder, **options):
    program = engine.load(program)
    whole = engine.analyze(program, inputs, targets, requests, **options)
    return whole, *in_parts(program, inputs, targets, requests, sizes, folder, **options)


@pytest.mark.parametrize("name", [case.name for case in CASES if case.name not in BATCH_WIDE])
def test_every_quantity_of_every_model(name, tmp_path):
    module, inputs = build(BY_NAME[name])
    targets = targets_for(module(*inputs), "cross_entropy")
    requests = [*EVERYTHING, *([] if name in ("cnn", "residual_batchnorm", "convolutions") else HESSIAN)]
    if name == "masked_rows":  # a part of one sample has a joint block by reduce, where the whole has none
        requests = [r for r in requests if isinstance(r, str) or r.get("label") != "kfac type2 reduce"]
    model = torchscript(module, inputs, BY_NAME[name].ways[0])
    check_equal(*both(model, inputs, targets, requests, (3, 1, 2, 1), tmp_path, loss="cross_entropy", seed=3))


@pytest.mark.parametrize("sizes", SHARDINGS, ids=str)
@pytest.mark.parametrize("name", ["groupnorm", "tied_embedding", "lstm", "no_rule"])
def test_every_sharding(name, sizes, tmp_path):
    module, inputs = build(BY_NAME[name])
    targets = targets_for(module(*inputs), "cross_entropy")
    model = torchscript(module, inputs, "scripted")
    check_equal(*both(model, inputs, targets, [*EVERYTHING, *HESSIAN], sizes, tmp_path, loss="cross_entropy"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES.keys())
def test_every_loss(case, reduction, tmp_path):
    module, inputs, targets = case.build()
    requests = EVERYTHING if case.second_order else FIRST_ORDER
    options = {"loss": case.request, "reduction": reduction, "seed": 5}
    check_equal(*both(torch.jit.script(module), inputs, targets, requests, (1, len(targets) - 1), tmp_path, **options))


def softmax(outputs: Tensor, targets: Tensor) -> Tensor:
    """Its Hessian has an eigenvalue that is zero but for rounding."""
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("function", [softmax, focal_free])
def test_losses_of_the_user_s_own(function, reduction, tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "cross_entropy" if function is softmax else "mse")
    options = {"loss": torch.jit.script(function), "reduction": reduction}
    check_equal(*both(torch.jit.script(module), inputs, targets, EVERYTHING, (2, 1, 4), tmp_path, **options))


def test_a_quadratic_loss_of_the_user_s_own_draws_what_squared_error_draws(tmp_path):
    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1)

    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "mse")
    own, known = (
        engine.analyze(torch.jit.script(module), inputs, targets, ["diag_ggn_mc"], loss=loss, reduction="sum")
        for loss in (torch.jit.script(squares), "mse")
    )
    for name, tensor in known["diag_ggn_mc"].items():
        check_close(own["diag_ggn_mc"][name], tensor, 1e-12, name)


IGNORING = {"name": "cross_entropy", "options": {"ignore_index": 1, "weight": [0.5, 1.0, 2.0], "label_smoothing": 0.2}}


@pytest.mark.parametrize(
    "loss", [IGNORING, {"name": "nll", "options": {"ignore_index": 1}}], ids=["cross_entropy", "nll"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parts_without_a_term(loss, reduction, tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    targets = torch.tensor([0, 2, 1, 1, 1, 2, 1])
    requests = EVERYTHING if loss is IGNORING else FIRST_ORDER
    options = {"loss": loss, "reduction": reduction}
    check_equal(*both(torch.jit.script(module), inputs, targets, requests, (2, 3, 1, 1), tmp_path, **options))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_data_set_without_a_term_is_refused_as_a_batch_is(reduction, tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    targets, options = torch.ones(7, dtype=torch.int64), {"loss": IGNORING, "reduction": reduction}
    with pytest.raises(engine.EngineError, match="no term is left") as refused:
        in_parts(engine.load(module), inputs, targets, ["grad"], (3, 4), tmp_path, **options)
    with pytest.raises(engine.EngineError, match="no term is left") as of_batch:
        engine.analyze(module, inputs, targets, ["grad"], **options)
    assert refused.value.code == of_batch.value.code == "invalid_targets"


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_programs(decomposed, tmp_path):
    module, inputs = build(BY_NAME["attention"])
    targets = targets_for(module(*inputs), "cross_entropy")
    program = exported(module, inputs, decomposed=decomposed)
    check_equal(*both(program, inputs, targets, [*EVERYTHING, *HESSIAN], (3, 2, 2), tmp_path))


def test_language_models_with_a_loss_at_every_position(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok, self.pos, self.mix = nn.Embedding(7, 4), nn.Embedding(8, 4), nn.Linear(4, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.tok.weight

        def forward(self, x):
            h = self.tok(x) + self.pos(torch.arange(x.size(1), device=x.device))
            return self.out(h + torch.tanh(self.mix(h)).cumsum(1))

    torch.manual_seed(0)
    words, targets = torch.randint(0, 7, (6, 5)), torch.randint(0, 7, (6, 5))
    targets[2:4] = -100  # a whole part is padding
    loss = {"name": "cross_entropy", "options": {"class_axis": "last"}}
    model = torch.jit.script(Words().double())
    check_equal(*both(model, (words,), targets, EVERYTHING, (2, 2, 1, 1), tmp_path, loss=loss))


def test_parts_divided_into_chunks_and_streamed_to_files(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "LEAST_FILE_BYTES", 1)
    module, inputs = build(BY_NAME["lstm"], count=9)
    targets = targets_for(module(*inputs), "cross_entropy")
    program = engine.load(torch.jit.script(module))
    whole = engine.analyze(program, inputs, targets, EVERYTHING)
    parts = analyze_parts(program, inputs, targets, EVERYTHING, (4, 5), tmp_path, budget_bytes=1)
    merged = engine.merge(EVERYTHING, parts)
    assert {e["samples_per_chunk"] for g in merged.groups.values() for e in g.provenance.values()} == {3}
    for label, group in merged.groups.items():
        for key, tensor in group.tensors.items():
            check_close(tensor, whole.groups[label].tensors[key], 1e-12, (label, key)) if label[0] != "g" else None


def test_merged_groups_are_written_tensor_by_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_BLOCK_BYTES", 1)  # a block is one tensor
    module, inputs = build(BY_NAME["cnn"])
    targets = targets_for(module(*inputs), "cross_entropy")
    parts = analyze_parts(torch.jit.script(module), inputs, targets, EVERYTHING, (3, 4), tmp_path)
    done = []
    kept, written = (
        engine.merge(EVERYTHING, parts, results_dir=folder, progress=lambda *at: done.append(at))
        for folder in (None, tmp_path)
    )
    assert done[-1] == (len(done) // 2, len(done) // 2)
    for label, group in kept.groups.items():
        if group.appended is not None:
            assert not (tmp_path / f"{label}.safetensors").exists()
            continue
        found = load_file(tmp_path / f"{label}.safetensors")
        assert found.keys() == group.tensors.keys() == group.provenance.keys()
        for key, tensor in group.tensors.items():
            assert torch.equal(found[key], tensor), (label, key)
            assert torch.equal(written.groups[label].tensors[key], tensor), (label, key)
        for parameter, result in group.items():
            other = written.groups[label][parameter]
            assert torch.equal(
                other.B if isinstance(result, engine.KroneckerFactors) else other,
                result[0] if isinstance(result, engine.KroneckerFactors) else result,
            )


def test_merging_twice_gives_the_same_bits(tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "cross_entropy")
    parts = analyze_parts(torch.jit.script(module), inputs, targets, EVERYTHING, (3, 3, 1), tmp_path)
    first, again = (engine.merge(EVERYTHING, parts) for _ in range(2))
    for label, group in first.groups.items():
        for key, tensor in group.tensors.items():
            assert torch.equal(tensor, again.groups[label].tensors[key])
    assert first.loss == again.loss


def test_a_parameter_that_one_part_has_no_result_for_has_none(tmp_path):
    class Gated(nn.Module):
        """In a part where nothing passes the gate, `b` reaches nothing."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.a(x) + self.b(x) if bool((x > 9.0).any()) else self.a(x)

    torch.manual_seed(0)
    inputs, targets = torch.randn(5, 5, dtype=torch.float64), torch.randint(0, 3, (5,))
    inputs[0, 0] = 10.0
    model = torch.jit.script(Gated().double())
    merged, tensors = in_parts(model, (inputs,), targets, ["kflr", "batch_grad"], (2, 3), tmp_path)
    assert merged.groups["kflr"].missing == dict.fromkeys(("b.weight", "b.bias"), "does not reach the outputs")
    assert set(tensors["kflr"]) == {"a.weight/B", "a.weight/A", "a.bias/B"}
    assert not bool(tensors["batch_grad"]["b.bias"][2:].any())
    assert bool(tensors["batch_grad"]["b.bias"][:2].any())
    assert any("1 of 2 parts took another path" in text for text in merged.warnings)


def test_warnings_of_parts_are_repeated_once(tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "cross_entropy")
    merged, _ = in_parts(torch.jit.script(module.train()), inputs, targets, ["grad"], (2, 3, 2), tmp_path)
    assert [text for text in merged.warnings if "training mode" in text] == merged.warnings


def test_a_loss_that_is_not_finite(tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "mse")
    targets[4] = float("inf")
    program = engine.load(torch.jit.script(module))
    parts = analyze_parts(program, inputs, targets, ["batch_l2"], (2, 5), tmp_path, loss="mse")
    assert engine.merge(["batch_l2"], parts).loss == float("inf")
    told = [part if k == 0 else engine.PartResult(None, part.info, part.groups) for k, part in enumerate(parts)]
    assert engine.merge(["batch_l2"], told).loss != engine.merge(["batch_l2"], told).loss


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts: parts[::-1], "begins with sample"),
        (lambda parts: parts[:1] + parts[2:], "begins with sample"),
        (lambda parts: [], "there are no parts"),
    ],
)
def test_parts_that_are_not_all_or_not_in_order(change, reason, tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "cross_entropy")
    parts = analyze_parts(torch.jit.script(module), inputs, targets, ["grad"], (3, 1, 3), tmp_path)
    with pytest.raises(engine.EngineError, match=reason) as refused:
        engine.merge(["grad"], change(parts))
    assert refused.value.code == "internal_error"


def test_parts_of_other_requests_or_with_torn_files(tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "cross_entropy")
    program = engine.load(torch.jit.script(module))
    parts = analyze_parts(program, inputs, targets, ["grad"], (3, 4), tmp_path)
    other = engine.analyze(
        program,
        inputs[0][3:],
        targets[3:],
        ["grad"],
        seed=1,
        part=engine.DataSetPart(3),
        parameters="0.*",
    )
    strange = stored(other, tmp_path / "strange")
    with pytest.raises(engine.EngineError, match="seed 1"):
        engine.merge(["grad"], [parts[0], strange])
    with pytest.raises(engine.EngineError, match="is not in part 1 as it is in part 0"):
        engine.merge(["grad"], [parts[0], engine.PartResult(0.0, parts[1].info, strange.groups)])
    path = parts[1].groups["grad"].path
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(engine.EngineError, match="ends too early"):
        engine.merge(["grad"], parts)


def test_rows_are_planned_from_their_layout_alone(tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "cross_entropy")
    parts = analyze_parts(torch.jit.script(module), inputs, targets, ["sqrt_ggn_exact"], (3, 4), tmp_path)
    told = []
    for part in parts:
        group = part.groups["sqrt_ggn_exact"]
        layout = {key: (list(shape), dtype) for key, (shape, dtype) in group.shapes().items()}
        told.append(
            engine.PartResult(
                part.loss, part.info, {"sqrt_ggn_exact": engine.PartGroup({}, group.provenance, layout=layout)}
            )
        )
    appended = engine.merge(["sqrt_ggn_exact"], told).groups["sqrt_ggn_exact"].appended
    assert (appended.axis, appended.factor) == (1, 7**-0.5)
    assert appended.layout["0.weight"] == ((3, 7, 6, 5), "F64")


def test_rows_of_different_shapes_are_refused_and_sums_are_not(tmp_path):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 3)

        def forward(self, x):
            return self.l(x)

    torch.manual_seed(0)
    program = engine.load(torch.jit.script(Mean().double()))
    loss, parts, first = {"name": "cross_entropy", "options": {"class_axis": "last"}}, [], 0
    requests = ["grad", "outputs"]
    for n, T in ((2, 5), (3, 2)):
        x, t = torch.randn(n, T, 4, dtype=torch.float64), torch.randint(0, 3, (n, T))
        part = engine.DataSetPart(first)
        parts.append(stored(engine.analyze(program, x, t, requests, loss=loss, part=part), tmp_path / f"{n}"))
        first += n
    merged = engine.merge(["grad"], parts)
    assert merged.info["Z"] == 16.0
    with pytest.raises(engine.EngineError, match="different shapes") as refused:
        engine.merge(requests, parts)
    assert (refused.value.code, refused.value.param) == ("whole_batch_required", "outputs")


def test_the_noise_scale_of_one_sample_is_refused_as_of_a_batch(tmp_path):
    module, inputs = build(BY_NAME["mlp"], count=1)
    with pytest.raises(engine.EngineError, match="at least two samples; got 1") as refused:
        in_parts(engine.load(module), inputs, torch.tensor([0]), ["gradient_noise_scale"], (1,), tmp_path)
    assert refused.value.code == "invalid_inputs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_formats_agree_to_their_rounding(dtype, tmp_path):
    module, inputs = build(BY_NAME["cnn"])
    module, inputs = module.to(dtype), tuple(x.to(dtype) for x in inputs)
    targets = targets_for(module(*inputs), "cross_entropy")
    whole, merged, tensors = both(torch.jit.script(module), inputs, targets, FIRST_ORDER, (3, 1, 3), tmp_path)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for label, group in whole.groups.items():
        for key, tensor in group.tensors.items():
            if label != "gradient_noise_scale":
                check_close(tensors[label][key], tensor, tolerance, (label, key))
    assert merged.info["dtype"] == str(dtype).removeprefix("torch.")


@pytest.fixture
def pages_of_their_own():
    """Tensors of a megabyte and more in pages of their own, so that what the process did before does not count."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
    yield
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # as high as it gets by itself


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of resident pages")
@pytest.mark.usefixtures("pages_of_their_own")
def test_merging_holds_a_block_and_one_part_s_share_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_BLOCK_BYTES", 2**24)
    layers = 12
    torch.manual_seed(0)
    program = engine.load(torch.jit.script(nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(layers)))))
    x, targets = torch.randn(4, 1000), torch.randint(0, 1000, (4,))
    requests = ["grad", "variance"]
    parts = analyze_parts(program, (x,), targets, requests, (2, 2), tmp_path)
    gc.collect()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, peak = resident(), []
    engine.merge(requests, parts, results_dir=tmp_path, progress=lambda *at: peak.append(resident()))
    assert (tmp_path / "variance.safetensors").stat().st_size > layers * 4 * 10**6
    assert max(peak) - before < 5 * 2**24
