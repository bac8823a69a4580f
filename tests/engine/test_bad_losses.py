"""What a loss does not take is refused with what was expected, what came, and what to do."""

import pytest
import torch
from torch import nn

import curvature_engine as engine

NET = nn.Linear(3, 2)
X, Y, R = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]), torch.rand(5, 2)


def refused(code, loss, y=R, match=None, net=NET, x=X, extensions=("grad",), **options):
    with pytest.raises(engine.EngineError, match=match) as caught:
        engine.analyze(net, x, y, list(extensions), loss=loss, **options)
    assert caught.value.code == code, caught.value
    assert caught.value.remedy
    return caught.value


def named(name, **options):
    return {"name": name, "options": options}


@pytest.mark.parametrize(
    ("loss", "param", "match"),
    [
        (named("cross_entropy", weight=[1.0]), "weight", "each of the 2 classes; got 1"),
        (named("cross_entropy", weight=[1.0, -1.0]), "weight", "each item a number from 0, or None; got"),
        (named("cross_entropy", weight=3.0), "weight", "a list"),
        (named("cross_entropy", weight=[1.0, "x"]), "weight", "each item a number"),
        (named("cross_entropy", weight=[1.0, float("nan")]), "weight", "each item a number"),
        (named("cross_entropy", label_smoothing=1.1), "label_smoothing", "a number from 0 to 1; got 1.1"),
        (named("cross_entropy", label_smoothing="much"), "label_smoothing", "a number"),
        (named("cross_entropy", ignore_index=1.5), "ignore_index", "a whole number"),
        (named("cross_entropy", class_axis="first"), "class_axis", "one of 'second', 'last', None"),
        (named("cross_entropy", output=1.5), "output", "a whole number or a string or None"),
        (named("cross_entropy", beta=1), "beta", "no option 'beta'"),
        (named("huber", delta=0), "delta", "a number above 0"),
        (named("smooth_l1", beta=-1.0), "beta", "a number above 0"),
        (named("poisson_nll", log_input=1), "log_input", "True or False"),
        (named("bce_with_logits", pos_weight=[1.0, 2.0, 3.0]), "pos_weight", r"broadcast.*\[5, 2\]"),
        (named("bce_with_logits", pos_weight=[1.0, -2.0]), "pos_weight", "numbers from 0"),
        (named("bce_with_logits", weight=[1.0, [2.0]]), "weight", "broadcast"),
        (named("bce_with_logits", weight=["x", "y"]), "weight", "a number or a list"),
        (named("gaussian_nll", var=-1.0), "var", "from 0"),
        (named("gaussian_nll", var=[1.0, float("inf")]), "var", "a number"),
    ],
)
def test_options(loss, param, match):
    y = Y if loss["name"] == "cross_entropy" else R
    assert refused("invalid_option", loss, y, match=match).param == f"loss.{param}"


@pytest.mark.parametrize(
    ("loss", "y", "match"),
    [
        ("bce_with_logits", R * 3, r"targets in \[0, 1\]"),
        ("bce_with_logits", Y, r"shape \[5, 2\]; got \[5\]"),
        ("poisson_nll", -R, "counts; got -"),
        ("huber", R > 0.5, "real targets; got bool"),
        (
            "cross_entropy",
            R[:, :1],
            r"float32 and shape \[5, 1\].*\[5\], or probabilities of the outputs' shape \[5, 2\]",
        ),
        ("cross_entropy", R - 1, "negative"),
        ("nll", R, r"nll expects class indices \(int64\) \[5\]"),
        (named("nll", weight=[0.0, 1.0]), torch.zeros(5, dtype=torch.long), "no term is left"),
        (named("cross_entropy", ignore_index=1), torch.ones(5, dtype=torch.long), "no term is left"),
        (named("cross_entropy", ignore_index=1), Y + 1, "0 … 1"),
    ],
)
def test_targets(loss, y, match):
    refused("invalid_targets", loss, y, match=match)


@pytest.mark.parametrize("extension", ["diag_ggn_exact", "diag_ggn_mc", "kfac", "kflr"])
def test_first_order_losses_give_no_curvature(extension):
    asked = ("batch_grad", extension)
    refused(
        "unsupported_loss",
        "l1",
        match=f"l1 gives no {extension}: not twice differentiable; use huber",
        extensions=asked,
    )
    refused("unsupported_loss", "nll", Y, match=f"nll gives no {extension}: .*; use cross_entropy", extensions=asked)
    assert set(engine.analyze(NET, X, R, ["batch_grad", "variance"], loss="l1").groups) == {"batch_grad", "variance"}


SEQUENCE = torch.randn(4, 2, 3)


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (torch.randint(0, 2, (4, 2)), "may stand along either axis"),  # outputs [4, 2, 2]
        (torch.rand(4, 2, 2), "may stand along either axis"),
    ],
)
def test_an_ambiguous_class_axis_must_be_said(y, match):
    error = refused("invalid_option", "cross_entropy", y, match=match, x=SEQUENCE)
    assert 'class_axis="last"' in error.remedy
    by_axis = {
        axis: engine.analyze(NET, SEQUENCE, y, ["grad"], loss=named("cross_entropy", class_axis=axis)).loss
        for axis in ("second", "last")
    }
    assert by_axis["second"] != by_axis["last"]


def test_classes_that_fit_only_the_last_axis_are_not_guessed():
    x, y = torch.randn(4, 5, 3), torch.randint(0, 2, (4, 5))
    error = refused("invalid_option", "cross_entropy", y, match="stand along the last axis", x=x)
    assert error.param == "loss.class_axis"
    assert engine.analyze(NET, x, y, ["grad"], loss=named("cross_entropy", class_axis="last")).groups


def test_classes_need_an_axis():
    class Flat(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias).sum(1)

    net = torch.jit.trace(Flat(3, 2), X)
    refused("unsupported_outputs", "cross_entropy", Y, match="bce_with_logits for a single logit", net=net)


def test_only_torchs_own_classes_stand_for_a_loss():
    class Twice(nn.MSELoss):
        pass

    refused("unknown_loss", Twice(), match="Twice is no loss module")
