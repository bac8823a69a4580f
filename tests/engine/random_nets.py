"""Random nets: each a function of one seed, and the text of a module, so that a failure can be printed and kept.

A net starts from an input of some kind (vectors, sequences, images, tokens), passes a few random blocks
(`random_blocks`), and ends with outputs of the shape that its loss needs. The text is what scripting compiles; tracing
and exporting run it.
"""

import linecache
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from tests.engine.losses import LOSS_CASES, C, LossCase
from tests.engine.models import exported
from torch import Tensor, nn


@dataclass(frozen=True)
class Value:
    """A variable of the forward: its kind names its axes.

    vec [N, F]; seq [N, T, F]; tseq [T, N, F]; img [N, C, *space].
    """

    kind: str
    name: str
    shape: tuple[int, ...]


@dataclass
class Writer:
    """A module's text as it grows, and what the checks must know of it."""

    rng: random.Random
    N: int
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    layouts: dict[str, list[str]] = field(default_factory=dict)
    """Module → where samples stand in its input, call by call: n [N, …], tn [T, N, …], or flattened to one axis."""
    roles: dict[str, set[str]] = field(default_factory=dict)
    """Parameter → how it is consumed by functions, beside its module."""
    traits: set[str] = field(default_factory=set)
    coupler: str | None = None
    """The module whose output mixes samples."""
    _count: int = 0

    def fresh(self, prefix: str) -> str:
        """A name that is not taken."""
        self._count += 1
        return f"{prefix}{self._count}"

    def module(self, text: str, *layouts: str) -> str:
        """A new submodule; returns its name, to be called with inputs of these layouts."""
        name = self.fresh("m")
        self.init.append(f"self.{name} = {text}")
        self.layouts[name] = list(layouts)
        return name

    def parameter(self, *shape: int, role: str = "other") -> str:
        """A new bare parameter; returns its name."""
        name = self.fresh("p")
        self.init.append(f"self.{name} = nn.Parameter(torch.randn({', '.join(map(str, shape))}) * 0.7)")
        self.roles.setdefault(name, set()).add(role)
        return name

    def let(self, text: str) -> str:
        """A new variable."""
        name = self.fresh("v")
        self.body.append(f"{name} = {text}")
        return name

    def say(self, *lines: str) -> None:
        """Lines of the forward."""
        self.body.extend(lines)

    def source(self) -> str:
        """The module's text."""
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += ["", f"    def forward(self, {', '.join(self.arguments)}):"]
        lines += [f"        {line}" for line in self.body]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Net:
    """A random net, its batch, its loss, and how it is to be read."""

    seed: int
    source: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    targets: Tensor
    loss: LossCase
    reduction: str
    way: str
    parameters: str
    budget_bytes: int | None
    layouts: dict[str, list[str]]
    roles: dict[str, set[str]]
    traits: frozenset[str]
    coupler: str | None

    def __str__(self) -> str:
        inputs = ", ".join(f"{list(x.shape)} {x.dtype}" for x in self.inputs)
        return (
            f"net {self.seed}: {self.way}, inputs {inputs}; {self.loss.id}, {self.reduction}; "
            f"parameters={self.parameters!r}, budget_bytes={self.budget_bytes}\n{self.source}"
        )

    def readable(self) -> "torch.jit.ScriptModule | torch.export.ExportedProgram":
        """The module as the engine reads it."""
        if self.way == "scripted":
            return torch.jit.script(self.module)
        if self.way == "exported":
            return exported(self.module, self.inputs)
        return torch.jit.trace(self.module, self.inputs, check_trace=False)


def random_net(seed: int, blocks: dict[str, list[Callable[[Writer, Value], Value]]], couplers: list[str]) -> Net:
    """The net of a seed.

    Args:
        seed: whose net.
        blocks: kind of value → what may be applied to it.
        couplers: expressions that mix samples along the first axis; one net in eight has one.
    """
    rng = random.Random(seed)
    w = Writer(rng, N=rng.choice([1, 2, 3, 3, 4, 6]))
    generator = torch.Generator().manual_seed(seed)
    loss = rng.choice(LOSS_CASES)
    v = _input(w, generator)
    depth = rng.randint(1, 4)
    coupled_at = rng.randrange(depth) if w.N > 1 and rng.random() < 1 / 8 else None
    for i in range(depth):
        v = rng.choice(blocks[v.kind])(w, v)
        if i == coupled_at:
            v = _couple(w, v, rng.choice(couplers))
    _head(w, v, loss)
    source = w.source()
    module = _build(seed, source)
    for name, parameter in module.named_parameters():
        if rng.random() < 0.05 and len(list(module.parameters())) > 2 and w.coupler is None:
            parameter.requires_grad_(False)
            w.traits.add(f"frozen {name}")
    inputs = tuple(w.inputs)
    with torch.no_grad():
        outputs = module(*inputs)
    loss = _unambiguous(loss, outputs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        targets = loss.targets(outputs)
        torch.set_default_dtype(before)
    return Net(
        seed,
        source,
        module,
        inputs,
        targets,
        loss,
        rng.choice(["mean", "sum"]),
        _way(rng, w.traits, inputs),
        "trainable" if w.coupler else _wanted(rng, module),
        rng.choice([None, None, 1, 300, 4000]),
        w.layouts,
        w.roles,
        frozenset(w.traits),
        w.coupler,
    )


def _unambiguous(loss: LossCase, outputs: Tensor) -> LossCase:
    """The loss, told where classes stand if shapes do not say (as many positions as classes)."""
    if loss.name in ("cross_entropy", "nll") and outputs.dim() > 2 and len(set(outputs.shape[1:])) == 1:
        return replace(loss, options={"class_axis": "second"} | loss.options)
    return loss


def _way(rng: random.Random, traits: set[str], inputs: tuple[Tensor, ...]) -> str:
    """How the module is written down; exporting takes longest."""
    if "script only" in traits:
        return "scripted"
    return rng.choice(["traced"] * 5 + ["scripted"] * 5 + ["exported"] * (len(inputs[0]) > 1))


def _wanted(rng: random.Random, module: nn.Module) -> str:
    """Which parameters are asked for: "trainable", "all", or a pattern."""
    if rng.random() < 0.7:
        return "trainable"
    name = rng.choice([n for n, p in module.named_parameters() if p.requires_grad] or ["*"])
    return rng.choice(["all", name, f"{name.partition('.')[0]}*"])


def _build(seed: int, source: str) -> nn.Module:
    """The module of a text, in eval mode and float64, with all that is random drawn from the seed."""
    place = f"<net {seed}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    names: dict[str, object] = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor, "__name__": f"net_{seed}"}
    exec(compile(source, place, "exec"), names)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: nn.Module = names["Net"]()  # type: ignore[operator]
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(m.running_mean)
                nn.init.uniform_(m.running_var, 0.5, 2)
            if (
                type(m).__name__.endswith("Norm")
                or "BatchNorm" in type(m).__name__
                or "InstanceNorm" in type(m).__name__
            ):
                for parameter in m.parameters(recurse=False):
                    nn.init.normal_(parameter)
    return module.double().eval()


def _input(w: Writer, generator: torch.Generator) -> Value:
    N, T, features = w.N, w.rng.choice([w.N, 2, 3, 4]), w.rng.choice([2, 3, 4])

    def real(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kind = w.rng.choice(["vec", "vec", "seq", "seq", "img", "img", "tokens", "two"])
    w.arguments.append("x")
    if kind == "tokens":
        T = max(2, T)
        vocabulary = w.rng.choice([C, 5])
        w.inputs.append(torch.randint(0, vocabulary, (N, T), generator=generator))
        padding = w.rng.choice(["", ", padding_idx=0"])
        e = w.module(f"nn.Embedding({vocabulary}, {features}{padding})", "n")
        w.traits.add(f"embedding {e} {vocabulary} {features}")
        if w.rng.random() < 0.3:
            return Value("tseq", w.let(f"self.{e}(x.t())"), (T, N, features))
        v = Value("seq", w.let(f"self.{e}(x)"), (N, T, features))
        if w.rng.random() < 0.5:
            p = w.module(f"nn.Embedding(6, {features})", "n")
            return Value("seq", w.let(f"{v.name} + self.{p}(torch.arange(x.size(1)))"), v.shape)
        return v
    if kind == "two":
        w.arguments.append("y")
        w.inputs += [real(N, features), real(N, 3)]
        a, b = w.module(f"nn.Linear({features}, 3)", "n"), w.module("nn.Linear(3, 3, bias=False)", "n")
        return Value("vec", w.let(f"torch.tanh(self.{a}(x)) * self.{b}(y)"), (N, 3))
    if kind == "vec":
        w.inputs.append(real(N, features))
        return Value("vec", "x", (N, features))
    if kind == "seq":
        T = max(2, T)
        w.inputs.append(real(N, T, features))
        return Value("seq", "x", (N, T, features))
    axes, channels = w.rng.choice([1, 2, 2, 2, 3]), w.rng.choice([1, 2, 4])
    space = tuple(w.rng.choice([3, 4, 5] if axes < 3 else [2, 3]) for _ in range(axes))
    w.inputs.append(real(N, channels, *space))
    return Value("img", "x", (N, channels, *space))


def _couple(w: Writer, v: Value, expression: str) -> Value:
    """Mix the samples of `v`, behind a layer that the mixing concerns."""
    features = v.shape[-1]
    layer = w.module(f"nn.Linear({features}, {features})", "n")
    h = w.let(f"torch.tanh(self.{layer}({v.name}))")
    before = w.let(f"{h}.transpose(0, 1)" if v.kind == "tseq" else h)
    w.coupler = w.module("nn.Identity()", "n")
    w.traits.add(f"coupled: {expression}")
    mixed = w.let(f"self.{w.coupler}({before})")
    after = w.let(expression.format(h=mixed))
    return Value(v.kind, w.let(f"{after}.transpose(0, 1)" if v.kind == "tseq" else after), v.shape)


# Heads


def to_vec(w: Writer, v: Value) -> Value:
    """Any value as [N, F]."""
    N = w.N
    if v.kind == "vec":
        return v
    if v.kind == "img":
        if w.rng.random() < 0.5:
            axes = tuple(range(2, len(v.shape)))
            return Value("vec", w.let(f"{v.name}.mean({axes})"), v.shape[:2])
        size = torch.Size(v.shape[1:]).numel()
        return Value("vec", w.let(f"{v.name}.flatten(1)"), (N, size))
    time, batch = (1, 0) if v.kind == "seq" else (0, 1)
    T, features = v.shape[time], v.shape[2]
    how = w.rng.choice(["mean", "last", "max", "flat"])
    if how == "flat":
        text = f"{v.name}.flatten(1)" if batch == 0 else f"{v.name}.transpose(0, 1).flatten(1)"
        return Value("vec", w.let(text), (N, T * features))
    if how == "last":
        return Value("vec", w.let(f"{v.name}[:, -1]" if batch == 0 else f"{v.name}[-1]"), (N, features))
    text = f"{v.name}.mean({time})" if how == "mean" else f"{v.name}.amax({time})"
    return Value("vec", w.let(text), (N, features))


def to_seq(w: Writer, v: Value) -> Value:
    """Any value as [N, T, F]."""
    if v.kind == "seq":
        return v
    if v.kind == "tseq":
        return Value("seq", w.let(f"{v.name}.transpose(0, 1)"), (v.shape[1], v.shape[0], v.shape[2]))
    if v.kind == "img":
        T = torch.Size(v.shape[2:]).numel()
        if T <= 9:
            return Value("seq", w.let(f"{v.name}.flatten(2).transpose(1, 2)"), (w.N, T, v.shape[1]))
        v = to_vec(w, v)
    layer = w.module(f"nn.Linear({v.shape[1]}, 6)", "n")
    return Value("seq", w.let(f"self.{layer}({v.name}).view(-1, 2, 3)"), (w.N, 2, 3))


def to_img(w: Writer, v: Value) -> Value:
    """Any value as [N, C, h, w]."""
    if v.kind == "img" and len(v.shape) == 4:
        return v
    v = to_vec(w, v)
    layer = w.module(f"nn.Linear({v.shape[1]}, 8)", "n")
    return Value("img", w.let(f"self.{layer}({v.name}).view(-1, 2, 2, 2)"), (w.N, 2, 2, 2))


def _head(w: Writer, v: Value, loss: LossCase) -> None:
    """End the forward with outputs of the loss's shape."""
    shape = loss.shape
    if shape in ("[N,C,T]", "[N,T,C]"):
        v = to_seq(w, v)
        tied = next((t.split() for t in w.traits if t.startswith("embedding")), None)
        if tied is not None and tied[2] == str(C) and tied[3] == str(v.shape[2]):
            out = w.let(f"F.linear({v.name}, self.{tied[1]}.weight)")
            w.roles.setdefault(f"{tied[1]}.weight", {"embedding"}).add("linear")
        elif w.rng.random() < 0.3:
            out = w.let(f"self.{w.module(f'nn.Conv1d({v.shape[2]}, {C}, 1)', 'n')}({v.name}.transpose(1, 2))")
            out = w.let(f"{out}.transpose(1, 2)")
        else:
            out = w.let(f"self.{w.module(f'nn.Linear({v.shape[2]}, {C})', 'n')}({v.name})")
        w.say(f"return {out}" if shape == "[N,T,C]" else f"return {out}.transpose(1, 2)")
    elif shape == "[N,C,h,w]":
        v = to_img(w, v)
        w.say(f"return self.{w.module(f'nn.Conv2d({v.shape[1]}, {C}, {min(v.shape[2:])})', 'n')}({v.name})")
    else:
        v = to_vec(w, v)
        out = 1 if shape == "[N]" else C
        last = {"[N]": ".squeeze(1)", "log-probabilities [N,C]": ".log_softmax(1)"}.get(shape, "")
        text = f"self.{w.module(f'nn.Linear({v.shape[1]}, {out})', 'n')}({v.name}){last}"
        w.say(f"return F.softplus({text})" if shape.startswith("positive") else f"return {text}")
