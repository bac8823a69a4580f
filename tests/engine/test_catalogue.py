"""What the catalogue says of merging and of seeds is what the extensions do."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

import curvature_engine as engine
from curvature_engine.extensions import EXTENSIONS
from curvature_engine.extensions.first_order import SUM_GRAD_SQUARED, VARIANCE
from curvature_engine.extensions.kronecker import KFAC

PUBLISHED = Path(__file__).parents[2] / "service" / "curvature_service" / "catalogue.json"
ENTRIES = {entry["name"]: entry for entry in engine.catalogue()["extensions"]}


def test_the_service_s_copy_is_the_engine_s():
    assert json.loads(PUBLISHED.read_text()) == json.loads(json.dumps(engine.catalogue()))


def test_seeds():
    drawn = {name: entry["draws_when"] for name, entry in ENTRIES.items() if entry["draws_when"] is not None}
    assert drawn == {
        **{name: {} for name in ("diag_ggn_mc", "batch_diag_ggn_mc", "sqrt_ggn_mc")},
        "saliency": {"diagonal": ["mc"]},
        "kfac": {"fisher": ["mc"]},
    }


@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_choice_of_options(name):
    extension, told = EXTENSIONS[name], ENTRIES[name]["draws_when"]
    choices = {option: schema["enum"] for option, schema in extension.options.items() if "enum" in schema}
    for values in product(*choices.values()):
        options = {option: schema["default"] for option, schema in extension.options.items()}
        options |= dict(zip(choices, values, strict=True))
        drawn = extension.under(options).columns == "sampled"
        assert drawn == (told is not None and all(options[o] in allowed for o, allowed in told.items()))


def test_choices_that_decide_together_are_all_named():
    together = replace(
        KFAC,
        columns="gradient",
        adapt=lambda o: {"columns": "sampled"} if o["fisher"] != "type2" and o["strict"] else {},
    )
    assert together.draws_when() == {"fisher": ["mc", "empirical"], "strict": [True]}


def test_merging_as_it_can_be_done(monkeypatch):
    assert {name for name, entry in ENTRIES.items() if entry["merging"] == "whole batch"} == {"batch_dot", "kfra"}
    monkeypatch.setitem(EXTENSIONS, "a", replace(SUM_GRAD_SQUARED, name="a", degree=None))
    monkeypatch.setitem(EXTENSIONS, "b", replace(VARIANCE, name="b", merger=None))
    merging = {entry["name"]: entry["merging"] for entry in engine.catalogue()["extensions"]}
    assert (merging["a"], merging["b"]) == ("sum", "whole batch")
