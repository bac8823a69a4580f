"""Every model of the zoo × every extension × every file format against brute force: writes docs/coverage.md.

Ends with status 1 where any number is wrong, any model that must be refused is not, or a model is refused that is not
known to be.
"""

import argparse
import platform
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.engine.zoo import FAMILIES  # noqa: E402
from tests.engine.zoo.judge import CHECKS, TOLERANCE, judge, refusal, ways_of  # noqa: E402
from tests.engine.zoo.truth import MC_SAMPLES, Truth  # noqa: E402

from curvature_engine.extensions import EXTENSIONS  # noqa: E402

LEGEND = f"""# Coverage

Which model gets which extension, and how far the numbers are from brute force. `make coverage` writes this page; it
fails where a number is wrong.

Every model is toy-sized, has random weights, and is analyzed in float64 in every file format named in its row (S
scripted, T traced, E exported, F traced without gradients, where torch takes its fast path). Each extension is
compared with plain autograd on the eager module, written for the tests alone. A cell holds the worst of the formats:

- **C** all parameters by closed forms, **F** all by the universal fallback, **CF** some by each; **·** a quantity of
  the outputs alone;
- **+−** after it: some parameters have no such quantity, and are listed with the reason (Kronecker factors);
- **R** refused, with the reason (KFRA: the model is no chain; diagonals of the Hessian: an operator has no second
  derivative);
- a number: the largest error, relative to the parameter's largest value (or to {1e-5:g} of the model's, where a
  parameter's true value is about zero); above {TOLERANCE:g} it is **wrong**;
- **?** some of it is not compared, **untested** none is. Not compared: Kronecker factors of weights that eager PyTorch
  uses inside a fused operator (recurrent layers, held to a layer written out in another test) or that are added as
  they are; KFRA where the module is no plain `nn.Sequential` of layers; a noise scale whose denominator cancels.

How some are compared: square roots of the GGN by their product with a random vector, S Sᵀ r, which any root shares.
Monte-Carlo quantities ({MC_SAMPLES} draws) exactly, given the engine's own draws: its columns in the space of outputs,
asked for on a model that only adds a constant, go back through the eager module's Jacobian. That the draws are
unbiased is tested by standard errors elsewhere.
"""


def work(place):
    """One model, all ways: (family, entry's name, ways, {extension: [Cell]}, failure)."""
    family, number = place
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entry = FAMILIES[family][number]
    ways = ways_of(entry)
    if entry.refused:
        return family, entry.name, ways, {way: code_of(refusal(entry, way)) for way in ways}, None
    try:
        truth = Truth(entry)
        judged = [judge(truth, way) for way in ways]
    except Exception as error:  # noqa: BLE001 (a model that fails in any way is reported, and fails the table)
        return family, entry.name, ways, {}, f"{type(error).__name__}: {error}"
    return family, entry.name, ways, {name: [cells[name] for cells in judged] for name in EXTENSIONS}, None


def code_of(error):
    """What of an error goes from one process to another."""
    return None if error is None else error.code


def shown(name, cells):
    """One cell of the table."""
    refused = [c for c in cells if c.refusal]
    if refused:
        return "R" if len(refused) == len(cells) else "R?"
    methods = {m for c in cells for m in c.methods}
    text = "C" * ("closed form" in methods) + "F" * ("fallback" in methods) or "·"
    text += "+−" * ("none" in methods)
    if name not in CHECKS:
        return f"{text} untested"
    errors = [c.error for c in cells if c.error is not None]
    mark = "?" * any(c.unchecked for c in cells)
    if not errors:
        return f"{text} {'untested' if mark else ''}".strip()
    wrong = " **wrong**" if any(c.wrong for c in cells) else ""
    return f"{text} {max(errors):.0e}{mark}{wrong}"


def main():
    """Judge all, write the page, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="models whose name contains this; the page is not written")
    arguments = parser.parse_args()
    places = [
        (family, i)
        for family, entries in FAMILIES.items()
        for i, entry in enumerate(entries)
        if arguments.only in entry.name
    ]
    started, rows, problems = time.perf_counter(), [], []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for row in pool.map(work, places):
            rows.append(row)
            problems += problems_of(row)
            print(f"{len(rows)}/{len(places)} {row[0]}: {row[1]}", flush=True)
    page = "\n".join([LEGEND, *tables(rows), *summary(rows, problems, time.perf_counter() - started)]) + "\n"
    if not arguments.only:
        (ROOT / "docs" / "coverage.md").write_text(page)
    print("\n".join(summary(rows, problems, time.perf_counter() - started)))
    sys.exit(bool(problems))


def problems_of(row):
    """What must not be."""
    family, name, _, found, failure = row
    if failure:
        return [f"{name}: {failure}"]
    entry = next(e for e in FAMILIES[family] if e.name == name)
    if entry.refused:
        wrong = {way: code for way, code in found.items() if code != entry.refused}
        return [f"{name}, {way}: expected {entry.refused}, got {code}" for way, code in wrong.items()]
    problems = []
    for extension, cells in found.items():
        expected = extension == "kfra" or (not entry.hessian and extension.endswith("diag_hessian"))
        problems += [f"{name}: {extension} is wrong by {c.error}" for c in cells if c.wrong]
        problems += [f"{name}: {extension} is refused: {c.refusal}" for c in cells if c.refusal and not expected]
    return problems


def tables(rows):
    """A table per family; extensions stand in rows of their own page's order."""
    lines = []
    for family in FAMILIES:
        own = [row for row in rows if row[0] == family]
        if not own:
            continue
        lines += [f"## {family.capitalize()}", ""]
        lines += refusals(own) if family == "refused" else quantities(own)
        lines.append("")
    return lines


def quantities(rows):
    lines = [f"| model | formats | {' | '.join(EXTENSIONS)} |", f"| --- | --- |{' --- |' * len(EXTENSIONS)}"]
    for _, name, ways, found, failure in rows:
        letters = " ".join(w[0].upper() for w in ways)
        cells = [shown(e, found[e]) for e in EXTENSIONS] if not failure else [failure.replace("|", "/")]
        lines.append(f"| {name} | {letters} | {' | '.join(cells)} |")
    return lines


def refusals(rows):
    lines = ["| model | formats | refused with |", "| --- | --- | --- |"]
    for _, name, ways, found, _ in rows:
        reasons = dict.fromkeys(f"`{code}`" if code else "**not refused**" for code in found.values())
        lines.append(f"| {name} | {' '.join(w[0].upper() for w in ways)} | {', '.join(reasons)} |")
    return lines


def summary(rows, problems, seconds):
    judged = [row for row in rows if not row[4] and not _refused(row)]
    cells = [c for row in judged for each in row[3].values() for c in each]
    errors = [c.error for c in cells if c.error is not None]
    return [
        "## In all",
        "",
        f"{len(judged)} models in {sum(len(row[2]) for row in judged)} files, {len(EXTENSIONS)} extensions: "
        f"{len(errors)} comparisons, {sum(c.wrong for c in cells)} wrong numbers, the largest error "
        f"{max(errors, default=0):.1e}. {sum(_refused(row) for row in rows)} models that must be refused, "
        f"{len(problems)} problems. torch {torch.__version__}, {platform.machine()}, {seconds:.0f} s.",
        *[f"- {problem}" for problem in problems],
    ]


def _refused(row):
    return row[0] == "refused"


if __name__ == "__main__":
    main()
