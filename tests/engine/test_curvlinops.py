"""curvlinops 3.0.1 as a peer: KFAC expand and reduce on shared linear layers and convolutions, diagonals of matrices.

It has no transposed or one- and three-dimensional convolutions, and of grouped ones it averages the groups' inputs,
where we keep a pair per group. Where outputs have positions, its type-2 columns are of all positions at once: summed
over positions ("reduce") they leave products of different positions' columns, which no Hessian of the loss has.
"""

import warnings
from functools import cache
from itertools import product

import pytest
import torch
from tests.engine.models import Case, images, sequences, targets_for, torchscript, vectors
from torch import nn

import curvature_engine as engine
from curvature_engine.losses import LossSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from curvlinops import GGNLinearOperator, HessianLinearOperator, KFACLinearOperator

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
TOLERANCE = 1e-10
LOSSES = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce_with_logits": nn.BCEWithLogitsLoss}
FISHERS = {"type2": "type-2", "mc": "mc", "empirical": "empirical"}
DRAWS = {"type2": 1, "mc": 3, "empirical": 1}


class ClassesSecond(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


CASES = [
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        vectors,
        losses=("cross_entropy", "mse", "bce_with_logits"),
    ),
    Case(
        "cnn",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(2, 1)),
            *(nn.Conv2d(4, 3, 2, dilation=(2, 1), padding=1, bias=False), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)),
        ),
        images,
        losses=("cross_entropy", "mse"),
    ),
    Case(
        "shared",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), Mean(), nn.Linear(4, 3)),
        sequences,
        losses=("cross_entropy", "mse"),
    ),
    Case(
        "classes_second",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), ClassesSecond()),
        lambda: sequences(5),
        losses=("cross_entropy",),
    ),
    Case(
        "outputs_at_positions",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: sequences(5),
        losses=("mse", "bce_with_logits"),
    ),
]
BY_NAME = {case.name: case for case in CASES}
COMBINATIONS = [
    pytest.param(case.name, loss, reduction, id=f"{case.name}-{loss}-{reduction}")
    for case in CASES
    for loss in case.losses
    for reduction in ("mean", "sum")
]


@cache
def problem(name, loss):
    torch.manual_seed(0)
    case = BY_NAME[name]
    module, inputs = case.make(), case.inputs()
    module = module.double().eval()
    outputs = module(*inputs)
    if loss == "bce_with_logits":
        return module, inputs[0], torch.randint(0, 2, outputs.shape).double()
    return module, inputs[0], targets_for(outputs, loss)


@cache
def ours(name, loss, reduction):
    module, x, targets = problem(name, loss)
    requests = [
        {
            "name": "kfac",
            "label": f"{fisher}_{approximation}_{joint}",
            "options": {
                "fisher": fisher,
                "approximation": approximation,
                "joint_bias": joint,
                "mc_samples": DRAWS[fisher],
            },
        }
        for fisher, approximation, joint in product(FISHERS, ("expand", "reduce"), (False, True))
    ]
    script = torchscript(module, (x,), "traced")
    return engine.analyze(
        script, x, targets, [*requests, "diag_ggn_exact", "diag_hessian"], loss=loss, reduction=reduction
    )


class OurDraws(KFACLinearOperator):
    """Takes the targets that the engine draws."""

    drawn = None

    def draw_label(self, output):
        return next(self.drawn)


def drawn_targets(name, loss, reduction):
    """Read off the engine's columns, a row for each position."""
    module, x, targets = problem(name, loss)
    outputs = module(x).detach()
    bound = LossSpec.parse(loss, reduction).bind(outputs, targets)
    for m in range(DRAWS["mc"]):
        score = bound.sampled_column(0, m) * bound.Z**0.5
        if loss == "cross_entropy":
            yield score.argmin(1).flatten()
        elif loss == "mse":
            yield (outputs - score / 2).flatten(0, -2)
        else:
            yield (outputs.sigmoid() - score).round().flatten(0, -2)


def theirs(name, loss, reduction, fisher, approximation, joint):
    module, x, targets = problem(name, loss)
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    operator = OurDraws(
        module,
        LOSSES[loss](reduction=reduction),
        [p for m in layers for p in m.parameters()],
        [(x, targets)],
        check_deterministic=False,
        fisher_type=FISHERS[fisher],
        mc_samples=DRAWS[fisher],
        kfac_approx=approximation,
        separate_weight_and_bias=not joint,
    )
    operator.drawn = iter(list(drawn_targets(name, loss, reduction)))
    operator.compute_kronecker_factors()
    return {layer: (B, operator._input_covariances[layer]) for layer, B in operator._gradient_covariances.items()}


def error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


MIXED = [(name, "type2", "reduce") for name in ("classes_second", "outputs_at_positions")]
"""What differs by those products."""
KRONECKER = [
    pytest.param(*case.values, fisher, approximation, id=f"{case.id}-{fisher}-{approximation}")
    for case, fisher, approximation in product(COMBINATIONS, FISHERS, ("expand", "reduce"))
    if (case.values[0], fisher, approximation) not in MIXED
]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("name", "loss", "reduction", "fisher", "approximation"), KRONECKER)
def test_kronecker_factors_equal_curvlinops(name, loss, reduction, fisher, approximation, joint):
    group = ours(name, loss, reduction)[f"{fisher}_{approximation}_{joint}"]
    found = theirs(name, loss, reduction, fisher, approximation, joint)
    assert {f"{layer}.weight" for layer in found} == {p for p in group if p.endswith("weight")}
    for layer, (B, A) in found.items():
        assert error(group[f"{layer}.weight"].B, B) <= TOLERANCE, layer
        assert error(group[f"{layer}.weight"].A, A) <= TOLERANCE, layer
        if f"{layer}.bias" in group:
            assert error(group[f"{layer}.bias"].B, B) <= TOLERANCE, layer


@pytest.mark.parametrize(
    ("extension", "operator"), [("diag_ggn_exact", GGNLinearOperator), ("diag_hessian", HessianLinearOperator)]
)
@pytest.mark.parametrize(("name", "loss", "reduction"), COMBINATIONS)
def test_diagonals_equal_those_of_the_dense_matrices_of_curvlinops(name, loss, reduction, extension, operator):
    module, x, targets = problem(name, loss)
    parameters = dict(module.named_parameters())
    criterion = LOSSES[loss](reduction=reduction)
    matrix = operator(module, criterion, list(parameters.values()), [(x, targets)], check_deterministic=False)
    diagonal = (matrix @ torch.eye(matrix.shape[1], dtype=torch.float64)).diagonal()
    for parameter, part in zip(parameters, diagonal.split([p.numel() for p in parameters.values()]), strict=True):
        expected = part.view(parameters[parameter].shape)
        assert error(ours(name, loss, reduction)[extension][parameter], expected) <= TOLERANCE, parameter
