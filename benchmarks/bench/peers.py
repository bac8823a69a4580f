"""Everybody who is compared with the engine."""

from benchmarks.bench.backpack import backpack
from benchmarks.bench.curvlinops import curvlinops
from benchmarks.bench.functional import functional
from benchmarks.bench.gradient import gradient
from benchmarks.bench.jobs import Peer
from benchmarks.bench.naive import naive
from benchmarks.bench.opacus import opacus
from benchmarks.bench.ordinary import ordinary

PEERS: dict[str, Peer] = {
    "backpack": backpack,
    "opacus": opacus,
    "curvlinops": curvlinops,
    "functional": functional,
    "naive": naive,
    "gradient": gradient,
    "ordinary": ordinary,
}
TITLES = {
    "ours": "ours",
    "backpack": "BackPACK",
    "opacus": "Opacus",
    "curvlinops": "curvlinops",
    "functional": "torch.func",
    "naive": "loop",
    "gradient": "autograd",
    "ordinary": "without replays",
}
