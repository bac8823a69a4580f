"""Every operator that the proof of the samples' axes lets pass, against the operator itself.

Each call is tried with its tensors tracked in every way that there is: each of them not at all, or with any stride that
its size allows. All axes have N entries or few more, so that samples could be looked for on any of them. Where the
follower says whose the results' elements are, one sample's elements of the arguments are replaced: nothing but that
sample's elements of the results may change, by one bit.
"""

import itertools

import pytest
import torch
from tests.engine.operator_calls import CALLS, N, elementwise_calls
from torch import Tensor

from curvature_engine.calls import OperatorCall
from curvature_engine.followers import FOLLOWERS, Seen
from curvature_engine.operators import ALLOWED, ELEMENTWISE
from curvature_engine.sample_axes import SampleAxes
from curvature_engine.sample_strides import axis_of, sample_numbers

CPU = torch.device("cpu")


def resolved(text: str, arguments: list) -> OperatorCall:
    name, _, overload_name = text.partition(".")
    overload = getattr(getattr(torch.ops.aten, name), overload_name or "default")
    formal = overload._schema.arguments
    arguments.extend(a.default_value for a in formal[len(arguments) :])
    positional = sum(not a.kwarg_only for a in formal)
    keywords = tuple(a.name for a in formal[positional:])
    writes = tuple(i for i, a in enumerate(formal) if a.alias_info is not None and a.alias_info.is_write)
    return OperatorCall(name, overload, positional, keywords, writes, (), (), "")


def flat(value) -> list[Tensor]:
    return [t for v in (value if isinstance(value, list | tuple) else [value]) for t in [v] if isinstance(t, Tensor)]


def substituted(value, replacements: dict[int, Tensor]):
    if isinstance(value, list):
        return [substituted(v, replacements) for v in value]
    return replacements.get(id(value), value)


def strides_of(tensor: Tensor) -> list[int]:
    """0, for a tensor that is not tracked, and all strides that its size allows."""
    return [0] + [s for s in range(1, tensor.numel() // N + 1) if tensor.numel() % (s * N) == 0]


def other_values(tensor: Tensor) -> Tensor:
    """New elements of the same kind: the old ones in another order, changed."""
    if tensor.dtype == torch.bool:
        return ~tensor
    if not tensor.is_floating_point():
        return (tensor + 1) % max(2, int(tensor.max()) + 1)
    return tensor.flatten().flip(0).view_as(tensor) * 0.9 + 0.05


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | ((a != a) & (b != b))


def claims(call: OperatorCall, arguments: list) -> int:
    """Check all ways to track the arguments' tensors; returns in how many of them the follower said something."""
    tensors = list({id(t): t for a in arguments for t in flat(a)}.values())
    results = call.invoke(arguments)
    said = 0
    for chosen in itertools.product(*(strides_of(t) for t in tensors)):
        held = {id(t): (t, s) for t, s in zip(tensors, chosen, strict=True) if s}
        entered = [t for a in arguments for t in flat(a) if id(t) in held]
        if not entered:
            continue
        found = FOLLOWERS[call.name](Seen(held, N, call, arguments, entered), results)
        found = [(t, s) for t, s in found or () if t.numel()]
        if not found:
            continue
        said += 1
        for sample in range(N):
            replacements = {
                place: torch.where(sample_numbers(t.shape, s, N, CPU) == sample, other_values(t), t)
                for place, (t, s) in held.items()
            }
            again = flat(call.invoke([substituted(a, replacements) for a in arguments]))
            for before, after in zip(flat(results), again, strict=True):
                for tensor, stride in found:
                    if tensor is not before:
                        continue
                    assert tensor.shape == after.shape
                    own = sample_numbers(tensor.shape, stride, N, CPU) == sample if stride else torch.tensor(False)
                    changed = ~same(before, after)
                    assert not (changed & ~own).any(), (call.name, [tuple(t.shape) for t in tensors], chosen, stride)
    return said


@pytest.mark.parametrize(("text", "make"), [pytest.param(t, m, id=f"{i}-{t}") for i, (t, m) in enumerate(CALLS)])
def test_only_a_samples_own_elements_change(text, make):
    torch.manual_seed(0)
    arguments = make()
    call = resolved(text, arguments)
    said = claims(call, arguments)
    assert bool(said) != (make.__name__ == "silent"), said


@pytest.mark.parametrize("name", sorted(ELEMENTWISE & FOLLOWERS.keys()))
def test_elementwise_operators_are_elementwise(name):
    torch.manual_seed(0)
    said = tried = 0
    for text, arguments in elementwise_calls(name):
        tried += 1
        said += claims(resolved(text, arguments), arguments)
    assert said or not tried
    assert tried or name in ("tanhshrink", "softsign")  # which TorchScript writes out


def test_every_follower_is_tried():
    tried = {text.partition(".")[0] for text, make in CALLS if make.__name__ != "silent"}
    assert FOLLOWERS.keys() - ELEMENTWISE - tried == set()


def test_followers_are_for_operators_that_may_be_called():
    assert FOLLOWERS.keys() <= ALLOWED


def test_an_axis_is_one_whose_index_says_the_sample():
    for shape in [
        (2, 4),
        (4, 2),
        (2, 2, 2),
        (8,),
        (1, 4, 2),
        (2, 1, 4),
        (4, 4),
        (6, 2),
        (2, 3),
        (2, 3, 2),
        (3, 2),
        (6, 3),
    ]:
        numel = torch.Size(shape).numel()
        for stride in range(1, numel // 2 + 1):
            if numel % (stride * 2):
                continue
            numbers = sample_numbers(shape, stride, 2, CPU)
            axis = axis_of(shape, stride, 2)
            along = [d for d in range(len(shape)) if (numbers == numbers.select(d, 0).unsqueeze(d)).logical_not().any()]
            assert (None if axis is None else [axis.number]) == (along if len(along) == 1 else None)
            if axis is not None:
                places = torch.arange(axis.size).div(axis.inner, rounding_mode="floor") % 2
                assert torch.equal(numbers.movedim(axis.number, -1), places.expand_as(numbers.movedim(axis.number, -1)))


# What `SampleAxes` makes of what followers say


def tracked(*shape: int) -> tuple[SampleAxes, Tensor]:
    """A pass that began, and a tensor of its samples that gradients go to."""
    samples, x = SampleAxes(), torch.randn(N, *shape, dtype=torch.float64)
    samples.begin([x])
    h = torch.nn.Parameter(torch.ones((), dtype=torch.float64)) * x
    samples.see(resolved("mul.Tensor", [x, x]), [x, x], h)
    return samples, h


def passed(samples: SampleAxes, text: str, *arguments) -> Tensor:
    given = list(arguments)
    call = resolved(text, given)
    result = call.invoke(given)
    samples.see(call, given, result)
    return result


EDITS = {
    "transpose_": (0, 1),
    "t_": (),
    "swapaxes_": (0, 1),
    "squeeze_": (),
    "unsqueeze_": (0,),
    "cumsum_": (0,),
    "cumprod_": (0,),
    "addmm_": (torch.eye(N, dtype=torch.float64), torch.eye(N, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_in_place_that_are_more_than_elementwise_end_the_proof(name):
    samples, h = tracked(N)
    passed(samples, name, h, *EDITS[name])
    assert not samples.proved


@pytest.mark.parametrize(
    "text", ["relu_", "mul_.Scalar 2.0", "clamp_ -1.0 1.0", "add_.Scalar 1.0", "zero_", "dropout_ 0.5 False"]
)
def test_elementwise_edits_in_place_go_on(text):
    samples, h = tracked(3)
    name, *numbers = text.split()
    values = [n == "True" if n in ("True", "False") else float(n) for n in numbers]
    passed(samples, name, h, *values)
    assert samples.keeps_rows(h)


def test_an_edit_that_brings_other_samples_in_ends_the_proof():
    samples, h = tracked(N)
    across = passed(samples, "clone", passed(samples, "transpose.int", h, 0, 1))
    assert samples.proved
    passed(samples, "add_.Tensor", h, across)
    assert not samples.proved


def test_writing_into_what_is_not_tracked_ends_the_proof():
    samples, h = tracked(3)
    passed(samples, "copy_", torch.zeros(N, 3, dtype=torch.float64), h)
    assert not samples.proved


def test_a_view_of_several_samples_is_mixed_even_before_gradients_reach_it():
    samples, x = SampleAxes(), torch.randn(N, 3)
    samples.begin([x])
    first = passed(samples, "select.int", x, 0, 0)  # a later edit of x shows in it
    assert samples.stride(x) == 3
    passed(samples, "add_.Tensor", x, passed(samples, "mul.Tensor", x, torch.nn.Parameter(torch.ones(3))))
    y = passed(samples, "add.Tensor", x, first)
    assert y.requires_grad
    assert not samples.keeps_rows(y)


def test_an_edit_of_what_is_mixed_ends_the_proof():
    samples, h = tracked(3)
    first = passed(samples, "select.int", h, 0, 0)
    passed(samples, "add_.Tensor", first, torch.ones(3, dtype=torch.float64))
    assert not samples.proved


def test_an_edit_by_what_is_mixed_ends_the_proof():
    samples, h = tracked(3)
    mean = passed(samples, "mean.dim", h, [0])
    passed(samples, "add_.Tensor", h, mean)
    assert not samples.proved


def test_a_mixture_may_be_asked_what_does_not_come_back():
    samples, h = tracked(3)
    large = passed(samples, "gt.Scalar", passed(samples, "sum", h), 0.0)
    y = passed(samples, "where.self", large, h, h)
    assert samples.keeps_rows(y)


def test_what_no_gradient_comes_back_through_may_do_as_it_likes():
    samples, h = tracked(3)
    for text, *arguments in (("argmax", None), ("gt.Scalar", 0.0), ("any",), ("zeros_like",)):
        passed(samples, text, h, *arguments)
    x = torch.randn(N, 3)
    samples, x = SampleAxes(), x
    samples.begin([x])
    passed(samples, "mean.dim", x, [0])
    assert samples.proved


@pytest.mark.parametrize("text", ["mean.dim 0", "cumsum 0", "softmax.int 0", "diff", "sum", "trace"])
def test_what_gradients_come_back_through_is_mixed_unless_it_is_known(text):
    samples, h = tracked(N)
    name, *axis = text.split()
    axes = [int(a) for a in axis]
    mixed = passed(samples, name, h, *([axes] if name == "mean.dim" else axes))
    assert samples.stride(mixed) is None
    y = passed(samples, "add.Tensor", h, mixed)
    assert not samples.keeps_rows(y)
    assert samples.proved
    assert samples.keeps_rows(passed(samples, "relu", h))


def test_statistics_that_gradients_come_back_through_are_mixed_too():
    samples, h = tracked(4, 3)
    y, mean, _ = passed(samples, "native_group_norm", h, None, None, N, 4, 3, 2, 1e-5)
    assert samples.keeps_rows(y)
    wide = passed(samples, "repeat", mean, [1, 2])
    assert not samples.keeps_rows(passed(samples, "mul.Tensor", passed(samples, "select.int", y, 2, 0), wide))
