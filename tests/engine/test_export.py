"""What is special about exported programs: their files, ties, inputs, guards, blocks and training modes."""

import copy
import io
import json
import zipfile

import pytest
import torch
from tests.engine.models import CASES, build, core, exported
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine.tape import Tape

BY_NAME = {case.name: case for case in CASES}
DYNAMIC = torch.export.Dim.DYNAMIC
EXTENSIONS = ["grad", "batch_grad", "variance", "diag_ggn_exact"]
X, Y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.l, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.register_buffer("counter", torch.zeros(1))
        self.double().eval()


def of(module, *inputs, **options):
    return exported(module, inputs or (X,)) if not options else torch.export.export(module, inputs or (X,), **options)


def saved(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def edited(program, tmp_path, edit):
    """A file whose description of the program was edited."""
    with zipfile.ZipFile(io.BytesIO(saved(program))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in entries if name.endswith("models/model.json"))
    described = json.loads(entries[name])
    edit(described)
    entries[name] = json.dumps(described).encode()
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return tmp_path / "model.pt2"


def check(module, program, x=X, y=Y, twice=True):
    """Equal to brute force on a copy of the module, every time."""
    reference = Reference(copy.deepcopy(module), (x.clone(),), y, "mse", "mean")
    program = engine.load(program)
    for _ in range(2 if twice else 1):
        result = engine.analyze(program, x, y, ["outputs", *EXTENSIONS], loss="mse")
        torch.testing.assert_close(result["outputs"], reference.outputs.detach(), rtol=1e-13, atol=1e-13)
        for extension in EXTENSIONS:
            for parameter, expected in reference.expected(extension).items():
                torch.testing.assert_close(result[extension][parameter], expected, rtol=1e-10, atol=1e-12)
    return result


def refused(code, match, model, inputs=X, **options):
    with pytest.raises(engine.EngineError, match=match) as caught:
        engine.analyze(model, inputs, Y, ["grad"], loss="mse", **options)
    assert caught.value.code == code
    return caught.value


# Files and parameters


def test_a_file_is_known_by_what_is_in_it_whatever_its_name(tmp_path):
    module, inputs = build(BY_NAME["mlp"])
    (tmp_path / "abc").write_bytes(saved(exported(module, inputs)))
    program = engine.load(tmp_path / "abc")
    assert program.format == "export"
    assert list(program.parameters) == [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize("form", ["object", "file", "core"])
def test_shared_weights_are_one_parameter_whose_contributions_add_up(tmp_path, form):
    module, inputs = build(BY_NAME["tied_embedding"])
    program = exported(module, inputs, decomposed=form == "core")
    if form == "file":
        torch.export.save(program, tmp_path / "model.pt2")
        program = tmp_path / "model.pt2"
    reference = Reference(module, inputs, torch.tensor([0, 1, 2, 3]), "cross_entropy", "mean")
    result = engine.analyze(program, inputs, reference.targets, ["batch_grad"])
    assert result.info["aliases"] == {"out.weight": "tok.weight"}
    expected = reference.expected("batch_grad")
    assert set(result["batch_grad"]) == set(expected)
    for parameter, value in expected.items():
        torch.testing.assert_close(result["batch_grad"][parameter], value, rtol=1e-10, atol=1e-12)


def test_weights_that_a_file_unties_are_one_parameter(tmp_path):
    """A graph that reads both names: two tensors of one storage, whose contributions are one parameter's."""
    module, inputs = build(BY_NAME["tied_embedding"])

    def untie(described):
        graph = described["graph_module"]["graph"]
        name = {s["parameter"]["parameter_name"]: s["parameter"]["arg"]["name"]
                for s in described["graph_module"]["signature"]["input_specs"] if "parameter" in s}  # fmt: skip
        for node in graph["nodes"]:
            for argument in node["inputs"]:
                if argument["arg"].get("as_tensor", {}).get("name") in (name["tok.weight"], name["out.weight"]):
                    key = "tok.weight" if ".embedding." in node["target"] else "out.weight"
                    argument["arg"]["as_tensor"]["name"] = name[key]

    program = engine.load(edited(exported(module, inputs), tmp_path, untie))
    assert len(program.parameters["tok.weight"].tensors) == 2
    reference = Reference(module, inputs, torch.tensor([0, 1, 2, 3]), "cross_entropy", "mean")
    result = engine.analyze(program, inputs, reference.targets, ["grad", "batch_grad", "diag_ggn_exact"])
    for extension in ("grad", "batch_grad", "diag_ggn_exact"):
        for parameter, value in reference.expected(extension).items():
            torch.testing.assert_close(result[extension][parameter], value, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_stay_frozen_through_a_file(tmp_path):
    module, inputs = build(BY_NAME["frozen_parameter"])
    torch.export.save(exported(module, inputs), tmp_path / "model.pt2")
    targets = torch.tensor([0, 1, 2, 0])
    assert "0.weight" not in engine.analyze(tmp_path / "model.pt2", inputs, targets, ["grad"])["grad"]
    assert "0.weight" in engine.analyze(tmp_path / "model.pt2", inputs, targets, ["grad"], parameters="all")["grad"]


def test_the_callers_program_stays_as_it_is():
    module = Counting()
    program = of(module)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    check(module, program)
    assert all(torch.equal(tensor, program.state_dict[name]) for name, tensor in before.items())


def test_a_version_that_would_be_misread_is_refused(tmp_path):
    path = edited(of(Tanh()), tmp_path, lambda described: described["schema_version"].update(major=9))
    refused("invalid_model", "schema version 9", path)


def test_a_damaged_description_is_refused(tmp_path):
    path = edited(of(Tanh()), tmp_path, lambda described: described["graph_module"].pop("graph"))
    refused("invalid_model", "cannot be read as an exported program", path)


class Tanh(Net):
    def forward(self, x):
        return self.head(torch.tanh(self.l(x)))


# Edits, blocks and control flow


class Counting(Net):
    def forward(self, x):
        self.counter.add_(1.0)
        x.mul_(2.0)
        return self.head(self.l(x) * self.counter)


class InBlocks(Net):
    def forward(self, x):
        with torch.no_grad():
            mask = torch.sigmoid(self.l(x))
        return self.head(torch.tanh(self.l(x)) * mask)


class Detached(Net):
    def forward(self, x):
        return self.head(torch.tanh(self.l(x)) * self.l(x).detach())


def test_what_decomposition_loses_is_refused_or_said():
    check(Detached(), of(Detached()))
    refused("unsupported_operator", "may stand for detach", core(of(Detached())))
    result = engine.analyze(core(of(InBlocks())), X, Y, ["grad"], loss="mse")
    assert any("drops torch.no_grad blocks" in warning for warning in result.warnings)


class Conditional(Net):
    def forward(self, x):
        h = torch.cond(x.sum() > 0, lambda x: torch.tanh(self.l(x)), lambda x: self.l(x) * self.l(x), (x,))
        return self.head(h)


@pytest.mark.parametrize(
    ("module", "decomposed"),
    [(Counting, False), (Counting, True), (InBlocks, False), (Conditional, False), (Conditional, True)],
)
def test_edits_blocks_and_branches(module, decomposed):
    program = of(module())
    program = core(program) if decomposed else program
    for sign in (1, -1):
        check(module(), program, X.abs() * sign)


def test_the_branch_taken_names_the_path():
    program = engine.load(of(Conditional()))
    for sign in (1, -1, 1):
        engine.analyze(program, X.abs() * sign, Y, ["grad"], loss="mse")
        engine.analyze(program, X.abs() * sign, Y, ["variance"], loss="mse")
    assert len(program.verdicts) == 2


class Autocast(Net):
    def __init__(self):
        super().__init__()
        self.float()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.l(x)
        return self.head(h.float())


def test_autocast_blocks_compute_in_their_precision():
    module, x, y = Autocast(), X.float(), Y.float()
    result = engine.analyze(of(module, x), x, y, ["outputs", "batch_grad"], loss="mse")
    of_trace = engine.analyze(
        torch.jit.trace(module, x, check_trace=False), x, y, ["outputs", "batch_grad"], loss="mse"
    )
    assert torch.equal(result["outputs"], module(x))
    for name, value in of_trace["batch_grad"].items():
        torch.testing.assert_close(result["batch_grad"][name], value, rtol=2e-2, atol=1e-4)


class Looping(Net):
    def forward(self, x):
        loop = torch._higher_order_ops.while_loop
        count, h = loop(lambda i, h: i < 3, lambda i, h: (i + 1, torch.tanh(self.l(h))), (torch.tensor(0), x))
        return self.head(h) + count


def test_other_higher_order_operators_are_refused_by_name():
    error = refused("unsupported_operator", "higher_order::while_loop is not supported", of(Looping()))
    assert error.param == "higher_order::while_loop"


class Drawing(Net):
    def forward(self, x):
        return self.head(torch.bernoulli(self.l(x)))


def test_operators_off_the_list_are_refused_with_their_line():
    refused(
        "unsupported_operator", r"aten::bernoulli is not supported \(test_export.py, line .*bernoulli", of(Drawing())
    )


# What a program takes for granted of its inputs


def test_a_baked_batch_size_is_refused_at_another():
    program = engine.load(torch.export.export(Tanh(), (X,)))
    assert program.front.fixed_samples == 4
    check(Tanh(), program)
    error = refused("invalid_inputs", "4 alone .its batch size is baked in", program, torch.cat([X, X[:1]]))
    assert "dynamic_shapes" in error.remedy
    assert engine.load(of(Tanh())).front.fixed_samples is None


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (X[:, :4], "input x has 4 along axis 1; the program was exported for 5 alone"),
        (X[0], "with 2 axes; got torch.float64 with 1 axes"),
        (X.float(), "of torch.float64 with 2 axes; got torch.float32"),
    ],
)
def test_inputs_of_another_form_are_refused(inputs, match):
    refused("invalid_inputs", match, of(Tanh()), inputs)


class TwoAxes(Net):
    def forward(self, x, y):
        return self.head(torch.tanh(self.l(x + y)))


class Halved(Net):
    def forward(self, x, y):
        return self.head(torch.tanh(self.l(x + y[::2])))


class Grouped(Net):
    def forward(self, x):
        return self.head(self.l(x).view(x.shape[0] // 2, 2, 5).flip(1).view(-1, 5))


def test_sizes_that_must_agree():
    program = of(TwoAxes(), X, X)
    engine.analyze(program, (X, X), Y, ["grad"], loss="mse")
    refused("invalid_inputs", "takes for granted|expects", program, (X, X[:3]))


def test_sizes_derived_from_others():
    long = torch.randn(8, 5, dtype=torch.float64)
    program = of(Halved(), X, long)
    engine.analyze(program, (X[:3], long[:6]), Y[:3], ["grad"], loss="mse")
    refused("invalid_inputs", "takes for granted|expects", program, (X, long[:5]))


def test_ranges_of_sizes():
    program = torch.export.export(Tanh(), (X,), dynamic_shapes=({0: torch.export.Dim("N", min=2, max=6)},))
    refused("invalid_inputs", "from 2 to 6 along an axis that is 8", program, torch.cat([X, X]))


def test_a_guard_is_read_and_never_evaluated(tmp_path):
    def guarded(code):
        return edited(of(Tanh()), tmp_path, lambda described: described.update(guards_code=[code]))

    engine.analyze(guarded("L['x'].size()[0] % 2 == 0 and 5 <= L['x'].size(1)"), X, Y, ["grad"], loss="mse")
    refused("invalid_inputs", "takes for granted", guarded("L['x'].size()[0] % 3 == 0"))
    for code in ("__import__('os').getpid()", "L['x'].tolist()", "L.__class__", "[1][0]", "L['y'].size()[0] == 1"):
        refused("unsupported_model", "cannot be checked", guarded(code))


class Asserting(Net):
    def forward(self, x):
        first = x[0, 0].item()
        torch._check(first > 0)
        return self.head(self.l(x))


def test_assertions_of_the_model_hold_or_refuse():
    program = of(Asserting(), X.abs())
    check(Linear(), program, X.abs())
    refused("invalid_inputs", "the model rejected its inputs", program, -X.abs())


class Linear(Net):
    def forward(self, x):
        return self.head(self.l(x))


# Inputs and outputs


class Nested(Net):
    def forward(self, pair, table, scale=None, *, offset=1.0):
        h = torch.tanh(self.l(pair[0] * table["a"] + pair[1][0]))
        return {"hidden": h, "logits": (self.head(h) + offset, 3)}


def test_nested_inputs_and_outputs():
    module, inputs = Nested(), ((X, [2 * X]), {"a": X})
    axis = {0: DYNAMIC}
    program = torch.export.export(module, inputs, dynamic_shapes=((axis, [axis]), {"a": axis}))
    front = engine.load(program).front
    expected = module(*inputs)
    for given in (inputs, {"table": {"a": X}, "pair": [X, (2 * X,)]}):
        result = engine.load(program).run(given, Tape()).outputs
        torch.testing.assert_close(result["hidden"], expected["hidden"])
        torch.testing.assert_close(result["logits"][0], expected["logits"][0])
        assert result["logits"][1] == 3
    for given, match in (
        (((X, X), {"a": X}), r"input pair\[1\]"),
        (((X, [X]), {"b": X}), r"input table must be a dictionary with 'a'"),
        ((X, {"a": X}), "input pair must be 2 values in a row"),
        (((X, [X]),), "'table' is missing"),
    ):
        with pytest.raises(engine.EngineError, match=match):
            front.bind(given)


class Scaled(Net):
    def forward(self, x, scale=2.0, mask=None):
        return self.head(self.l(x)) * scale


def test_inputs_that_the_export_fixed_may_be_left_out_and_not_changed():
    program = engine.load(torch.export.export(Scaled(), (X, 3.0, None), dynamic_shapes=({0: DYNAMIC}, None, None)))
    inputs = [X, (X, 3.0), (X, 3.0, None), {"x": X, "scale": 3.0}]
    losses = [engine.analyze(program, given, Y, ["grad"], loss="mse").loss for given in inputs]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    refused("invalid_inputs", "an input that is 3.0 always; got 4.0", program, (X, 4.0))


def test_the_loss_names_the_output():
    class Named(Net):
        def forward(self, x):
            h = torch.tanh(self.l(x))
            return {"hidden": h, "logits": self.head(h)}

    loss = {"name": "mse", "options": {"output": "logits"}}
    result = engine.analyze(of(Named()), X, Y, ["variance"], loss=loss)
    expected = engine.analyze(of(Tanh()), X, Y, ["variance"], loss="mse")
    for name, value in expected["variance"].items():
        assert torch.equal(result["variance"][name], value)


# Training mode


class Dropping(Net):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer.double()

    def forward(self, x):
        return self.head(self.layer(self.l(x)))


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(5)])
def test_layers_exported_in_training_mode_are_refused(layer, decomposed):
    program = of(Dropping(layer).train())
    program = core(program) if decomposed else program
    refused("training_mode", "in training mode", program)


def test_dropout_may_be_kept():
    result = engine.analyze(of(Dropping(nn.Dropout(0.5)).train()), X, Y, ["grad"], loss="mse", eval=False)
    assert any("dropout was active" in warning for warning in result.warnings)


# Programs that no compiler made


def test_a_graph_cannot_reach_python_or_pass_the_tape_by(tmp_path):
    def calling(target):
        def edit(described):
            node = next(n for n in described["graph_module"]["graph"]["nodes"] if "tanh" in n["target"])
            node["target"] = target

        return edited(of(Tanh()), tmp_path, edit)

    for target in ("torch.os.system", "torch.ops.aten.__class__.default", "torch.ops.prims.sin.default", "os.system"):
        refused("unsupported_operator", "not supported", calling(target))
    refused("unsupported_operator", "takes numbers, and a tensor came", calling("_operator.neg"))
    refused("invalid_model", "takes other arguments", calling("torch.ops.aten.mul.Tensor"))


def test_a_tensor_that_reaches_beyond_its_bytes_is_refused(tmp_path):
    with zipfile.ZipFile(io.BytesIO(saved(of(Tanh())))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in entries if name.endswith("weights_config.json"))
    described = json.loads(entries[name])
    described["config"]["l.weight"]["tensor_meta"]["storage_offset"] = {"as_int": 10**6}
    entries[name] = json.dumps(described).encode()
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    refused("invalid_model", "needs more than", tmp_path / "model.pt2")


@pytest.mark.parametrize("name", ["layernorm_gelu", "lstm", "in_place", "containers"])
def test_without_a_graph_spent_values_go_and_the_outputs_stay(name):
    module, inputs = build(BY_NAME[name])
    program = engine.load(exported(module, inputs))
    lean = program.run(inputs, Tape(), graph=False).outputs
    assert torch.equal(lean, program.run(inputs, Tape()).outputs.detach())
