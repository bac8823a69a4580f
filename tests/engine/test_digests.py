"""One digest for all files of one model, another for every other model."""

import copy
import io
import subprocess
import sys
import zipfile

import pytest
import torch
from tests.engine.models import CASES, build, core, exported, torchscript
from torch import Tensor, nn

import curvature_engine as engine

BY_NAME = {case.name: case for case in CASES}
NOT_EXPORTED = ("if_and_loop",)
X = (torch.ones(2, 3, dtype=torch.float64),)


def digest(model, **options):
    found = engine.digest(engine.load(model, **options))
    assert len(bytes.fromhex(found)) == 32
    return found


def saved(module):
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def resaved(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


# Alike


@pytest.mark.parametrize(("name", "way"), [(case.name, way) for case in CASES for way in case.ways])
def test_a_model_scripted_or_traced_twice_and_saved_twice(name, way):
    module, inputs = build(BY_NAME[name])
    first, again = (torchscript(copy.deepcopy(module), inputs, way) for _ in range(2))
    digests = {digest(first), digest(again), digest(saved(saved(first)))}
    assert len(digests) == 1
    assert digest(torchscript(build(BY_NAME[name], seed=1)[0], inputs, way)) not in digests


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", [case.name for case in CASES if case.name not in NOT_EXPORTED])
def test_a_model_exported_twice_and_saved_twice(name, decomposed):
    module, inputs = build(BY_NAME[name])
    first, again = (exported(copy.deepcopy(module), inputs, decomposed=decomposed) for _ in range(2))
    digests = {digest(first), digest(again), digest(resaved(resaved(first)))}
    assert len(digests) == 1
    assert digest(exported(build(BY_NAME[name], seed=1)[0], inputs, decomposed=decomposed)) not in digests


def test_every_format_of_a_model_has_its_own():
    module, inputs = build(BY_NAME["mlp"])
    ways = [torchscript(module, inputs, way) for way in ("scripted", "traced")]
    ways += [exported(module, inputs), exported(module, inputs, decomposed=True)]
    assert len({digest(model) for model in ways}) == len(ways)


def test_the_bytes_of_files_differ_and_their_digests_do_not(tmp_path):
    module, inputs = build(BY_NAME["residual_batchnorm"])
    paths = [tmp_path / f"{k}.pt" for k in range(2)]
    for path in paths:
        torch.jit.trace(module, inputs).save(path)
    shuffled = tmp_path / "shuffled.pt"
    with zipfile.ZipFile(paths[0]) as source, zipfile.ZipFile(shuffled, "w") as target:
        for entry in reversed(source.infolist()):
            target.writestr(entry.filename, source.read(entry))
    assert paths[0].read_bytes() != paths[1].read_bytes()
    assert len({digest(path) for path in (*paths, shuffled)}) == 1


SOURCE = """
import sys, torch
from torch import nn
{padding}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)
    def forward(self, x):
        h = self.a(x)
        if bool(x.sum() > 0):
            h = torch.relu(h)
        return self.b(h)
for _ in range({scripted_before}):
    torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3)))
torch.manual_seed(0)
net = Net()
torch.jit.script(net).save(sys.argv[1] + ".pt")
torch.jit.trace(net, torch.ones(2, 3)).save(sys.argv[1] + ".traced.pt")
axes = dict(x={{0: torch.export.Dim.DYNAMIC}})
plain = nn.Sequential(net.a, nn.ReLU(), net.b)
torch.export.save(torch.export.export(plain, (torch.ones(2, 3),), dynamic_shapes=(axes["x"],)), sys.argv[1] + ".pt2")
"""


def test_files_written_by_other_processes_from_other_lines(tmp_path):
    for name, fields in {"one": ("", 0), "two": ("\n\n\nunused = 3\n", 3)}.items():
        script = tmp_path / f"{name}.py"
        script.write_text(SOURCE.format(padding=fields[0], scripted_before=fields[1]))
        subprocess.run([sys.executable, "-W", "ignore", script, tmp_path / name], check=True, timeout=120)
    for suffix in ("pt", "traced.pt", "pt2"):
        assert digest(tmp_path / f"one.{suffix}") == digest(tmp_path / f"two.{suffix}")


def test_a_digest_does_not_depend_on_what_ran_before():
    module, inputs = build(BY_NAME["in_place"])
    program = engine.load(torch.jit.script(module))
    before = engine.digest(program)
    engine.analyze(program, inputs, torch.tensor([0, 1, 2, 0]), ["batch_grad", "diag_hessian"], loss="cross_entropy")
    assert engine.digest(program) == before


# Unlike: pairs of modules that differ in one thing


class Net(nn.Module):
    """Parts to change one at a time."""

    numbers: list[float]
    table: dict[str, int]
    pair: tuple[int, float]

    def __init__(self, **changes):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("offset", torch.arange(3.0))
        self.tensor = torch.arange(3.0, dtype=torch.float64)
        self.numbers, self.table, self.pair = [0.5, 1.5], {"k": 2}, (1, 2.0)
        self.flag, self.word, self.count, self.small = True, "relu", 2, 0.25
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.double()
        self.eval()
        for name, value in changes.items():
            setattr(self, name, value)

    def encoded(self, x):
        return self.norm(self.a(x)) * self.numbers[0] + self.offset + self.tensor * self.table["k"] + self.pair[1]

    def repeated(self, h, rounds: int):
        for _ in range(self.count + rounds):
            h = torch.tanh(self.b(h)) if self.flag else torch.relu(self.b(h))
        return h

    def scaled(self, h):
        if self.word == "relu":
            h = torch.relu(h) * 0.1 + self.small
        return h

    def shifted(self, h, x):
        with torch.no_grad():
            h = h + x.sum(1, keepdim=True)
        return self.drop(h)

    def forward(self, x, k: int = 2):
        return self.shifted(self.scaled(self.repeated(self.encoded(x), k)), x)


class OtherConstant(Net):
    def scaled(self, h):
        if self.word == "relu":
            h = torch.relu(h) * 0.1000000000000001 + self.small
        return h


class OtherBranch(Net):
    def scaled(self, h):
        if self.word != "relu":
            h = torch.relu(h) * 0.1 + self.small
        return h


class OtherPlace(Net):
    """One operator outside of the branch."""

    def scaled(self, h):
        if self.word == "relu":
            h = torch.relu(h) * 0.1
        return h + self.small


class OtherContext(Net):
    def shifted(self, h, x):
        h = h + x.sum(1, keepdim=True)
        return self.drop(h)


class OtherOverload(Net):
    def shifted(self, h, x):
        with torch.no_grad():
            h = h + x.sum(dim=[1], keepdim=True, dtype=torch.float64)
        return self.drop(h)


class Swapped(Net):
    def encoded(self, x):
        return self.norm(self.b(x)) * self.numbers[0] + self.offset + self.tensor * self.table["k"] + self.pair[1]

    def repeated(self, h, rounds: int):
        for _ in range(self.count + rounds):
            h = torch.tanh(self.a(h)) if self.flag else torch.relu(self.a(h))
        return h


class OtherDefault(Net):
    def forward(self, x, k: int = 3):
        return self.shifted(self.scaled(self.repeated(self.encoded(x), k)), x)


class OtherNameOfAnInput(Net):
    def forward(self, x, rounds: int = 2):
        return self.shifted(self.scaled(self.repeated(self.encoded(x), rounds)), x)


def changed(change):
    net = Net()
    with torch.no_grad():
        change(net)
    return net


def nudged(tensor, by=2.0**-52):
    tensor.view(-1)[0] += by


def same_memory(net):
    """Equal numbers in one piece of memory."""
    net.b.weight.copy_(net.a.weight)
    net.b.weight = net.a.weight


VARIANTS = {
    "plain": Net,
    "a parameter's last bit": lambda: changed(lambda net: nudged(net.a.weight)),
    "a buffer": lambda: changed(lambda net: nudged(net.offset, 1.0)),
    "a running mean": lambda: changed(lambda net: nudged(net.norm.running_mean)),
    "a tensor that is no buffer": lambda: Net(tensor=torch.arange(1.0, 4.0, dtype=torch.float64)),
    "a number in a list": lambda: Net(numbers=[0.25, 1.5]),
    "a list's length": lambda: Net(numbers=[0.5]),
    "a number in a dictionary": lambda: Net(table={"k": 3}),
    "another entry of a dictionary": lambda: Net(table={"k": 2, "l": 2}),
    "a number in a tuple": lambda: Net(pair=(1, 3.0)),
    "a flag": lambda: Net(flag=False),
    "a word": lambda: Net(word="tanh"),
    "a count": lambda: Net(count=3),
    "a float": lambda: Net(small=0.5),
    "minus zero": lambda: Net(small=-0.0),
    "zero": lambda: Net(small=0.0),
    "dropout's rate": lambda: Net(drop=nn.Dropout(0.25).eval()),
    "an eps": lambda: Net(norm=nn.BatchNorm1d(3, eps=1e-4).double().eval()),
    "a frozen parameter": lambda: changed(lambda net: net.a.weight.requires_grad_(False)),
    "another frozen parameter": lambda: changed(lambda net: net.b.weight.requires_grad_(False)),
    "equal parameters": lambda: changed(lambda net: net.b.weight.copy_(net.a.weight)),
    "one parameter twice": lambda: changed(same_memory),
    "another number format": lambda: Net().float(),
    "training mode": lambda: Net().train(),
    "a constant": OtherConstant,
    "a condition": OtherBranch,
    "an operator's block": OtherPlace,
    "no with-block": OtherContext,
    "an operator's arguments": OtherOverload,
    "layers in another order": Swapped,
    "an input's default": OtherDefault,
    "an input's name": OtherNameOfAnInput,
    "a parameter that is not used": lambda: changed(lambda net: setattr(net, "c", nn.Parameter(torch.ones(1)))),
    "a buffer that is not used": lambda: changed(lambda net: net.register_buffer("c", torch.ones(1))),
    "memory in another order": lambda: changed(
        lambda net: setattr(net.a.weight, "data", net.a.weight.data.t().contiguous().t())
    ),
}


def test_scripted_modules_that_differ_in_one_thing():
    digests = {name: digest(torch.jit.script(make())) for name, make in VARIANTS.items()}
    assert len(set(digests.values())) == len(VARIANTS), sorted(digests.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_each_of_them_is_like_itself(name):
    assert digest(torch.jit.script(VARIANTS[name]())) == digest(saved(torch.jit.script(VARIANTS[name]())))


def test_modes_in_which_a_program_is_loaded():
    script = torch.jit.script(Net().train())
    assert digest(script, eval=True) != digest(script, eval=False)
    assert digest(script, eval=False) == digest(saved(script), eval=False)
    script = torch.jit.script(Net())
    assert digest(script, eval=True) == digest(script, eval=False)
    one = torch.jit.script(changed(lambda net: net.norm.train()))
    every = torch.jit.script(Net().train())
    assert digest(one, eval=True) == digest(every, eval=True)
    assert digest(one, eval=False) != digest(every, eval=False)


EXPORTED = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "another activation": lambda: nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)),
    "no bias": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)),
    "another width": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
    "a constant": lambda: nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2)),
    "another constant": lambda: nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Linear(4, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
}


def make_exported(make, *, change=None, train=False, axes=True):
    torch.manual_seed(0)
    module = make().double().train(train)
    if change is not None:
        with torch.no_grad():
            change(module)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if axes else None
    return torch.export.export(module, X, dynamic_shapes=shapes)


def test_exported_programs_that_differ_in_one_thing():
    programs = {name: make_exported(make) for name, make in EXPORTED.items()}
    plain, norm = EXPORTED["plain"], EXPORTED["batch norm"]
    programs |= {
        "a fixed batch": make_exported(plain, axes=False),
        "a last bit": make_exported(plain, change=lambda net: nudged(net[0].weight)),
        "a frozen parameter": make_exported(plain, change=lambda net: net[0].weight.requires_grad_(False)),
        "a buffer": make_exported(norm, change=lambda net: nudged(net[1].running_mean)),
        "training mode": make_exported(norm, train=True),
        "decomposed": core(make_exported(plain)),
    }
    digests = {name: digest(program) for name, program in programs.items()}
    assert len(set(digests.values())) == len(programs), sorted(digests.items(), key=lambda item: item[1])


def test_tied_and_equal_weights_of_exported_programs():
    class Two(nn.Module):
        def __init__(self, tied):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            if tied:
                self.b.weight = self.a.weight
            else:
                with torch.no_grad():
                    self.b.weight.copy_(self.a.weight)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    tied, equal = (make_exported(lambda t=t: Two(t)) for t in (True, False))
    assert digest(tied) != digest(equal)


class Strange(nn.Module):
    """Holds a tensor that has no numbers in a row."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(3, 2)
        self.sparse = torch.eye(3).to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        return self.l(torch.mm(self.sparse, x.t()).t())


def test_what_cannot_be_told_is_like_nothing():
    program = engine.load(torch.jit.script(Strange()))
    assert engine.digest(program) != engine.digest(program)
