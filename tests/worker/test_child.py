import pytest
import torch
from safetensors.torch import save_file
from tests.worker import models
from tests.worker.desk import script

import curvature_engine as engine
from curvature_worker.child import Programs, read_batch

X, Y = torch.zeros(2, 4), torch.arange(2)


@pytest.fixture
def read(tmp_path):
    def run(tensors):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "batch")
        return read_batch(tmp_path / "batch")

    return run


def test_one_tensor_is_the_input(read):
    inputs, targets = read({"inputs": X, "targets": Y})
    assert torch.equal(inputs, X)
    assert torch.equal(targets, Y)


def test_numbered_tensors_are_positional_inputs_in_the_order_of_their_numbers(read):
    inputs, _ = read({**{f"inputs.{i}": torch.full((1,), float(i)) for i in range(11)}, "targets": Y})
    assert [int(t) for t in inputs] == list(range(11))


def test_named_tensors_are_inputs_by_name(read):
    inputs, _ = read({"inputs.x": X, "inputs.mask": Y, "targets": Y})
    assert set(inputs) == {"x", "mask"}


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"inputs": X}, "no tensor named targets"),
        ({"targets": Y}, "inputs are named"),
        ({"inputs": X, "more": X, "targets": Y}, "inputs are named"),
        ({"inputs": X, "inputs.1": X, "targets": Y}, "inputs are named"),
        ({"inputs.0": X, "inputs.2": X, "targets": Y}, "without gaps"),
    ],
)
def test_a_batch_of_another_form_is_refused_with_what_it_holds(read, tensors, part):
    with pytest.raises(engine.EngineError, match=part) as caught:
        read(tensors)
    assert caught.value.code == "invalid_batch"
    assert "it holds" in caught.value.remedy


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "batch").write_bytes(b"no safetensors")
    with pytest.raises(engine.EngineError) as caught:
        read_batch(tmp_path / "batch")
    assert caught.value.code == "invalid_batch"


class TestPrograms:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in "abc":
            (tmp_path / name).write_bytes(script(models.small()))
        return tmp_path

    def test_a_loaded_program_is_kept(self, folder):
        programs = Programs(torch.device("cpu"), folder, 2, 2**30)
        assert programs.load("a", eval=True) is programs.load("a", eval=True)

    def test_modes_are_kept_apart(self, folder):
        programs = Programs(torch.device("cpu"), folder, 2, 2**30)
        assert programs.load("a", eval=True) is not programs.load("a", eval=False)

    def test_the_least_recently_used_goes_first(self, folder):
        programs = Programs(torch.device("cpu"), folder, 2, 2**30)
        for name in ("a", "b", "a", "c"):
            programs.load(name, eval=True)
        assert [name in programs for name in (("a", True), ("b", True), ("c", True))] == [True, False, True]

    def test_large_ones_make_room_for_each_other(self, folder):
        size = (folder / "a").stat().st_size
        programs = Programs(torch.device("cpu"), folder, 8, size + 10)
        programs.load("a", eval=True)
        programs.load("b", eval=True)
        assert ("a", True) not in programs
