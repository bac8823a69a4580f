"""Everything dies at random moments, and no job and no result suffers; `make chaos` is the same for longer."""

import pytest
from tests.cluster.chaos import SETTINGS, Plan, run_chaos
from tests.cluster.cluster import Cluster
from tests.cluster.disturber import Pace
from tests.cluster.embedded import Embedded

PLAN = Plan(jobs=48, pace=Pace(jobs=(0, 4)), seconds_limit=240)


@pytest.mark.timeout(540)
@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (Cluster, {"worker", "child", "api", "broker", "flush", "database"}),
        (Embedded, {"worker", "child", "api", "broker", "flush", "supervisor"}),
    ],
)
def test_no_job_is_lost_and_every_result_equals_an_undisturbed_run(make, kinds, tmp_path):
    with make(tmp_path / "system", settings=SETTINGS) as system:
        report = run_chaos(system, tmp_path, PLAN)
    assert report.problems == []
    assert {kind for kind, count in report.disturbances.items() if count} == kinds
    assert report.succeeded + report.refused == PLAN.jobs
    assert min(report.succeeded, report.refused, report.sharded) > 0
