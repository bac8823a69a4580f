"""What is analyzed as a part of a data set, what is refused, and what is left of it for merging."""

import pytest
import torch
from tests.engine.models import CASES, build
from tests.engine.sharding import EVERYTHING, in_parts
from torch import Tensor, nn

import curvature_engine as engine
from curvature_engine import draws
from curvature_engine.extensions import EXTENSIONS, Extension
from curvature_engine.extensions.first_order import BATCH_GRAD, SUM_GRAD_SQUARED, VARIANCE
from curvature_engine.extensions.kronecker import KFLR

BY_NAME = {case.name: case for case in CASES}


def mlp(count=4):
    module, _ = build(BY_NAME["mlp"])
    torch.manual_seed(1)
    inputs = torch.randn(count, 5, dtype=torch.float64)
    return engine.load(torch.jit.script(module)), inputs, torch.randint(0, 3, (count,))


def part_of(program, inputs, targets, extensions, first=10, **options):
    return engine.analyze(program, inputs, targets, extensions, part=engine.DataSetPart(first), **options)


# What is left


def test_a_part_says_where_it_is_and_what_it_adds_to_Z():
    program, inputs, targets = mlp()
    loss = {"name": "cross_entropy", "options": {"weight": [0.5, 1.0, 2.0]}}
    analysis = part_of(program, inputs, targets, ["grad"], loss=loss)
    expected = float(torch.tensor([0.5, 1.0, 2.0])[targets].sum())
    assert (analysis.info["Z"], analysis.info["reduction"]) == (1.0, "mean")
    assert {**analysis.info["part"], "path": None} == {
        **{"first_sample": 10, "samples": 4, "mean_Z": expected, "path": None, "probed": True}
    }
    by_sum = engine.analyze(program, inputs, targets, ["grad"], loss=loss, reduction="sum")
    assert float(analysis.loss) == float(by_sum.loss)
    for name, tensor in by_sum["grad"].items():
        assert torch.equal(analysis["grad"][name], tensor)
    assert {entry["Z"] for entry in analysis.groups["grad"].provenance.values()} == {1.0}
    assert "part" not in by_sum.info


def test_states_hold_companions_with_provenance():
    program, inputs, targets = mlp()
    analysis = part_of(program, inputs, targets, ["variance", "gradient_noise_scale", "kflr"])
    keys = {label: set(group.tensors) for label, group in analysis.groups.items()}
    assert {"0.weight", "0.weight#mean"} <= keys["variance"] & keys["gradient_noise_scale"]
    assert {"0.weight/B", "0.weight/A", "0.weight/A#count", "0.bias/B"} <= keys["kflr"]
    assert "0.bias/A#count" not in keys["kflr"]
    for group in analysis.groups.values():
        assert set(group.provenance) == set(group.tensors)
        assert {entry["method"] for entry in group.provenance.values()} == {"closed form"}
    assert int(analysis.groups["kflr"].tensors["0.weight/A#count"]) == 4
    with pytest.raises(KeyError):
        analysis["variance"]["0.weight#median"]


def test_the_plan_of_a_part_is_what_is_done():
    program, inputs, targets = mlp(1)
    part = engine.DataSetPart(3)
    plan = engine.plan(program, inputs, targets, ["variance", "gradient_noise_scale"], part=part)
    assert plan == engine.analyze(program, inputs, targets, ["variance", "gradient_noise_scale"], part=part).plan
    assert plan.result_bytes > engine.plan(program, inputs, targets, ["variance"]).result_bytes


@pytest.mark.parametrize("first", [-1, 2**63, 1.0, None])
def test_the_first_sample_is_a_whole_number(first):
    program, inputs, targets = mlp()
    with pytest.raises(engine.EngineError, match="first_sample must be a whole number"):
        part_of(program, inputs, targets, ["grad"], first)


# Draws


@pytest.mark.parametrize("name", ["cross_entropy", "bce_with_logits", "mse", "huber"])
def test_draws_go_by_the_sample_s_number_in_the_data_set(name):
    program, inputs, targets = mlp(6)
    if name != "cross_entropy":
        targets = torch.rand(6, 3, dtype=torch.float64)
    options = {"loss": name, "reduction": "sum", "seed": 11}
    request = {"name": "sqrt_ggn_mc", "options": {"mc_samples": 3}}
    whole = engine.analyze(program, inputs, targets, [request], **options)
    part = part_of(program, inputs[4:], targets[4:], [request], 4, **options)
    elsewhere = part_of(program, inputs[4:], targets[4:], [request], 5, **options)
    for parameter, tensor in whole["sqrt_ggn_mc"].items():
        torch.testing.assert_close(part["sqrt_ggn_mc"][parameter], tensor[:, 4:], rtol=1e-12, atol=1e-15)
        assert not torch.allclose(elsewhere["sqrt_ggn_mc"][parameter], tensor[:, 4:])


def test_numbers_of_samples_beyond_32_bits():
    far = 2**40 + torch.arange(3)
    assert torch.equal(draws.uniform(0, far, torch.arange(2), 0)[1:], draws.uniform(0, far[1:], torch.arange(2), 0))
    program, inputs, targets = mlp()
    near, away = (part_of(program, inputs, targets, ["diag_ggn_mc"], first) for first in (0, 2**40))
    assert not torch.equal(near["diag_ggn_mc"]["0.weight"], away["diag_ggn_mc"]["0.weight"])


# What cannot be merged

BATCH = (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        ("batch_dot", "batch_dot", "takes all samples together"),
        ("kfra", "kfra", "takes all samples together"),
        ({"name": "kfra", "label": "mine"}, "mine", "mine .kfra. cannot be merged: it takes all samples together"),
        ({"name": "batch_grad", "options": {"subsampling": [0]}}, "batch_grad.subsampling", "samples of one batch"),
        ({"name": "diag_hessian", "options": {"subsampling": [0]}}, "diag_hessian.subsampling", "samples of one batch"),
        ({"name": "batch_dot", "options": {"against": BATCH}}, "batch_dot.against", "another batch"),
    ],
)
def test_what_needs_the_whole_batch(request_, param, words):
    program, inputs, targets = mlp()
    for refuse in (
        lambda: engine.plan_merging([request_]),
        lambda: part_of(program, inputs, targets, [request_]),
        lambda: engine.plan(program, inputs, targets, [request_], part=engine.DataSetPart(0)),
        lambda: engine.merge([request_], [engine.PartResult(0.0, {"reduction": "sum"}, {})]),
    ):
        with pytest.raises(engine.EngineError, match=words) as refused:
            refuse()
        assert (refused.value.code, refused.value.param) == ("whole_batch_required", param)
        assert refused.value.remedy


def test_another_batch_is_refused_by_its_hash_too():
    request = {"name": "batch_dot", "options": {"against": {"sha256": "0" * 64}}}
    with pytest.raises(engine.EngineError, match="another batch") as refused:
        engine.plan_merging([request])
    assert refused.value.code == "whole_batch_required"


@pytest.mark.parametrize(
    ("extensions", "code"), [(["kfacs"], "unknown_extension"), ([3], "invalid_request"), (3, "invalid_request")]
)
def test_requests_that_make_no_sense(extensions, code):
    with pytest.raises(engine.EngineError) as refused:
        engine.plan_merging(extensions)
    assert refused.value.code == code


def test_the_plan_of_merging():
    found = engine.plan_merging(EVERYTHING)
    told = {label: (plan.how, plan.axis, plan.degree) for label, plan in found.items()}
    assert told == {
        "batch_loss": ("append", 0, 1.0),
        "outputs": ("append", 0, 0.0),
        "grad": ("merge", 0, 1.0),
        "batch_grad": ("append", 0, 1.0),
        "batch_l2": ("append", 0, 2.0),
        "sum_grad_squared": ("merge", 0, 2.0),
        "variance": ("merge", 0, 2.0),
        "gradient_noise_scale": ("merge", 0, 0.0),
        "diag_ggn_exact": ("merge", 0, 1.0),
        "batch_diag_ggn_exact": ("append", 0, 1.0),
        "sqrt_ggn_exact": ("append", 1, 0.5),
        "saliency": ("merge", 0, 1.0),
        "kflr": ("merge", 0, 1.0),
        "diag_ggn_mc": ("merge", 0, 1.0),
        "batch_diag_ggn_mc": ("append", 0, 1.0),
        "sqrt_ggn_mc": ("append", 1, 0.5),
        "norms": ("append", 0, 0.0),
        "batch_grad of samples": ("append", 0, 0.0),
        "sum_grad_squared of samples": ("merge", 0, 0.0),
        "variance of samples": ("merge", 0, 0.0),
        "drawn saliency": ("merge", 0, 1.0),
        **{label: ("merge", 0, 1.0) for label in told if label.startswith("kfac")},
    }
    assert found["sqrt_ggn_mc"].factor(16.0) == 0.25
    assert found["norms"].factor(0.0) == 1.0


def test_every_extension_that_merges_declares_its_degree():
    assert [e.name for e in EXTENSIONS.values() if e.merging != "whole batch" and e.degree is None] == []


def own(like, **fields):
    declared = {"name": "own", "degree": None, "merger": None, "adapt": None, **fields}
    return Extension(**{**{f: getattr(like, f) for f in like.__dataclass_fields__}, **declared})


@pytest.mark.parametrize(
    ("extension", "under_mean", "under_sum"),
    [
        (own(SUM_GRAD_SQUARED), "it does not declare its degree", None),
        (own(SUM_GRAD_SQUARED, degree=2.0), None, None),
        (own(BATCH_GRAD), "it does not declare its degree", None),
        (own(VARIANCE, degree=2.0), "declares no merger", "declares no merger"),
        (own(KFLR, degree=1.0), "declares no merger", "declares no merger"),
        (own(SUM_GRAD_SQUARED, merging="whole batch"), "takes all samples together", "takes all samples together"),
    ],
)
def test_what_plug_ins_must_declare(extension, under_mean, under_sum, monkeypatch, tmp_path):
    monkeypatch.setitem(EXTENSIONS, "own", extension)
    program, inputs, targets = mlp()
    for reduction, reason in (("mean", under_mean), ("sum", under_sum)):
        if reason is None:
            _, tensors = in_parts(
                program, (inputs,), targets, ["own"], (1, 3), tmp_path / reduction, reduction=reduction
            )
            whole = engine.analyze(program, inputs, targets, ["own"], reduction=reduction)
            for key, tensor in whole.groups["own"].tensors.items():
                torch.testing.assert_close(tensors["own"][key], tensor, rtol=1e-12, atol=1e-15)
            continue
        with pytest.raises(engine.EngineError, match=reason) as refused:
            engine.plan_merging(["own"], reduction=reduction)
        assert refused.value.code == "whole_batch_required"


# Models and losses that see the whole batch


class Centred(nn.Module):
    """Samples are coupled; one by itself, and one beside itself, is zero."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(5, 3)

    def forward(self, x):
        h = self.l(x)
        return h - h.mean(0)


class Shared(Centred):
    """Samples are coupled, and no derivative shows it."""

    def forward(self, x):
        h = self.l(x)
        return h - h.detach().mean(0)


class Divided(Centred):
    def forward(self, x):
        return self.l(x) / x.shape[0]


class Scaled(Centred):
    def forward(self, x):
        return self.l(x) * float(x.abs().max())


class Alone(Centred):
    """Takes one sample at a time."""

    def forward(self, x):
        return self.l(x.view(1, 5))


@pytest.mark.parametrize("extensions", [["batch_grad"], ["grad"], ["outputs"]], ids=str)
@pytest.mark.parametrize(("make", "count"), [(Shared, 4), (Divided, 4), (Scaled, 4), (Divided, 1)])
def test_outputs_that_depend_on_the_batch(make, count, extensions):
    _, inputs, targets = mlp(count)
    model = torch.jit.script(make().double())
    inputs[-1, 0] = 9.0
    with pytest.raises(engine.EngineError, match="in a batch of another size") as refused:
        part_of(model, inputs, targets, extensions)
    assert (refused.value.code, refused.value.param) == ("whole_batch_required", "model")


@pytest.mark.parametrize("count", [1, 4])
def test_coupled_samples_are_refused_even_in_parts_of_one(count):
    _, inputs, targets = mlp(count)
    model = torch.jit.script(Centred().double())
    with pytest.raises(engine.EngineError) as refused:
        part_of(model, inputs, targets, ["batch_grad"])
    assert refused.value.code == ("coupled_samples" if count == 1 else "whole_batch_required")


def test_parts_of_one_sample_that_cannot_be_probed_are_told(tmp_path):
    _, inputs, targets = mlp(3)
    model = torch.jit.script(Alone().double())
    merged, _ = in_parts(model, (inputs,), targets, ["grad"], (1, 1, 1), tmp_path)
    assert any("could not be checked" in text for text in merged.warnings)
    program, *_ = mlp()
    merged, _ = in_parts(program, (inputs,), targets, ["grad"], (1, 1, 1), tmp_path / "probed")
    assert merged.warnings == []


def test_the_first_sample_is_found_along_the_second_axis(tmp_path):
    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 3)

        def forward(self, x, mask):
            return self.l(torch.tanh(mask @ x.transpose(0, 1))).sum(1)

    x, mask = torch.randn(4, 4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    part = part_of(torch.jit.script(Sequences().double()), (x, mask), torch.tensor([0, 1, 2, 0]), ["batch_grad"])
    assert part.info["part"]["probed"]


def test_active_dropout_is_refused():
    module = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).double().train()
    _, inputs, targets = mlp()
    with pytest.raises(engine.EngineError, match="mask is drawn for the whole batch") as refused:
        part_of(torch.jit.script(module), inputs, targets, ["grad"], eval=False)
    assert refused.value.code == "whole_batch_required"


@pytest.mark.parametrize("name", ["gaussian_nll", "bce_with_logits"])
def test_options_of_the_loss_for_every_sample(name):
    program, inputs, _ = mlp(2)
    option = {"gaussian_nll": "var", "bce_with_logits": "weight"}[name]
    targets = torch.rand(2, 3, dtype=torch.float64)
    by_sample = {"name": name, "options": {option: [[1.0, 2.0, 3.0], [2.0, 1.0, 0.5]]}}
    with pytest.raises(engine.EngineError, match="numbers for 2 samples") as refused:
        part_of(program, inputs, targets, ["grad"], loss=by_sample)
    assert (refused.value.code, refused.value.param) == ("whole_batch_required", f"loss.{option}")
    for shared in ([1.0, 2.0, 3.0], [[1.0, 2.0, 3.0]], 2.0):
        part_of(program, inputs, targets, ["grad"], loss={"name": name, "options": {option: shared}})


@pytest.mark.parametrize("count", [1, 4])
def test_losses_of_the_user_s_own_that_see_the_batch(count):
    def divided(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1) / outputs.shape[0]

    def centred(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - outputs.mean(0) - targets).square().sum(1)

    program, inputs, _ = mlp(count)
    targets = torch.rand(count, 3, dtype=torch.float64)
    for function, code in ((divided, "whole_batch_required"), (centred, "coupled_samples")):
        with pytest.raises(engine.EngineError) as refused:
            part_of(program, inputs, targets, ["grad"], loss=torch.jit.script(function))
        assert (refused.value.code, refused.value.param) == (code, "loss")


def test_names_that_would_be_mistaken_for_companions():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("w#mean", nn.Parameter(torch.randn(5, 3, dtype=torch.float64)))

        def forward(self, x):
            return x @ getattr(self, "w#mean")

    _, inputs, targets = mlp()
    model = torch.jit.trace(Odd(), inputs)
    engine.analyze(model, inputs, targets, ["variance"])
    with pytest.raises(engine.EngineError, match="no parameter's name may hold #"):
        part_of(model, inputs, targets, ["variance"])


# Memory


def test_a_plan_that_does_not_fit_is_refused_before_the_work():
    program, inputs, targets = mlp()
    needed = engine.plan(program, inputs, targets, ["batch_grad"]).peak_bytes
    done = []
    with pytest.raises(engine.DoesNotFit, match=str(needed)) as refused:
        engine.analyze(
            program, inputs, targets, ["batch_grad"], most_bytes=needed - 1, progress=lambda *at: done.append(at)
        )
    assert (refused.value.code, refused.value.needed_bytes, done) == ("no_fitting_worker", needed, [])
    engine.analyze(program, inputs, targets, ["batch_grad"], most_bytes=needed)
