"""What a user may give as a sweep: names of values, refusals before anything is sent, files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from curvature_client import KFAC, Client, CurvatureError, UnprocessableError, Variance
from curvature_client._sweep_files import read_sweep_file
from curvature_client._sweep_names import name_all

NOWHERE = "http://127.0.0.1:9"
BATCH = (np.zeros((2, 3), "float32"), np.zeros(2, "int64"))
BASE = {"model": "model.pt", "batch": BATCH, "extensions": ["grad"]}


def my_loss(outputs, targets):
    return (outputs - targets).square().sum(1)


NAMES = [
    ("seed", [3, np.int64(4), torch.tensor(5)], [3, 4, 5]),
    ("reduction", ["mean", "sum"], ["mean", "sum"]),
    ("eval", [True, False], [True, False]),
    ("model", ["a/net.pt", Path("b/other.pt")], ["net.pt", "other.pt"]),
    ("model", ["a/net.pt", Path("b/net.pt")], ["a/net.pt", "b/net.pt"]),
    ("model", [nn.Linear(1, 1), nn.Linear(1, 1)], [0, 1]),
    ("model", [nn.Linear(1, 1), "net.pt"], [0, "net.pt"]),
    ("batch", [BATCH, "x.safetensors"], [0, "x.safetensors"]),
    ("loss", ["mse", {"name": "huber", "options": {"delta": 2.0}}, None], ["mse", "huber", "default"]),
    ("loss", [nn.MSELoss(), my_loss, "losses/own.pt"], ["MSELoss", "my_loss", "own.pt"]),
    ("loss", [nn.MSELoss(), nn.MSELoss()], [0, 1]),
    ("extensions", ["grad", ["variance", KFAC(label="k")], [Variance]], ["grad", "variance+k", "variance"]),
    ("parameters", ["all", ["0.*", "*.bias"]], ["all", "0.*+*.bias"]),
    ("metadata", [{"a": "b"}, {}], [0, 1]),
]


@pytest.mark.parametrize(("field", "values", "names"), NAMES)
def test_values_are_called_by_what_tells_them_apart(field, values, names):
    assert name_all(field, values) == names


REFUSED = [
    ({}, "grid", "either a grid or rows; neither came"),
    ({"grid": {"seed": [1]}, "rows": [{}]}, "grid", "either a grid or rows; both came"),
    ({"grid": {}}, "grid", "grid maps fields"),
    ({"grid": {"seed": 3}}, "grid.seed", "one value (of type int)"),
    ({"grid": {"loss": "mse"}}, "grid.loss", "one value (of type str)"),
    ({"grid": {"model": nn.Sequential(nn.Linear(1, 1))}}, "grid.model", "one value (of type Sequential)"),
    ({"grid": {"batch": {"inputs": BATCH[0], "targets": BATCH[1]}}}, "grid.batch", "one batch, not several"),
    ({"grid": {"seed": []}}, "grid.seed", "no values"),
    ({"grid": {"sed": [1]}}, "grid.sed", "did you mean 'seed'"),
    ({"grid": {"seed": [1]}, "los": "mse"}, "los", "did you mean 'loss'"),
    ({"rows": []}, "rows", "no rows"),
    ({"rows": {"seed": 1}}, "rows", "rows are several"),
    ({"rows": [{}, 3]}, "rows.1", "of type int"),
    ({"rows": [{}, {"sede": 1}]}, "rows.1.sede", "did you mean 'seed'"),
    ({"rows": [{"coordinates": 3}]}, "rows.0.coordinates", "no dictionary"),
    ({"grid": {"seed": [1]}, "extensions": None}, "grid", "grid has no extensions"),
    ({"rows": [{}], "batch": None}, "rows.0", "rows.0 has no batch"),
    ({"grid": {"batch": [BATCH, (BATCH[0],)]}}, "grid.batch.1", "grid.batch.1: a batch is"),
    ({"grid": {"batch": ["absent.safetensors"]}}, "grid.batch.0", "absent.safetensors does not exist"),
    ({"grid": {"seed": [1]}, "metadata": {"a": 1}}, "metadata", "strings to strings"),
    ({"grid": {"seed": [1]}, "webhook": "nonsense"}, "webhook.url", "webhook.url"),
]


@pytest.mark.parametrize(("arguments", "param", "words"), REFUSED)
def test_a_mistake_is_told_with_its_place_before_anything_is_sent(arguments, param, words):
    with Client(NOWHERE, max_retries=0) as client, pytest.raises(UnprocessableError) as caught:
        client.sweep(**{**BASE, **arguments})
    assert caught.value.param == param
    assert words in str(caught.value)
    assert caught.value.remedy


# Files


def write(folder, text):
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read_with_paths_that_count_from_its_folder(tmp_path):
    found = read_sweep_file(
        write(
            tmp_path,
            """
            model: net.pt
            extensions: [variance, {name: batch_dot, options: {against: other.safetensors}}]
            metadata: {run: baseline}
            grid:
              batch: {small: a.safetensors, all: [a.safetensors, b.safetensors]}
              loss: [mse, losses/own.pt, {name: huber}]
              seed: 0..3
            """,
        )
    )
    assert found == {
        "model": tmp_path / "net.pt",
        "extensions": ["variance", {"name": "batch_dot", "options": {"against": tmp_path / "other.safetensors"}}],
        "metadata": {"run": "baseline"},
        "grid": {
            "batch": {
                "small": tmp_path / "a.safetensors",
                "all": [tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
            },
            "loss": ["mse", tmp_path / "losses/own.pt", {"name": "huber"}],
            "seed": range(4),
        },
    }


def test_rows_of_a_file_keep_their_coordinates(tmp_path):
    text = "extensions: grad\nrows:\n  - {model: a.pt, batch: /b.safetensors, coordinates: {model: first}}\n"
    assert read_sweep_file(write(tmp_path, text)) == {
        "extensions": "grad",
        "rows": [{"model": tmp_path / "a.pt", "batch": Path("/b.safetensors"), "coordinates": {"model": "first"}}],
    }


WRONG = [
    ("- a\n- b\n", "a sweep is a mapping"),
    ("", "a sweep is a mapping"),
    ("grid: {seed: [1, 2}\n", "line 1, column 19: "),
    ("seed: 1\nseed: 2\ngrid: {}\n", "line 2, column 1: found duplicate key"),
    ("a: !!python/object:os.system {}\n", "line 1, column 4"),
    ("gird: {seed: [1]}\n", "did you mean 'grid'"),
    ("grid: [1]\n", "grid maps fields to lists of values; it is [1]"),
    ("grid: {seed: 3}\n", "grid.seed is 3; a list, a mapping of names or a range (0..9) is expected"),
    ("grid: {seed: }\n", "grid.seed is empty"),
    ("rows: {seed: 1}\n", "rows are a list"),
    ("rows: [1]\n", "rows are a list"),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_a_wrong_file_says_where(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UnprocessableError) as caught:
        read_sweep_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert caught.value.remedy


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_bytes(b"\x80\x02\x00\xff")
    with pytest.raises(UnprocessableError, match=r"it is no YAML|line"):
        read_sweep_file(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CurvatureError, match="does not exist"):
        read_sweep_file(tmp_path / "absent.yaml")
