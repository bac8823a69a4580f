"""What random nets are made of: small pieces of a forward, by the kind of value that they take."""

from collections.abc import Callable

from tests.engine.random_nets import Value, Writer, to_seq, to_vec

Block = Callable[[Writer, Value], Value]
BLOCKS: dict[str, list[Block]] = {"vec": [], "seq": [], "tseq": [], "img": []}
SMOOTH = ["torch.tanh({h})", "F.gelu({h})", "F.silu({h})", "torch.sigmoid({h})", "F.softplus({h})", "torch.sin({h})"]
KINKED = ["F.relu({h})", "F.leaky_relu({h}, 0.1)", "F.elu({h})", "F.hardtanh({h})", "{h}.clamp(-0.7, 0.9)", "{h}.abs()"]

COUPLERS = [
    "{h} - {h}.mean(0)",
    "{h} / (1.0 + {h}.square().sum(0, keepdim=True))",
    "{h}.cumsum(0)",
    "{h}.softmax(0)",
    "{h} + {h}.roll(1, 0)",
    "{h} + 0.001 * {h}.flip(0)",
    "F.layer_norm({h}, {h}.shape)",
    "torch.cat([{h}[:1], {h}[:-1] + {h}[1:]])",
    "{h} * {h}.std()",
    "{h}[0:1].expand_as({h}) * 1.5",
    "{h} + torch.zeros_like({h}).index_add(0, torch.arange({h}.size(0)).flip(0), {h})",
    "({h}.flatten(1) @ {h}.flatten(1).t()).softmax(-1).matmul({h}.flatten(1)).view_as({h})",
    "torch.cdist({h}.flatten(1), {h}.flatten(1)).matmul({h}.flatten(1)).view_as({h})",
    "F.batch_norm({h}.flatten(1), None, None, None, None, True).view_as({h})",
    "{h} - {h}.amax(0)",
    "F.normalize({h}, dim=0)",
]
"""Expressions that mix samples along the first axis: every net with one must be refused."""


def block(*kinds: str) -> Callable[[Block], Block]:
    """Have a piece used on values of these kinds."""

    def register(function: Block) -> Block:
        for kind in kinds:
            BLOCKS[kind].append(function)
        return function

    return register


def _layout(v: Value) -> str:
    return "tn" if v.kind == "tseq" else "n"


def _same(v: Value, name: str) -> Value:
    return Value(v.kind, name, v.shape)


def _activation(w: Writer, h: str) -> str:
    return w.rng.choice(SMOOTH + KINKED).format(h=h)


# On values of any kind


@block("vec", "seq", "tseq", "img")
def activation(w: Writer, v: Value) -> Value:
    return _same(v, w.let(_activation(w, v.name)))


@block("vec", "seq", "tseq", "img")
def activation_in_place(w: Writer, v: Value) -> Value:
    h = w.let(f"{v.name} * 1.5" if w.rng.random() < 0.3 else _pointwise(w, v))
    w.say(f"{h}.{w.rng.choice(['relu_()', 'tanh_()', 'mul_(0.7)', 'add_(0.3)', 'clamp_(-0.8, 0.8)'])}")
    return _same(v, h)


def _pointwise(w: Writer, v: Value) -> str:
    """A layer that keeps the shape, as text."""
    if v.kind == "img":
        axes, c = len(v.shape) - 2, v.shape[1]
        return f"self.{w.module(f'nn.Conv{axes}d({c}, {c}, 1)', 'n')}({v.name})"
    return f"self.{w.module(f'nn.Linear({v.shape[-1]}, {v.shape[-1]})', _layout(v))}({v.name})"


@block("vec", "seq", "tseq", "img")
def residual(w: Writer, v: Value) -> Value:
    inner = _pointwise(w, v)
    return _same(v, w.let(f"{v.name} + {_activation(w, inner)}"))


@block("vec", "seq", "tseq", "img")
def gate(w: Writer, v: Value) -> Value:
    return _same(v, w.let(f"{_pointwise(w, v)} * {_pointwise(w, v)}.sigmoid()"))


@block("vec", "seq", "tseq", "img")
def routed(w: Writer, v: Value) -> Value:
    return _same(v, w.let(f"torch.where({v.name} > 0.1, {_pointwise(w, v)}, {_pointwise(w, v)} * 0.5)"))


@block("vec", "seq", "tseq", "img")
def scaled_by_parameter(w: Writer, v: Value) -> Value:
    shape = [n if w.rng.random() < 0.6 else 1 for n in v.shape[2 if v.kind == "tseq" else 1 :]]
    p = w.parameter(*(shape if w.rng.random() < 0.5 else [1, *shape]))
    return _same(v, w.let(w.rng.choice(["{h} * {p}", "{p} * {h}", "{h} + {p}", "{p} - {h}", "{h}.add({p}, alpha=-2)"])
                          .format(h=v.name, p=f"self.{p}")))  # fmt: skip


@block("vec", "seq", "tseq", "img")
def scalar_parameter(w: Writer, v: Value) -> Value:
    p = w.parameter(1)
    return _same(
        v, w.let(w.rng.choice([f"{v.name} * self.{p}", f"{v.name} + self.{p}.exp()", f"self.{p}[0] * {v.name}"]))
    )


@block("vec", "seq", "img")
def masked_rows(w: Writer, v: Value) -> Value:
    """Only some samples pass a layer."""
    keep = w.let(f"{v.name}.flatten(1)[:, 0] > -0.2")
    inner = _pointwise(w, Value(v.kind, f"{v.name}[{keep}]", v.shape))
    for name in ("weight", "bias"):
        w.roles[f"{list(w.layouts)[-1]}.{name}"] = {"picked rows"}
    h = w.let(f"{v.name} * 0.5")
    w.say(f"{h}[{keep}] = {h}[{keep}] + {inner}")
    return _same(v, h)


@block("vec", "seq", "tseq", "img")
def dead_rows(w: Writer, v: Value) -> Value:
    """A layer whose rows are silent for some samples."""
    inner = _pointwise(w, v)
    axes = "" if v.kind == "vec" else ".flatten(2).sum(2)" if v.kind == "img" else ".sum(-1)"
    if v.kind == "vec":
        return _same(v, w.let(f"{v.name} + {inner} * ({v.name}.sum(1, keepdim=True) > 0)"))
    mask = w.let(f"({v.name}{axes} > 0).to({v.name}.dtype)")
    ones = "[..., None]" if v.kind != "img" else "".join(["[..., None]"] * (len(v.shape) - 2))
    return _same(v, w.let(f"{v.name} + {inner} * {mask}{ones}"))


@block("vec", "seq", "img")
def reordered(w: Writer, v: Value) -> Value:
    """Rows change places between two layers: outputs of a sample come from another one's inputs."""
    how = w.rng.choice([".flip(0)", ".roll(1, 0)", "[torch.arange({n}).flip(0)]"]).format(n=f"{v.name}.size(0)")
    return _same(v, w.let(f"{_pointwise(w, v)}{how}"))


@block("vec", "seq", "tseq", "img")
def cut_off(w: Writer, v: Value) -> Value:
    h = w.let(_pointwise(w, v))
    return _same(v, w.let(f"{h} * {h}.detach().sigmoid()"))


@block("vec", "seq", "tseq", "img")
def without_gradient(w: Writer, v: Value) -> Value:
    w.traits.add("script only")
    h = w.fresh("v")
    w.say("with torch.no_grad():", f"    {h} = torch.tanh({v.name})")
    return _same(v, w.let(f"{_pointwise(w, v)} + {h}"))


@block("vec", "seq", "tseq", "img")
def branches(w: Writer, v: Value) -> Value:
    """A branch that the data decide."""
    w.traits.add("script only")
    h = w.fresh("v")
    w.say(
        f"if bool({v.name}.sum() > 0):",
        f"    {h} = {_activation(w, _pointwise(w, v))}",
        "else:",
        f"    {h} = {v.name} * 0.5 + {_pointwise(w, v)}",
    )
    return _same(v, h)


@block("vec", "seq", "tseq", "img")
def loop(w: Writer, v: Value) -> Value:
    """One layer, two or more times."""
    h, inner = w.let(f"{v.name} * 1.0"), ""
    inner = _pointwise(w, Value(v.kind, h, v.shape))
    if w.rng.random() < 0.5:
        w.traits.add("script only")
        w.say(
            f"for i in range(int({v.name}.abs().max() * 0) + {w.rng.randint(1, 2)}):", f"    {h} = torch.tanh({inner})"
        )
    else:
        w.say(f"for i in range({w.rng.randint(1, 3)}):", f"    {h} = torch.sin({inner})")
    return _same(v, h)


@block("vec", "seq", "tseq", "img")
def written_in_place(w: Writer, v: Value) -> Value:
    """A part overwritten, another added to."""
    h = w.let(f"{_pointwise(w, v)}" if w.rng.random() < 0.7 else f"torch.zeros_like({v.name})")
    part = w.rng.choice(["[..., :1]", "[..., 1:]", "[..., 0]"])
    w.say(f"{h}{part} = torch.tanh({v.name}{part})" if w.rng.random() < 0.5 else f"{h}{part} += {v.name}{part}")
    return _same(v, h)


@block("vec", "seq", "tseq")
def side_by_side(w: Writer, v: Value) -> Value:
    a, b = (
        w.module(f"nn.Linear({v.shape[-1]}, 2)", _layout(v)),
        w.module(f"nn.Linear({v.shape[-1]}, 2, bias=False)", _layout(v)),
    )
    return Value(
        v.kind, w.let(f"torch.cat([self.{a}({v.name}), torch.tanh(self.{b}({v.name}))], -1)"), (*v.shape[:-1], 4)
    )


@block("vec", "seq", "tseq")
def split(w: Writer, v: Value) -> Value:
    layer = w.module(f"nn.Linear({v.shape[-1]}, 4)", _layout(v))
    a, b = w.fresh("v"), w.fresh("v")
    w.say(
        f"{a}, {b} = {w.rng.choice([f'self.{layer}({v.name}).chunk(2, -1)', f'self.{layer}({v.name}).split(2, -1)'])}"
    )
    return Value(v.kind, w.let(f"{a} * {_activation(w, b)}"), (*v.shape[:-1], 2))


@block("vec", "seq", "tseq")
def linear(w: Writer, v: Value) -> Value:
    out = w.rng.choice([2, 3, 4])
    bias = w.rng.choice(["", ", bias=False"])
    layer = w.module(f"nn.Linear({v.shape[-1]}, {out}{bias})", _layout(v))
    return Value(v.kind, w.let(f"self.{layer}({v.name})"), (*v.shape[:-1], out))


@block("vec", "seq", "tseq")
def bare_products(w: Writer, v: Value) -> Value:
    """A weight used by some function of its own, or by two."""
    F, out = v.shape[-1], w.rng.choice([2, 3])
    if v.kind == "vec" and w.rng.random() < 0.5:
        p, b = w.parameter(F, out, role="transposed"), w.parameter(out, role="bias")
        return Value("vec", w.let(f"torch.addmm(self.{b}, {v.name}, self.{p}, beta=0.5, alpha=2)"), (w.N, out))
    how = w.rng.choice(["linear", "matmul", "einsum", "t", "swapped", "normed"])
    if how == "linear":
        text = f"F.linear({v.name}, self.{w.parameter(out, F, role='linear')})"
    elif how == "matmul":
        text = f"{v.name} @ self.{w.parameter(F, out, role='transposed')}"
    elif how == "t":
        text = f"{v.name} @ self.{w.parameter(out, F, role='linear')}.t()"
    elif how == "swapped":
        text = f"(self.{w.parameter(out, F, role='linear')} @ {v.name}.transpose(-1, -2)).transpose(-1, -2)"
    elif how == "einsum":
        text = f"torch.einsum('...f,gf->...g', {v.name}, self.{w.parameter(out, F)})"
    else:
        p, g = w.parameter(out, F), w.parameter(out, 1)
        text = f"F.linear({v.name}, self.{g} * self.{p} / self.{p}.norm(2, 1, keepdim=True))"
    return Value(v.kind, w.let(text), (*v.shape[:-1], out))


@block("vec", "seq", "tseq")
def tied(w: Writer, v: Value) -> Value:
    """There and back by one weight."""
    F = v.shape[-1]
    G = w.rng.choice([F, 2, 3])
    p = w.parameter(G, F, role="linear")
    w.roles[p].add("transposed")
    there = w.let(_activation(w, f"F.linear({v.name}, self.{p})"))
    return _same(v, w.let(w.rng.choice([f"{there} @ self.{p}", f"F.linear({there}, self.{p}.t())"])))


@block("vec", "seq", "tseq")
def shared(w: Writer, v: Value) -> Value:
    F = v.shape[-1]
    layer = w.module(f"nn.Linear({F}, {F})", _layout(v), _layout(v))
    return _same(v, w.let(f"self.{layer}({_activation(w, f'self.{layer}({v.name})')})"))


@block("vec", "seq", "tseq")
def side_uses(w: Writer, v: Value) -> Value:
    """One layer on two different values, side by side."""
    F = v.shape[-1]
    layer = w.module(f"nn.Linear({F}, {F})", _layout(v), _layout(v))
    return _same(v, w.let(f"self.{layer}({v.name}) * torch.tanh(self.{layer}({v.name}.flip(-1)))"))


@block("vec", "seq", "tseq")
def normalised(w: Writer, v: Value) -> Value:
    F = v.shape[-1]
    how = w.rng.choice(["layer", "rms", "rms_norm", "plain"])
    if how == "rms":
        p = w.parameter(F)
        return _same(v, w.let(f"{v.name} * torch.rsqrt({v.name}.square().mean(-1, keepdim=True) + 1e-2) * self.{p}"))
    kind = {"layer": f"nn.LayerNorm({F}, eps=0.01)", "rms_norm": f"nn.RMSNorm({F}, eps=0.01)"}.get(
        how, f"nn.LayerNorm({F}, eps=0.01, elementwise_affine=False)"
    )
    return _same(v, w.let(f"self.{w.module(kind, _layout(v))}({v.name})"))


MATRICES = [
    "{p}.exp()",
    "{p} @ {q}",
    "{p} * {q}",
    "{p} + {p}.t()",
    "torch.softmax({p}, 0)",
    "{p} / {p}.norm()",
    "{p}.triu() + {q}.tril(-1)",
    "{p} @ {p}.t()",
    "torch.cat([{p}[:1], {q}[1:]])",
    "torch.stack([{p}, {q}]).sum(0)",
    "{p} * {r}",
    "torch.outer({r}, {p}[0])",
    "{p}.clone().mul_(2.0)",
    "{p}[torch.arange({n}).flip(0)]",
    "torch.diag({r}) + {p}[:, :1]",
    "torch.where({p} > 0, {p}, {q})",
    "{p}.t().contiguous()",
    "{p}.clamp(min=-0.5).roll(1, 0) - {q}",
    "{p} * {r}.exp()[:, None] + {p}",
    "{p}",
]
"""What is made of parameters alone: a square matrix of p [n, n], q [n, n], r [n]."""

USES = [
    "F.linear({h}, {m})",
    "{h} @ {m}",
    "{h} + {m}.sum(0)",
    "{h} * {m}[0]",
    "F.linear({h}, {m}, {m}[0])",
    "F.linear({h}, {q}, {m}[0])",
    "torch.einsum('...f,gf->...g', {h}, {m})",
    "torch.einsum('...f,fg,gh->...h', {h}, {m}, {q})",
    "{h} @ {m} + F.linear({h}, {m}).tanh()",
    "{h} + {m}.mean()",
    "torch.tanh({h} @ {m}) @ {m}",
    "({h}[..., None, :] * {m}).sum(-1)",
    "torch.matmul({h}[..., None, :], {m}[None]).squeeze(-2)",
    "{h} / (1.0 + {m}[0].abs())",
    "{m}[0] / (2.0 + {h}.square())",
    "{h} - {m}.amax(0)",
    "F.layer_norm({h}, [{n}], {m}[0], {r}, 0.01)",
    "{h} * {m}[0].expand_as({h})",
    "{h} + {m}[:1].expand_as({h}.reshape(-1, {n})).view_as({h})",
    "{h} @ {m} + {h} @ {p} * {r}",
]
"""How it is used on h [..., n]."""


@block("vec", "seq", "tseq", "vec", "seq", "tseq")
def derived(w: Writer, v: Value) -> Value:
    """A tensor made of parameters alone, used in one way or two."""
    n = v.shape[-1]
    p, q, r = (f"self.{w.parameter(*shape)}" for shape in ((n, n), (n, n), (n,)))
    m = w.let(w.rng.choice(MATRICES).format(p=p, q=q, r=r, n=n))
    h = v.name
    for _ in range(w.rng.choice([1, 1, 2])):
        h = w.let(w.rng.choice(USES).format(h=h, m=m, p=p, q=q, r=r, n=n))
    return _same(v, h)


@block("vec", "seq", "tseq")
def heads(w: Writer, v: Value) -> Value:
    """A weight per head, and maybe one over heads."""
    n = v.shape[-1]
    layer, p = w.module(f"nn.Linear({n}, 4)", _layout(v)), w.parameter(2, 2, 3)
    h = w.let(f"self.{layer}({v.name}).unflatten(-1, (2, 2))")
    h = w.let(f"torch.einsum('...hd,hde->...he', {h}, self.{p})")
    if w.rng.random() < 0.5:
        return Value(v.kind, w.let(f"{h}.flatten(-2)"), (*v.shape[:-1], 6))
    return Value(
        v.kind, w.let(f"torch.einsum('...he,heo->...o', {h}, self.{w.parameter(2, 3, 2)})"), (*v.shape[:-1], 2)
    )


@block("vec", "seq")
def bilinear(w: Writer, v: Value) -> Value:
    n = v.shape[-1]
    text = f"self.{w.module(f'nn.Bilinear({n}, {n}, 2)', 'n')}({v.name}, torch.tanh({v.name}))"
    return Value(v.kind, w.let(text), (*v.shape[:-1], 2))


@block("seq", "tseq")
def many_headed_attention(w: Writer, v: Value) -> Value:
    layer = w.module(f"nn.Linear({v.shape[2]}, 4)", _layout(v))
    h = w.let(f"self.{layer}({v.name})")
    first = ", batch_first=True" if v.kind == "seq" else ""
    more = w.rng.choice(["", ", add_bias_kv=True"])
    attention = w.module(f"nn.MultiheadAttention(4, 2{first}{more})", _layout(v))
    weights = w.rng.choice(["False", "True"])
    if weights == "False":
        w.traits.add("fused attention")
    return Value(v.kind, w.let(f"self.{attention}({h}, {h}, {h}, need_weights={weights})[0]"), (*v.shape[:2], 4))


@block("seq")
def cells(w: Writer, v: Value) -> Value:
    """A recurrent cell, step by step."""
    N, T, n = v.shape
    kind = w.rng.choice(["GRUCell", "RNNCell", "LSTMCell"])
    cell = w.module(f"nn.{kind}({n}, 2)", *["n"] * T)
    state, states = w.let(f"torch.zeros({v.name}.size(0), 2, dtype={v.name}.dtype)"), w.fresh("v")
    memory = w.let(state) if kind == "LSTMCell" else ""
    w.say(f"{states} = []", f"for t in range({v.name}.size(1)):")
    if memory:
        w.say(f"    {state}, {memory} = self.{cell}({v.name}[:, t], ({state}, {memory}))")
    else:
        w.say(f"    {state} = self.{cell}({v.name}[:, t], {state})")
    w.say(f"    {states}.append({state})")
    return Value("seq", w.let(f"torch.stack({states}, 1)"), (N, T, 2))


# On vectors


@block("vec")
def batch_norm(w: Writer, v: Value) -> Value:
    return _same(v, w.let(f"self.{w.module(f'nn.BatchNorm1d({v.shape[1]})', 'n')}({v.name})"))


@block("vec")
def unfolded(w: Writer, v: Value) -> Value:
    """A vector becomes a short sequence, of either order."""
    seq = to_seq(w, v)
    return to_tseq(w, seq) if w.rng.random() < 0.4 else seq


# On sequences


@block("seq")
def to_tseq(w: Writer, v: Value) -> Value:
    contiguous = w.rng.choice(["", ".contiguous()"])
    return Value("tseq", w.let(f"{v.name}.transpose(0, 1){contiguous}"), (v.shape[1], v.shape[0], v.shape[2]))


@block("tseq")
def from_tseq(w: Writer, v: Value) -> Value:
    return to_seq(w, v)


@block("seq", "tseq")
def flattened_rows(w: Writer, v: Value) -> Value:
    F = v.shape[2]
    layer = w.module(f"nn.Linear({F}, {F})", "flat_nt" if v.kind == "seq" else "flat_tn")
    return _same(v, w.let(f"self.{layer}({v.name}.reshape(-1, {F})).view({v.name}.shape)"))


@block("seq", "tseq")
def positions(w: Writer, v: Value) -> Value:
    T = v.shape[1 if v.kind == "seq" else 0]
    p = w.parameter(T, v.shape[2])
    return _same(v, w.let(f"{v.name} + self.{p}" if v.kind == "seq" else f"{v.name} + self.{p}[:, None]"))


@block("seq")
def class_token(w: Writer, v: Value) -> Value:
    N, T, F = v.shape
    p = w.parameter(1, 1, F)
    return Value("seq", w.let(f"torch.cat([self.{p}.expand({v.name}.size(0), -1, -1), {v.name}], 1)"), (N, T + 1, F))


@block("seq", "tseq", "seq")
def attention(w: Writer, v: Value) -> Value:
    F = v.shape[2]
    h = v.name
    layer = w.module(f"nn.Linear({F}, {3 * F})", _layout(v))
    q, k, u = (w.fresh("v") for _ in range(3))
    w.say(f"{q}, {k}, {u} = self.{layer}({h}).chunk(3, -1)")
    if v.kind == "tseq":
        w.say(*(f"{name} = {name}.transpose(0, 1)" for name in (q, k, u)))
    how = w.rng.choice(["plain", "causal", "fused", "fused causal", "padded"])
    if how.startswith("fused"):
        w.traits.add("fused attention")
        causal = ", is_causal=True" if "causal" in how else ""
        lifted = ", ".join(f"{name}[:, None]" for name in (q, k, u))
        out = w.let(f"F.scaled_dot_product_attention({lifted}{causal}).squeeze(1)")
    else:
        scores = w.let(f"{q} @ {k}.transpose(1, 2) / {F**0.5}")
        if how == "causal":
            w.say(f"{scores} = {scores}.masked_fill(torch.ones_like({scores}).triu(1).to(torch.bool), -float('inf'))")
        if how == "padded":
            source = h if v.kind == "seq" else f"{h}.transpose(0, 1)"
            w.say(f"{scores} = {scores}.masked_fill(({source}[..., 0] < -1)[:, None], -1e4)")
        out = w.let(f"{scores}.softmax(-1) @ {u}")
    return _same(v, w.let(f"{out}.transpose(0, 1)" if v.kind == "tseq" else out))


@block("seq", "tseq")
def recurrent(w: Writer, v: Value) -> Value:
    F = v.shape[2]
    kind = w.rng.choice(["nn.GRU", "nn.LSTM", "nn.RNN"])
    first = ", batch_first=True" if v.kind == "seq" else ""
    both = w.rng.random() < 0.2
    layers = w.rng.choice([1, 1, 2])
    way = ", bidirectional=True" if both else ""
    more = f", num_layers={layers}" if layers > 1 else ""
    layer = w.module(f"{kind}({F}, 2{first}{way}{more})", _layout(v))
    w.traits.add("recurrent")
    return Value(v.kind, w.let(f"self.{layer}({v.name})[0]"), (*v.shape[:2], 4 if both else 2))


@block("seq")
def hand_recurrent(w: Writer, v: Value) -> Value:
    N, T, F = v.shape
    i, h = w.module(f"nn.Linear({F}, 2)", *["n"] * T), w.module("nn.Linear(2, 2)", *["n"] * T)
    state, states = w.let(f"torch.zeros({v.name}.size(0), 2, dtype={v.name}.dtype)"), w.fresh("v")
    w.say(
        f"{states} = []",
        f"for t in range({v.name}.size(1)):",
        f"    {state} = torch.tanh(self.{i}({v.name}[:, t]) + self.{h}({state}))",
        f"    {states}.append({state})",
    )
    return Value("seq", w.let(f"torch.stack({states}, 1)"), (N, T, 2))


@block("seq")
def sequence_convolution(w: Writer, v: Value) -> Value:
    N, T, F = v.shape
    layer = w.module(f"nn.Conv1d({F}, 2, 2, padding=1)", "n")
    return Value("seq", w.let(f"self.{layer}({v.name}.transpose(1, 2)).transpose(1, 2)"), (N, T + 1, 2))


@block("seq", "tseq")
def pooled(w: Writer, v: Value) -> Value:
    return to_vec(w, v)


# On images


def _convolved(v: Value, sizes: list[int], channels: int, name: str) -> Value:
    return Value("img", name, (v.shape[0], channels, *sizes))


@block("img", "img", "img")
def convolution(w: Writer, v: Value) -> Value:
    rng, axes, inside = w.rng, len(v.shape) - 2, v.shape[1]
    groups = rng.choice([g for g in (1, 1, 2, inside) if inside % g == 0])
    out = groups * rng.choice([1, 2]) if groups > 1 else rng.choice([2, 3, 4])
    bias = rng.choice(["", ", bias=False"])
    if rng.random() < 0.25:
        kernel = tuple(rng.choice([1, 2, 3]) for _ in range(axes))
        dilation = rng.choice([1, 2])
        text = f"nn.Conv{axes}d({inside}, {out}, {kernel}, padding='same', dilation={dilation}, groups={groups}{bias})"
        return _convolved(v, list(v.shape[2:]), out, w.let(f"self.{w.module(text, 'n')}({v.name})"))
    kernel = tuple(rng.choice([1, 2, 3]) for _ in range(axes))
    stride = tuple(rng.choice([1, 1, 2]) for _ in range(axes))
    dilation = tuple(rng.choice([1, 1, 2]) for _ in range(axes))
    padding = tuple(
        max(rng.choice([0, 1]), -(-(d * (k - 1) + 1 - n) // 2))
        for n, k, d in zip(v.shape[2:], kernel, dilation, strict=True)
    )
    mode = (
        rng.choice(["", "", ", padding_mode='circular'"])
        if all(p <= n for p, n in zip(padding, v.shape[2:], strict=True))
        else ""
    )
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, d, p in zip(v.shape[2:], kernel, stride, dilation, padding, strict=True)
    ]
    text = (
        f"nn.Conv{axes}d({inside}, {out}, {kernel}, stride={stride}, padding={padding}, dilation={dilation}, "
        f"groups={groups}{bias}{mode})"
    )
    layer = w.module(text, "n")
    if mode:
        w.roles[f"{layer}.weight"] = {"padded by hand"}
    return _convolved(v, sizes, out, w.let(f"self.{layer}({v.name})"))


@block("img")
def transposed_convolution(w: Writer, v: Value) -> Value:
    rng, axes, inside = w.rng, len(v.shape) - 2, v.shape[1]
    groups = rng.choice([g for g in (1, 2) if inside % g == 0])
    out = groups * rng.choice([1, 2])
    kernel = tuple(rng.choice([1, 2, 3]) for _ in range(axes))
    stride = tuple(rng.choice([1, 2]) for _ in range(axes))
    dilation = tuple(rng.choice([1, 1, 2]) for _ in range(axes))
    padding = tuple(rng.choice([0, min(1, d * (k - 1))]) for k, d in zip(kernel, dilation, strict=True))
    extra = tuple(rng.choice([0, 1]) if max(s, d) > 1 else 0 for s, d in zip(stride, dilation, strict=True))
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, k, s, d, p, e in zip(v.shape[2:], kernel, stride, dilation, padding, extra, strict=True)
    ]
    if min(sizes) < 1 or max(sizes) > 8:
        return convolution(w, v)
    text = (
        f"nn.ConvTranspose{axes}d({inside}, {out}, {kernel}, stride={stride}, padding={padding}, "
        f"output_padding={extra}, groups={groups}, dilation={dilation})"
    )
    return _convolved(v, sizes, out, w.let(f"self.{w.module(text, 'n')}({v.name})"))


@block("img")
def image_norm(w: Writer, v: Value) -> Value:
    axes, c = len(v.shape) - 2, v.shape[1]
    kinds = [f"nn.BatchNorm{axes}d({c})", f"nn.GroupNorm(1, {c}, eps=0.01)", f"nn.GroupNorm({c}, {c}, eps=0.01)"]
    if max(v.shape[2:]) > 1:
        kinds.append(f"nn.InstanceNorm{axes}d({c}, affine=True, eps=0.01)")
        kinds.append(f"nn.InstanceNorm{axes}d({c}, affine=True, track_running_stats=True)")
    elif c == 1:
        kinds = kinds[:1]
    return _same(v, w.let(f"self.{w.module(w.rng.choice(kinds), 'n')}({v.name})"))


@block("img")
def pooling(w: Writer, v: Value) -> Value:
    axes, sizes = len(v.shape) - 2, list(v.shape[2:])
    if min(sizes) < 2:
        return activation(w, v)
    how = w.rng.choice([f"max_pool{axes}d", f"avg_pool{axes}d", f"adaptive_avg_pool{axes}d"])
    name = w.let(f"F.{how}({v.name}, 2)")
    after = [2] * axes if how.startswith("adaptive") else [n // 2 for n in sizes]
    return _convolved(v, after, v.shape[1], name)


@block("img")
def squeeze_and_excite(w: Writer, v: Value) -> Value:
    axes, c = len(v.shape) - 2, v.shape[1]
    a = w.module(f"nn.Linear({c}, 2)", "n")
    b = w.module(f"nn.Linear(2, {c})", "n")
    h = w.let(f"{v.name}.flatten(2).mean(2)")
    return _same(v, w.let(f"{v.name} * torch.sigmoid(self.{b}(F.relu(self.{a}({h})))){'[..., None]' * axes}"))


@block("img")
def along_the_last_axis(w: Writer, v: Value) -> Value:
    """A linear layer on an axis of space."""
    layer = w.module(f"nn.Linear({v.shape[-1]}, 2)", "n")
    return _convolved(v, [*v.shape[2:-1], 2], v.shape[1], w.let(f"self.{layer}({v.name})"))


@block("img")
def to_tokens(w: Writer, v: Value) -> Value:
    seq = to_seq(w, v)
    return to_tseq(w, seq) if w.rng.random() < 0.3 else seq


@block("img")
def activation_of_channels(w: Writer, v: Value) -> Value:
    c = w.rng.choice([1, v.shape[1]])
    return _same(v, w.let(f"self.{w.module(f'nn.PReLU({c})', 'n')}({v.name})"))
