"""Which batch sizes each net takes for which kind of work by default: what two cores do in some seconds."""

from dataclasses import dataclass

from benchmarks.bench.nets import NETS
from benchmarks.bench.works import EXACT, HESSIAN, INDIVIDUAL, INDIVIDUAL_EXACT, ROOT, WORKS, Work

KEY = {"diag_ggn_mc", "diag_ggn_mc+grad", "variance", "batch_l2", "batch_grad", "kfac"}
"""Also at N = 128 on All-CNN-C."""
KEY_OF_LARGE = {"diag_ggn_mc", "diag_ggn_mc+grad", "variance"}
"""Also at N = 128 on the ResNet-18 and the GPT."""
CURVES = KEY | {"grad", "sum_grad_squared", "diag_ggn_exact", "kflr"}
"""Against the batch size, on the small nets."""
SWEPT = ("diag_ggn_mc", "diag_ggn_exact", "kfac", "kflr")
"""Against the number of classes."""
KFRA_NET = "mlp"

KINDS = ("cheap", "forward", "individual", "exact", "individual_exact", "root", "hessian")
SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "2c2d": ((128,), (128,), (32,), (32,), (32,), (8,), (8,)),
    "3c3d": ((128,), (128,), (32,), (32,), (32,), (8,), (8,)),
    "allcnnc": ((16,), (16,), (16,), (4,), (4,), (1,), (2,)),
    "resnet18": ((16,), (16,), (16,), (8,), (8,), (2,), (2,)),
    "gpt": ((8,), (8,), (8,), (), (), (), ()),
    "mlp": ((), (), (), (), (), (), ()),
}
NO_SIZE = {
    "gpt": "an exact square root has a column for each position and class: 128,000",
    "mlp": "the MLP is there for KFRA alone",
}
NO_KFRA = "KFRA's averaged matrices have a row for each of a layer's features: tens of GB; see the MLP"


@dataclass(frozen=True)
class Sized:
    """One cell to be measured."""

    net: str
    work: Work
    N: int
    classes: int


def kind(work: Work) -> str:
    kinds = {"individual": INDIVIDUAL, "exact": EXACT, "individual_exact": INDIVIDUAL_EXACT}
    kinds |= {"root": ROOT, "hessian": HESSIAN, "forward": {"batch_loss", "outputs"}}
    return next((name for name, works in kinds.items() if work.name in works), "cheap")


def default_sizes(net: str, work: Work) -> tuple[int, ...]:
    """Largest first."""
    if work.name == "kfra":
        return (128, 32) if net == KFRA_NET else ()
    if net in ("2c2d", "3c3d") and work.name in CURVES:
        return (128, 32, 8)
    sizes = dict(zip(KINDS, SIZES[net], strict=True))[kind(work)]
    key = {"allcnnc": KEY, "resnet18": KEY_OF_LARGE, "gpt": KEY_OF_LARGE}.get(net, set())
    return (128, *sizes) if work.name in key else sizes


def cells(nets: list[str], works: list[str], sizes: list[int] | None, classes: list[int]) -> list[Sized]:
    """The largest batches of every net first, since a run may end before it is through; the sweep over classes last."""
    ranked = []
    for net in nets:
        for name in works:
            chosen = default_sizes(net, WORKS[name])
            for rank, N in enumerate(sizes if sizes and chosen else chosen):
                ranked.append((rank, Sized(net, WORKS[name], N, NETS[net].classes)))
    swept = [
        Sized("3c3d", WORKS[name], min(sizes or [16]), C)
        for name in SWEPT
        if "3c3d" in nets and name in works
        for C in classes
    ]
    return [sized for _, sized in sorted(ranked, key=lambda pair: pair[0])] + swept


def left_out(nets: list[str], works: list[str]) -> dict[str, str]:
    """What has no default size, with the reason."""
    return {
        f"{NETS[net].title}, {name}": NO_SIZE.get(net, "") if name != "kfra" else NO_KFRA
        for net in nets
        for name in works
        if not default_sizes(net, WORKS[name]) and net != KFRA_NET
    }
