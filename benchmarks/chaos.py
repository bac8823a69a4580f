"""Jobs that are never lost: everything dies at random moments, and every result equals an undisturbed run's.

    python benchmarks/chaos.py [--jobs 2000] [--seed 0] [--minutes-limit 60] [--embedded] [--output chaos.json]

Real processes: PostgreSQL, a Redis-protocol server, an S3 server, two API processes, three workers (`--embedded`:
`curvature serve` with two workers, SQLite and a folder). Prints a table; exits with 1 if anything was lost, duplicated,
torn, unequal, or failed for no reason of its own, after printing what.
"""

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.cluster.chaos import SETTINGS, Plan, Report, run_chaos
from tests.cluster.cluster import Cluster
from tests.cluster.disturber import Pace
from tests.cluster.embedded import Embedded


def main() -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes-limit", type=float, default=60)
    parser.add_argument("--jobs-between", type=int, nargs=2, default=(0, 5), help="jobs between two disturbances")
    parser.add_argument("--sharded-every", type=int, default=10, help="each so-manieth job is over a data set; 0: none")
    parser.add_argument("--embedded", action="store_true", help="`curvature serve` instead of a cluster")
    parser.add_argument("--logs", type=Path, help="keep the processes' logs in this new folder")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped
    plan = Plan(
        arguments.jobs,
        arguments.seed,
        Pace(jobs=tuple(arguments.jobs_between)),
        60 * arguments.minutes_limit,
        arguments.sharded_every,
    )
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = arguments.logs or Path(temporary)
        make = Embedded if arguments.embedded else Cluster
        with make(folder / "system", settings=SETTINGS) as system:
            report = run_chaos(system, folder, plan, lambda line: print(line, file=sys.stderr, flush=True))
    print(table(report))
    if arguments.output:
        arguments.output.write_text(json.dumps(asdict(report), indent=2) + "\n")
    for problem in report.problems:
        print(problem)
    return 1 if report.problems else 0


def table(report: Report) -> str:
    """The figures, as Markdown."""
    verdict = report.verdict
    kills = ", ".join(f"{kind} {count}" for kind, count in sorted(report.disturbances.items()))
    attempts = ", ".join(f"{number}: {count}" for number, count in sorted(verdict.attempts.items()))
    rows = {
        "jobs (of them over a data set)": f"{report.jobs} ({report.sharded})",
        "disturbances": f"{sum(report.disturbances.values())} ({kills})",
        "time, disturbed / undisturbed": f"{_time(report.seconds)} / {_time(report.undisturbed_seconds)}",
        "succeeded / failed for their own reason": f"{report.succeeded} / {report.refused - len(verdict.failed)}",
        "failed for another": len(verdict.failed),
        "lost": len(verdict.lost),
        "duplicated": len(verdict.duplicated),
        "torn": len(verdict.torn),
        "not equal to the undisturbed run": len(verdict.unequal),
        "jobs and shards by number of attempts": attempts,
        "files of attempts that came to nothing": verdict.leftovers,
    }
    return "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    sys.exit(main())
