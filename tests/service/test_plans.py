"""Plans and inspections as the API tells them; a worker's part is played by hand."""

import json

import pytest
from tests.service.planting import claim, expect_problem, fail, request_body, submit, upload

from curvature_protocol.inspections import InspectedModel
from curvature_protocol.jobs import Job
from curvature_protocol.names import result_key
from curvature_protocol.plans import PlanJob
from curvature_service import examples
from curvature_state import endings, jobs

pytestmark = pytest.mark.integration


def report(server, job, kind, found):
    """Finish a job that computes no tensors."""
    held = claim(server, job)
    server.resources.objects.put_bytes(result_key(job.id, held.attempt, f"{kind}.json"), json.dumps(found).encode())
    assert endings.succeed(server.resources.database, job.id, held.attempt)


def make_plan(client, **changes):
    reply = client.post("/v1/plans", json=request_body(client, **changes))
    assert reply.status_code == 201, reply.text
    return PlanJob.model_validate_json(reply.content)


def inspected(client, sha, wait=0):
    reply = client.get(f"/v1/models/{sha}", params={"wait": wait})
    assert reply.status_code == 200, reply.text
    return InspectedModel.model_validate_json(reply.content)


def find(server, job_id):
    return jobs.get_job(server.resources.database, job_id)


class TestPlans:
    def test_a_plan_is_told_once_it_is_there(self, server, client):
        made = make_plan(client)
        assert (made.kind, made.status, made.plan) == ("plan", "queued", None)
        report(server, made, "plan", examples.PLAN_JOB["plan"])
        found = PlanJob.model_validate_json(client.get(f"/v1/plans/{made.id}").content)
        assert found.status == "succeeded"
        assert found.plan.requests[0].parameters[0].method == "closed form"

    def test_a_plan_that_fails_says_why_as_a_job_does(self, server, client):
        made = make_plan(client)
        fail(server, made)
        found = client.get(f"/v1/plans/{made.id}").json()
        assert (found["status"], found["error"]["code"], found["plan"]) == ("failed", "empty_batch", None)

    def test_requests_are_checked_as_those_of_jobs(self, client):
        reply = client.post("/v1/plans", json=request_body(client, extensions=["variances"]))
        expect_problem(reply, 422, "unknown_extension", "extensions.0.name")

    def test_a_plan_of_a_data_set_is_of_its_largest_part(self, server, client):
        hashes = [upload(client, "batches", f"part {n}".encode()) for n in range(3)]
        parts = [{"sha256": sha, "samples": n} for sha, n in zip(hashes, (4, 9, 2), strict=True)]
        made = make_plan(client, batch={"parts": parts})
        assert (made.status, made.request["batch"], made.parts) == ("queued", {"sha256": hashes[1]}, None)
        refused = client.post(
            "/v1/plans", json=request_body(client, batch={"parts": parts}, extensions=["variance", "batch_dot"])
        )
        expect_problem(refused, 422, "whole_batch_required", "extensions.1.name")

    def test_lists_of_jobs_show_plans_only_when_asked(self, client):
        job, made = submit(client), make_plan(client)
        assert [each["id"] for each in client.get("/v1/jobs").json()["items"]] == [job.id]
        assert [each["id"] for each in client.get("/v1/jobs?kind=plan").json()["items"]] == [made.id]

    def test_an_analysis_is_no_plan_and_a_plan_has_no_tensors(self, client):
        expect_problem(client.get(f"/v1/plans/{submit(client).id}"), 404, "job_not_found", "job_id")
        expect_problem(client.get(f"/v1/jobs/{make_plan(client).id}/result"), 404, "result_not_found", "job_id")

    def test_one_key_makes_one_plan_and_no_job(self, client):
        body, key = request_body(client), {"Idempotency-Key": "k"}
        first, again = (client.post("/v1/plans", json=body, headers=key) for _ in range(2))
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.json()["id"] == again.json()["id"]
        reply = client.post("/v1/jobs", json=body, headers=key)
        expect_problem(reply, 409, "idempotency_conflict", "Idempotency-Key")

    def test_a_plan_is_cancelled_and_followed_as_a_job(self, client):
        made = make_plan(client)
        assert client.post(f"/v1/jobs/{made.id}/cancel").json()["status"] == "cancelled"
        assert '"status":"cancelled"' in client.get(f"/v1/jobs/{made.id}/events").text


class TestInspections:
    def test_the_first_look_starts_one_inspection_and_later_ones_find_it(self, server, client):
        sha = upload(client)
        first, again = inspected(client, sha), inspected(client, sha)
        assert first.inspection_status == "queued"
        assert first.inspection_job == again.inspection_job
        report(server, find(server, first.inspection_job), "inspection", examples.INSPECTED_MODEL["inspection"])
        found = inspected(client, sha)
        assert found.inspection_status == "succeeded"
        assert found.inspection.parameters[0].none == {"kfac": "no Kronecker form for layer_norm"}
        assert found.sha256 == sha

    def test_asking_whether_a_model_is_there_starts_nothing(self, client):
        client.head(f"/v1/models/{upload(client)}")
        assert client.get("/v1/jobs?kind=inspection").json()["items"] == []
        expect_problem(client.get(f"/v1/models/{'0' * 64}"), 404, "model_not_found", "model")

    def test_a_model_refused_for_good_is_not_inspected_again(self, server, client):
        sha = upload(client)
        first = inspected(client, sha)
        held = claim(server, find(server, first.inspection_job))
        problem = jobs.problem("invalid_model", "the file is empty", param="model", remedy="upload it again")
        endings.fail(server.resources.database, first.inspection_job, held.attempt, problem)
        found = inspected(client, sha)
        assert (found.inspection, found.error.code) == (None, "invalid_model")
        assert found.inspection_job == first.inspection_job

    def test_one_that_failed_by_accident_or_was_cancelled_is_made_again(self, server, client):
        sha = upload(client)
        first = inspected(client, sha)
        held = claim(server, find(server, first.inspection_job))
        problem = jobs.problem("internal_error", "the worker failed")
        endings.fail(server.resources.database, first.inspection_job, held.attempt, problem)
        second = inspected(client, sha)
        assert second.inspection_job != first.inspection_job
        client.post(f"/v1/jobs/{second.inspection_job}/cancel")
        assert inspected(client, sha).inspection_job != second.inspection_job

    def test_what_was_lost_from_the_store_is_found_again(self, server, client):
        sha = upload(client)
        job = find(server, inspected(client, sha).inspection_job)
        report(server, job, "inspection", examples.INSPECTED_MODEL["inspection"])
        server.resources.objects.delete(result_key(job.id, 1, "inspection.json"))
        assert inspected(client, sha).inspection_job != job.id

    def test_lists_of_jobs_do_not_show_it_unless_asked(self, client):
        job_id = inspected(client, upload(client)).inspection_job
        assert client.get("/v1/jobs").json()["items"] == []
        (job,) = client.get("/v1/jobs?kind=inspection").json()["items"]
        assert Job.model_validate(job).id == job_id
