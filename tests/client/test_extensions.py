"""Extensions and losses as a request reads them."""

from dataclasses import fields

import pytest
from torch import Tensor, jit, nn, ones, tensor

from curvature_client._errors import UnprocessableError
from curvature_client._extensions import EXTENSIONS, KFAC, BatchGrad, DiagGGNMC, read_extensions
from curvature_client._losses import ALIASES, MODULES, read_loss
from curvature_engine import catalogue
from curvature_engine.losses import modules as engine_modules


def test_every_extension_of_the_engine_has_a_value_with_its_options() -> None:
    published = {entry["name"]: set(entry["options"].get("properties", {})) for entry in catalogue()["extensions"]}

    assert {kind.name: {field.name for field in fields(kind)} - {"label"} for kind in EXTENSIONS} == published


def test_names_dictionaries_and_values_mix() -> None:
    defaults = {"approximation": "expand", "fisher": "mc", "joint_bias": False, "strict": False}
    assert read_extensions(["grad", {"name": "kflr", "label": "k"}, KFAC(mc_samples=4, label="kfac4"), DiagGGNMC]) == [
        {"name": "grad", "options": {}},
        {"name": "kflr", "label": "k", "options": {}},
        {"name": "kfac", "label": "kfac4", "options": {**defaults, "mc_samples": 4}},
        {"name": "diag_ggn_mc", "options": {"mc_samples": 1}},
    ]


def test_samples_may_be_any_sequence() -> None:
    assert read_extensions(BatchGrad(subsampling=range(2)))[0]["options"] == {"scale": "loss", "subsampling": [0, 1]}


def test_one_extension_needs_no_list() -> None:
    assert read_extensions("grad") == [{"name": "grad", "options": {}}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "got none"),
        (["kfac", KFAC()], "'kfac'; give each request"),
        ([3], "got 3"),
        ([{"label": "x"}], "name: Field required"),
        ([{"name": "kfac", "label": "a/b"}], "label"),
    ],
)
def test_a_wrong_list_of_extensions_says_what_is_wrong(given, message) -> None:
    with pytest.raises(UnprocessableError, match=message) as caught:
        read_extensions(given)

    assert caught.value.param == "extensions"


TENTH = tensor(0.1).item()
"""0.1 in float32, exactly."""


@pytest.mark.parametrize(
    ("loss", "reduction", "expected"),
    [
        (None, None, (None, "mean")),
        ("mse", "sum", ({"name": "mse", "options": {}}, "sum")),
        (nn.MSELoss(reduction="sum"), None, ({"name": "mse", "options": {}}, "sum")),
        (nn.CrossEntropyLoss(), "mean", ({"name": "cross_entropy", "options": {}}, "mean")),
        (
            nn.CrossEntropyLoss(ignore_index=0),
            None,
            ({"name": "cross_entropy", "options": {"ignore_index": 0}}, "mean"),
        ),
        (
            nn.CrossEntropyLoss(weight=tensor([0.1, 2.0]), label_smoothing=0.1),
            None,
            ({"name": "cross_entropy", "options": {"weight": [TENTH, 2.0], "label_smoothing": 0.1}}, "mean"),
        ),
        (nn.NLLLoss(weight=ones(2)), None, ({"name": "nll", "options": {"weight": [1.0, 1.0]}}, "mean")),
        (
            nn.BCEWithLogitsLoss(pos_weight=tensor([[2], [3]]), reduction="sum"),
            "sum",
            ({"name": "bce_with_logits", "options": {"pos_weight": [[2.0], [3.0]]}}, "sum"),
        ),
        (
            nn.PoissonNLLLoss(log_input=False, full=True),
            None,
            ({"name": "poisson_nll", "options": {"log_input": False, "full": True}}, "mean"),
        ),
        (nn.HuberLoss(delta=2.0), None, ({"name": "huber", "options": {"delta": 2.0}}, "mean")),
        (nn.SmoothL1Loss(beta=0.5), None, ({"name": "smooth_l1", "options": {"beta": 0.5}}, "mean")),
        (nn.L1Loss(), None, ({"name": "l1", "options": {}}, "mean")),
        ("nll_loss", None, ({"name": "nll", "options": {}}, "mean")),
        (
            {"name": "mse_loss", "options": {"output": "logits"}},
            None,
            ({"name": "mse", "options": {"output": "logits"}}, "mean"),
        ),
        (
            {"name": "cross_entropy", "options": {"ignore_index": 1}},
            None,
            ({"name": "cross_entropy", "options": {"ignore_index": 1}}, "mean"),
        ),
    ],
)
def test_losses_are_read(loss, reduction, expected) -> None:
    assert read_loss(loss, reduction) == expected


class _Twice(nn.MSELoss):
    pass


def _double(outputs: Tensor, targets: Tensor) -> Tensor:
    return 2.0 * (outputs - targets).square().sum(1)


def test_client_and_engine_read_the_same_modules_and_names() -> None:
    by_class = {kind.__name__: entry for kind, entry in engine_modules.MODULES.items()}

    assert (by_class, engine_modules.ALIASES) == (MODULES, ALIASES)


@pytest.mark.parametrize(
    ("loss", "reduction", "message"),
    [
        (nn.MSELoss(), "sum", "the loss module says reduction='mean', the call reduction='sum'"),
        (nn.MSELoss(reduction="none"), None, "got 'none'"),
        (nn.CrossEntropyLoss(weight=tensor([1.0, float("inf")])), None, "finite numbers"),
        (nn.BCELoss(), None, "one of nn.BCEWithLogitsLoss.*got BCELoss"),
        (nn.GaussianNLLLoss(), None, "gaussian_nll.*var"),
        (jit.script(_double), None, "or a function of"),
        ({"name": "custom", "function": "loss.pt"}, None, "function: Extra inputs"),
        (nn.MSELoss, None, r"make an instance: MSELoss\(\)"),
        (_Twice(), None, "got _Twice"),
        (nn.functional.cross_entropy, None, "got cross_entropy"),
        ({"nom": "mse"}, None, "name: Field required"),
        ("mse", "average", 'must be "mean" or "sum"'),
    ],
)
def test_a_wrong_loss_says_what_is_wrong(loss, reduction, message) -> None:
    with pytest.raises(UnprocessableError, match=message):
        read_loss(loss, reduction)
