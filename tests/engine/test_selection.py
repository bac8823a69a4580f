"""The choice of parameters: by whether they are trainable, or by patterns of their names."""

from fnmatch import fnmatchcase

import pytest
import torch
from tests.engine.models import CASES, build, targets_for, torchscript
from torch import nn

import curvature_engine as engine

BY_NAME = {case.name: case for case in CASES}
EXTENSIONS = ["grad", "batch_grad", "variance", "diag_ggn_exact", "kflr"]


def analyze(name, parameters, extensions=("grad",)):
    module, inputs = build(BY_NAME[name])
    script = torchscript(module, inputs, BY_NAME[name].ways[0])
    targets = targets_for(module(*inputs), "cross_entropy")
    return engine.analyze(script, inputs, targets, list(extensions), loss="cross_entropy", parameters=parameters)


def refused(name, parameters, code="no_parameters", match=None):
    with pytest.raises(engine.EngineError, match=match) as caught:
        analyze(name, parameters)
    assert (caught.value.code, caught.value.param) == (code, "parameters")
    return caught.value


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_one_parameter_alone_has_the_numbers_it_has_among_all(name):
    whole = analyze(name, "trainable", EXTENSIONS)
    for parameter in whole["grad"]:
        alone = analyze(name, parameter, EXTENSIONS)
        for extension in EXTENSIONS:
            assert set(alone[extension]) <= {parameter}
            for value in alone[extension].values():
                expected = whole[extension][parameter]
                pairs = zip(value, expected, strict=True) if extension == "kflr" else [(value, expected)]
                for mine, theirs in pairs:
                    if mine is not None:
                        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("patterns", ["0.*", "*.bias", ["0.weight", "6.*"], ["?.weight", "0.weight"], "[!0]*", "*"])
def test_patterns_select_by_name_in_the_models_order(patterns):
    names = list(analyze("cnn", "all")["grad"])
    wanted = [patterns] if isinstance(patterns, str) else patterns
    assert list(analyze("cnn", patterns)["grad"]) == [n for n in names if any(fnmatchcase(n, p) for p in wanted)]


def test_a_shared_parameter_answers_to_all_its_names():
    found = analyze("tied_embedding", "out.weight")["grad"]
    assert list(found) == ["tok.weight"]
    torch.testing.assert_close(found["out.weight"], analyze("tied_embedding", "tok.*")["grad"]["tok.weight"])


def test_a_pattern_without_match_is_told_with_the_names():
    error = refused("cnn", ["0.*", "0.wieght"], match="no parameter matches '0.wieght'; did you mean '0.weight'")
    assert "0.weight, 0.bias, 3.weight" in error.remedy
    assert "did you mean" not in str(refused("cnn", "blocks.*"))


def test_many_names_are_cut_short():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    with pytest.raises(engine.EngineError, match=r"9\.bias and 40 more"):
        engine.analyze(module, torch.randn(3, 2), torch.tensor([0, 1, 1]), ["grad"], parameters="head.*")


def test_asking_for_a_frozen_parameter_or_a_buffer_explains_itself():
    frozen = refused("frozen_parameter", "0.weight", match="0.weight matched by '0.weight' does not require a gradient")
    assert 'parameters="all"' in frozen.remedy
    assert list(analyze("frozen_parameter", "0.*")["grad"]) == ["0.bias"]
    refused("residual_batchnorm", "n.running_mean", match="n.running_mean matched by .* is a buffer")


@pytest.mark.parametrize("wanted", [[], 3, None, [3], {"0.weight"}])
def test_what_is_no_pattern_is_refused(wanted):
    refused("mlp", wanted, code="invalid_option", match="patterns of names; got")
