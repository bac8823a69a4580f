"""Loss functions, and batches among the options, as a request reads them."""

import io
import subprocess
import sys

import pytest
import torch
from torch import nn

from curvature_client import BatchDot, UnprocessableError
from curvature_client._extensions import list_of, take_batches
from curvature_client._functions import read_function
from curvature_client._payloads import Payload


def squared(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().sum(1)


def unscriptable(outputs, targets):
    return [*outputs, *(lambda: targets)()]


@pytest.fixture
def path(tmp_path):
    torch.jit.script(squared).save(str(tmp_path / "squared.pt"))
    return tmp_path / "squared.pt"


def test_a_plain_and_a_scripted_function_are_one_file():
    plain, scripted = read_function(squared), read_function(torch.jit.script(squared))
    assert plain == scripted
    loaded = torch.jit.load(io.BytesIO(plain.payload.read()))
    assert torch.equal(loaded(torch.ones(2, 3), torch.zeros(2, 3)), torch.full((2,), 3.0))


def test_a_path_goes_as_it_is_and_may_come_with_an_output(path):
    payload = Payload.of_file(path)
    assert [read_function(given).payload for given in (path, str(path))] == [payload, payload]
    found = read_function({"function": path, "options": {"output": "logits"}})
    assert found.request() == {"sha256": payload.sha256, "output": "logits"}


@pytest.mark.parametrize(
    "loss", [None, "mse", "no-such", {"name": "mse"}, nn.MSELoss(), nn.functional.mse_loss, nn.MSELoss, 3]
)
def test_other_losses_are_no_functions(loss):
    assert read_function(loss) is None


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (unscriptable, "the loss function 'unscriptable' cannot be scripted: "),
        (lambda outputs, targets: outputs, "the loss function '<lambda>' cannot be scripted: "),
        ("nowhere/loss.pt", r"there is no file nowhere/loss\.pt"),
        ({"function": squared, "options": {"delta": 1}}, "fix other values in the function itself"),
        ({"function": 3}, "3 is no function"),
    ],
)
def test_a_wrong_function_says_what_is_wrong(loss, message):
    with pytest.raises(UnprocessableError, match=message) as caught:
        read_function(loss)
    assert caught.value.param.startswith("loss")


def test_batches_are_taken_out_of_the_options():
    batch, reference = (torch.zeros(2), torch.zeros(2)), {"sha256": "0" * 64}
    given = [
        "grad",
        BatchDot(against=batch, over="model"),
        {"name": "batch_dot", "label": "b", "options": {"against": "batch.npz"}},
        {"name": "batch_dot", "label": "c", "options": {"against": reference}},
    ]
    kept, batches = take_batches(list_of(given))
    assert kept[0] == "grad"
    assert [k["options"] for k in kept[1:]] == [{"over": "model", "scale": "loss"}, {}, {"against": reference}]
    assert list(batches) == [(1, "against"), (2, "against")]
    assert batches[1, "against"] is batch


def test_a_file_needs_no_torch(path):
    code = f"from curvature_client._functions import read_function; print(read_function({str(path)!r}).payload.sha256)"
    code += "; import sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == Payload.of_file(path).sha256
