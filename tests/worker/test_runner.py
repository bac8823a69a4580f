import errno
import io
import os
import signal
import time
import zipfile
from datetime import UTC, datetime, timedelta

import pytest
import redis
import torch
from safetensors.torch import save
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from tests.worker import models
from tests.worker.desk import Desk, script, wait_until

import curvature_engine as engine
from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import JobStatus
from curvature_protocol.names import admitted_key, artefact_key, event_stream
from curvature_state.dropping import drop_results
from curvature_state.endings import request_cancel
from curvature_state.reconciling import find_waiting, take_back_expired
from curvature_state.tables import JobRow
from curvature_worker import attempt, runner
from curvature_worker.admission import ADMISSION_VERSION
from curvature_worker.errors import JobStopped, LeaseLost, WorkerUnfit
from curvature_worker.launcher import Confined
from curvature_worker.lease import Lease
from curvature_worker.pool import ChildPool

pytestmark = pytest.mark.integration

EXTENSIONS = [
    "batch_grad",
    "variance",
    {"name": "diag_ggn_mc", "options": {"mc_samples": 4}},
    {"name": "kfac", "label": "factors"},
    "batch_loss",
]


class TestSuccess:
    def test_stored_tensors_equal_the_engines_bit_for_bit(self, desk, tmp_path):
        data = script(models.small())
        (tmp_path / "model").write_bytes(data)
        torch.set_num_threads(1)
        expected = engine.analyze(tmp_path / "model", *models.batch(), EXTENSIONS, seed=7)
        job = desk.run(desk.submit(data, models.batch(), EXTENSIONS, seed=7))
        assert job.status == JobStatus.SUCCEEDED, job.error
        for label, group in expected.groups.items():
            stored = desk.tensors(job, label)
            assert stored.keys() == group.tensors.keys()
            assert all(torch.equal(stored[name], tensor) for name, tensor in group.tensors.items())

    def test_the_manifest_says_how_each_tensor_came_to_be(self, desk):
        manifest = desk.manifest(desk.run(desk.submit(models.small(), models.batch(), EXTENSIONS, seed=7)))
        groups = {group.label: group for group in manifest.groups}
        sampled = groups["diag_ggn_mc"].tensors[0].provenance
        assert (sampled.seed, sampled.mc_samples, sampled.reduction, sampled.Z) == (7, 4, "mean", 6.0)
        assert (sampled.method, sampled.verified, sampled.device) == ("closed form", True, "cpu")
        assert groups["factors"].tensors[0].provenance.approximation == "expand"
        assert groups["variance"].tensors[0].provenance.seed is None
        assert "landlock" in manifest.isolation or "rlimits" in manifest.isolation

    def test_every_step_is_timed(self, desk):
        first = desk.manifest(desk.run(desk.submit(models.small(), models.batch())))
        again = desk.manifest(desk.run(desk.submit(models.small(), models.batch())))
        steps = {"queue", "fetch", "hand_over", "child", "load", "compute", "write", "check", "store"}
        assert set(first.timings_ms) == steps | {"admit"}
        assert set(again.timings_ms) == steps

    def test_followers_hear_of_start_progress_and_end(self, desk, redis_url):
        job_id = desk.submit(models.small(), models.batch())
        desk.run(job_id)
        wait_until(lambda: last_heard(redis_url, job_id) == (JobStatus.SUCCEEDED, 1))
        with redis.Redis.from_url(redis_url) as connection:
            entries = connection.xrange(event_stream(job_id))
        heard = [JobEvent.model_validate_json(fields[b"event"]) for _, fields in entries]
        assert [e.status for e in heard if e.event == "state"] == ["running", "succeeded"]
        assert "admitting" in [e.progress.phase for e in heard if e.event == "progress"]

    def test_what_was_computed_before_is_taken_and_its_warnings_with_it(self, desk):
        asked = {"cache": True, "verify": False}
        model = models.small()
        first = desk.run(desk.submit(model, models.batch(), ["variance"], warnings=["of the first"], **asked))
        both = desk.run(desk.submit(model, models.batch(), ["grad", "variance"], warnings=["of both"], **asked))
        manifest = desk.manifest(both)
        grad, variance = manifest.groups
        assert grad.tensors[0].provenance.cached_from is None
        assert variance.tensors[0].provenance.cached_from == variance.source.job_id == first.id
        assert [w for w in manifest.warnings if w.startswith("of ")] == ["of both", "of the first"]
        assert [key.rpartition("/")[2] for key in sorted(desk.results(both.id))] == [
            "grad.safetensors",
            "manifest.json",
        ]

    def test_precision_and_layout_reach_the_engine_and_their_error_the_manifest(self, desk):
        model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 3)
        )
        batch = torch.randn(4, 2, 6, 6), torch.tensor([0, 2, 1, 1])
        asked = {"cache": True, "verify": False}
        plain = desk.run(desk.submit(model, batch, ["variance"], **asked))
        changed = desk.run(desk.submit(model, batch, ["variance"], channels_last=True, **asked))
        manifest = desk.manifest(changed)
        (group,) = manifest.groups
        assert manifest.channels_last
        assert group.source is None
        assert manifest.precision_error.samples == 4
        told = {tensor.name: tensor.provenance.precision_error for tensor in group.tensors}
        assert told == dict(manifest.precision_error.parameters)
        assert max(told.values()) < 1e-5
        assert (desk.manifest(plain).channels_last, desk.manifest(plain).precision_error) == (False, None)

    def test_a_precision_that_the_device_lacks_is_refused(self, desk):
        job = desk.run(desk.submit(models.small(), models.batch(), ["variance"], precision="tf32"))
        assert (job.error.code, job.error.param) == ("invalid_option", "precision")

    def test_warnings_of_client_and_engine_come_with_the_result(self, desk):
        model = torch.nn.Sequential(*models.small(), torch.nn.Dropout()).train()
        job = desk.run(desk.submit(model, models.batch(), warnings=["said before"]))
        assert job.warnings[0] == "said before"
        assert any("training mode" in warning for warning in job.warnings)

    def test_eval_false_is_another_program_of_the_same_file(self, desk):
        data = script(torch.nn.Sequential(*models.small(), torch.nn.Dropout(0.9)).train())
        evaluated = desk.run(desk.submit(data, models.batch(), ["outputs"]))
        trained = desk.run(desk.submit(data, models.batch(), ["outputs"], eval=False))
        assert trained.status == JobStatus.SUCCEEDED, trained.error
        outputs = [desk.tensors(job, "outputs")["outputs"] for job in (evaluated, trained)]
        assert not torch.equal(*outputs)

    def test_a_loss_that_is_nan_is_delivered_with_a_warning(self, desk):
        inputs, targets = models.batch()
        job = desk.run(desk.submit(models.small(), (inputs * float("nan"), targets), ["batch_loss"]))
        assert job.status == JobStatus.SUCCEEDED, job.error
        assert desk.manifest(job).loss is None
        assert any("nan" in warning for warning in job.warnings)

    def test_a_model_is_admitted_once(self, desk):
        data = script(models.small())
        desk.run(desk.submit(data, models.batch()))
        admitted = desk.objects.local_path(admitted_key(desk.store("models", data), ADMISSION_VERSION))
        first = admitted.stat().st_mtime_ns
        desk.run(desk.submit(data, models.batch()))
        assert admitted.stat().st_mtime_ns == first

    def test_a_store_that_is_no_folder_serves_as_well(self, settings, shared_pool, tmp_path):
        desk = Desk(settings.model_copy(update={"storage_url": "memory:///"}), shared_pool, tmp_path)
        desk.objects = desk.runner._tools.objects
        job = desk.run(desk.submit(models.small(), models.batch()))
        assert job.status == JobStatus.SUCCEEDED, job.error
        assert len(desk.results(job.id)) == 2
        desk.close()

    def test_a_store_on_another_file_system_serves_as_well(self, settings, shared_pool, tmp_path, other_file_system):
        changed = settings.model_copy(update={"storage_url": f"file://{other_file_system}/objects"})
        desk = Desk(changed, shared_pool, tmp_path)
        job = desk.run(desk.submit(models.small(), models.batch()))
        assert job.status == JobStatus.SUCCEEDED, job.error
        desk.close()

    def test_nothing_of_a_job_stays_with_the_child_but_its_model(self, desk):
        data = script(models.small())
        desk.run(desk.submit(data, models.batch()))
        child = desk.child()
        assert desk.store("models", data) in [p.name for p in child.inbox.iterdir()]
        batch = desk.store("batches", save(dict(zip(("inputs", "targets"), models.batch(), strict=True))))
        assert not any(batch in p.name for p in child.inbox.iterdir())
        assert list(child.outbox.iterdir()) == []


class TestFurtherFiles:
    """A loss function, and batches that options refer to."""

    def further(self, desk, loss=models.halved):
        buffer = io.BytesIO()
        torch.jit.save(loss, buffer)
        function = desk.store("losses", buffer.getvalue())
        other = desk.store("batches", save(dict(zip(("inputs", "targets"), models.batch(4), strict=True))))
        dot = {"name": "batch_dot", "options": {"against": {"sha256": other}, "over": "model"}}
        return {"loss": {"sha256": function, "output": None}, "extensions": [dot, "batch_loss"]}

    def test_they_reach_the_engine_and_leave_the_child(self, desk):
        further = self.further(desk)
        extensions = further.pop("extensions")
        job_id = desk.submit(models.small(), models.batch(), extensions, **further)
        job = desk.run(job_id)
        assert job.status == JobStatus.SUCCEEDED, job.error
        manifest = desk.manifest(job)
        assert manifest.loss_name == "custom"
        assert manifest.groups[0].options["against"] == extensions[0]["options"]["against"]
        assert manifest.groups[0].tensors[0].shape == (6, 4)
        assert [p.name for p in desk.child().inbox.iterdir() if "loss" in p.name] == []
        other = extensions[0]["options"]["against"]["sha256"]
        assert not any(other in p.name for p in desk.child().inbox.iterdir())

    def test_a_model_sent_as_a_batch_stays_as_a_model(self, desk):
        data = script(models.small())
        refused = desk.run(desk.submit(data, data))
        assert refused.error.code == "invalid_batch"
        later = desk.run(desk.submit(data, models.batch(), eval=False))  # which loads the model's file once more
        assert later.status == JobStatus.SUCCEEDED, later.error

    def test_a_loss_that_is_no_longer_stored_is_named(self, desk):
        job_id = desk.submit(models.small(), models.batch(), loss={"sha256": "0" * 64, "output": None})
        job = desk.run(job_id)
        assert (job.error.code, job.error.param) == ("loss_not_found", "loss")

    def test_a_loss_is_admitted_like_a_model(self, desk):
        stolen = io.BytesIO()
        with zipfile.ZipFile(stolen, "w") as archive:
            for name in ("data.pkl", "constants.pkl", "version", "code/f.py"):
                archive.writestr(f"f/{name}", b"cos\nsystem\n." if name == "data.pkl" else b"")
        loss = {"sha256": desk.store("losses", stolen.getvalue()), "output": None}
        job = desk.run(desk.submit(models.small(), models.batch(), loss=loss))
        assert (job.error.code, job.error.param) == ("unsupported_loss", "loss")
        assert "in the loss function: f/data.pkl refers to 'os system'" in job.error.detail

    def test_a_loss_that_is_too_large_is_refused(self, desk, monkeypatch):
        monkeypatch.setattr("curvature_worker.admitting._LOSS_BYTES", 10)
        job = desk.run(desk.submit(models.small(), models.batch(), loss=self.further(desk)["loss"]))
        assert (job.error.code, job.error.param) == ("unsupported_loss", "loss")

    def test_a_loss_that_does_not_end_is_cut_off(self, desk):
        loss = self.further(desk, models.endless)["loss"]
        job = desk.run(desk.submit(models.small(), models.batch(), loss=loss, timeout_seconds=0.5))
        assert job.error.code == "job_timeout"
        assert desk.run(desk.submit(models.small(), models.batch())).status == JobStatus.SUCCEEDED


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "batch", "extensions", "code", "param"),
        [
            (b"once upon a time", models.batch(), ["variance"], "invalid_model", "model"),
            (script(models.small())[:500], models.batch(), ["variance"], "invalid_model", "model"),
            (models.small(), b"no safetensors", ["variance"], "invalid_batch", "batch"),
            (models.small(), save({"inputs": torch.zeros(2, 4)}), ["variance"], "invalid_batch", "batch"),
            (
                models.small(),
                save({"x": torch.zeros(1), "targets": torch.zeros(1)}),
                ["variance"],
                "invalid_batch",
                "batch",
            ),
            (models.small(), (torch.zeros(2, 9), torch.arange(2)), ["variance"], "invalid_inputs", None),
            (models.small(), (torch.zeros(2, 4), torch.tensor([0, 3])), ["variance"], "invalid_targets", "targets"),
            (models.small(), (torch.zeros(0, 4), torch.arange(0)), ["variance"], "empty_batch", "batch"),
            (models.small(), models.batch(), ["varianze"], "unknown_extension", "extensions"),
        ],
        ids=["text", "truncated", "batch", "no targets", "no inputs", "shape", "range", "empty", "extension"],
    )
    def test_bad_input_fails_the_job_with_code_param_and_words(self, desk, model, batch, extensions, code, param):
        job = desk.run(desk.submit(model, batch, extensions))
        assert job.status == JobStatus.FAILED
        assert job.error.code == code
        assert param is None or job.error.param == param
        assert job.error.detail
        assert "Traceback" not in job.error.detail

    def test_the_child_survives_bad_input(self, desk):
        desk.run(desk.submit(models.small(), models.batch()))
        before = desk.child().pid
        desk.run(desk.submit(models.small(), (torch.zeros(2, 9), torch.arange(2))))
        desk.run(desk.submit(b"nonsense", models.batch()))
        assert desk.run(desk.submit(models.small(), models.batch())).status == JobStatus.SUCCEEDED
        assert desk.child().pid == before

    def test_followers_hear_why_it_failed(self, desk, redis_url):
        job_id = desk.submit(b"nonsense", models.batch())
        desk.run(job_id)
        wait_until(lambda: last_heard(redis_url, job_id) == (JobStatus.FAILED, 1))
        with redis.Redis.from_url(redis_url) as connection:
            _, fields = connection.xrevrange(event_stream(job_id), count=1)[0]
        assert JobEvent.model_validate_json(fields[b"event"]).error.code == "invalid_model"

    def test_a_model_that_is_no_longer_stored_is_named(self, desk):
        job_id = desk.submit(models.small(), models.batch())
        desk.objects.delete(artefact_key("models", desk.job(job_id).request["model"]))
        assert desk.run(job_id).error.code == "model_not_found"

    def test_more_memory_than_there_is(self, desk):
        job = desk.run(desk.submit(models.Greedy(), models.batch()))
        assert (job.status, job.error.code) == (JobStatus.FAILED, "out_of_memory")
        assert "smaller batch" in job.error.remedy
        assert desk.run(desk.submit(models.small(), models.batch())).status == JobStatus.SUCCEEDED

    def test_a_job_that_is_over_is_not_run_again(self, desk):
        job_id = desk.submit(models.small(), models.batch())
        once = desk.run(job_id)
        assert not desk.runner.run_next()
        assert desk.job(job_id) == once


class TestInterruptions:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
    def test_a_child_that_dies_in_mid_job_costs_an_attempt_and_the_next_job_runs(self, desk, number):
        job_id = desk.submit(models.Endless(), models.batch())
        job, _ = desk.run_while(job_id, lambda: os.kill(desk.child().pid, number), desk.computes(job_id))
        assert (job.status, job.attempt, job.error) == (JobStatus.QUEUED, 1, None)
        assert desk.run(desk.submit(models.small(), models.batch())).status == JobStatus.SUCCEEDED

    def test_a_child_that_dies_in_every_attempt_fails_its_job_with_the_reason(self, desk):
        settings = desk.settings.model_copy(update={"max_attempts": 1})
        strict = Desk(settings, desk.pool, desk.settings.scratch_dir.parent)
        job_id = strict.submit(models.Endless(), models.batch())
        job, _ = strict.run_while(job_id, lambda: os.kill(strict.child().pid, signal.SIGKILL), strict.computes(job_id))
        assert (job.status, job.error.code) == (JobStatus.FAILED, "worker_crashed")
        assert "SIGKILL" in job.error.detail
        strict.close()

    @pytest.mark.parametrize("model", [models.Endless, models.LongOperator], ids=["in a loop", "in one operator"])
    def test_cancelling_stops_a_computation_within_two_seconds(self, desk, model):
        job_id = desk.submit(model(), models.batch())
        job, seconds = desk.run_while(job_id, lambda: request_cancel(desk.database, job_id), desk.computes(job_id))
        assert job.status == JobStatus.CANCELLED
        assert seconds < 2.0
        assert desk.results(job_id) == []

    def test_a_job_beyond_its_time_fails_with_its_limit(self, desk):
        job = desk.run(desk.submit(models.Endless(), models.batch(), timeout_seconds=0.5))
        assert (job.status, job.error.code) == (JobStatus.FAILED, "job_timeout")
        assert "0.5 s" in job.error.detail

    def test_a_worker_that_is_told_to_stop_hands_the_job_back(self, desk):
        job_id = desk.submit(models.Endless(), models.batch())
        job, seconds = desk.run_while(job_id, desk.runner.stopping.set)
        assert (job.status, job.attempt) == (JobStatus.QUEUED, 1)
        assert seconds < 2.0
        assert [waiting.job_id for waiting in find_waiting(desk.database)] == [job_id]

    @pytest.mark.parametrize("order", ["stopping", "draining"])
    def test_a_worker_that_is_told_to_stop_or_to_drain_takes_no_other_job(self, desk, order):
        job_id = desk.submit(models.small(), models.batch())
        getattr(desk.runner, order).set()
        assert not desk.runner.run_next()
        assert desk.job(job_id).status == JobStatus.QUEUED

    def test_a_lease_is_kept_while_computing(self, desk):
        settings = desk.settings.model_copy(update={"lease_seconds": 0.6})
        job_id = desk.submit(models.Endless(), models.batch(), timeout_seconds=1.5)
        patient = Desk(settings, desk.pool, desk.settings.scratch_dir.parent)
        taken = []
        job, _ = patient.run_while(
            job_id,
            lambda: wait_until(lambda: taken.extend(take_back_expired(desk.database)) or over(desk, job_id)),
        )
        assert taken == []
        assert job.error.code == "job_timeout"
        patient.close()

    def test_a_job_that_was_taken_away_is_left_alone(self, desk):
        job_id = desk.submit(models.Endless(), models.batch())
        job, seconds = desk.run_while(job_id, lambda: give_away(desk, job_id))
        assert (job.status, job.attempt) == (JobStatus.RUNNING, 2)
        assert seconds < 2.0

    def test_a_result_of_a_job_that_was_taken_away_is_not_kept(self, desk, monkeypatch):
        job_id = desk.submit(models.small(), models.batch())
        put = desk.runner._tools.objects.put_bytes

        def put_late(key, data):
            put(key, data)
            give_away(desk, job_id)

        monkeypatch.setattr(desk.runner._tools.objects, "put_bytes", put_late)
        desk.runner.run_next()
        assert desk.job(job_id).status == JobStatus.RUNNING
        assert desk.results(job_id) == []

    def test_what_was_removed_while_it_was_to_be_taken_from_the_cache_is_computed(self, desk, monkeypatch):
        asked = {"cache": True, "verify": False}
        source = desk.run(desk.submit(models.small(), models.batch(), ["variance"], **asked))
        job_id = desk.submit(models.small(), models.batch(), ["variance", "grad"], **asked)
        put = desk.runner._tools.objects.put_bytes

        def evict_first(key, data):
            put(key, data)
            with desk.database.write() as session:
                drop_results(session, [source.id])

        monkeypatch.setattr(desk.runner._tools.objects, "put_bytes", evict_first)
        desk.runner.run_next()
        assert desk.job(job_id).status == JobStatus.QUEUED
        assert desk.results(job_id) == []
        with desk.database.write() as session:
            session.execute(update(JobRow).values(not_before=None))
        job = desk.run(job_id)
        assert job.status == JobStatus.SUCCEEDED
        assert [group.source for group in desk.manifest(job).groups] == [None, None]

    def test_followers_hear_of_a_hand_back_as_the_row_has_it(self, desk, redis_url):
        job_id = desk.submit(models.Endless(), models.batch())
        job, _ = desk.run_while(job_id, desk.runner.stopping.set)
        wait_until(lambda: last_heard(redis_url, job_id) == (job.status, job.attempt))

    def test_a_result_whose_commit_was_not_acknowledged_is_kept(self, desk, monkeypatch, redis_url):
        lose_first_acknowledgement(monkeypatch, attempt, "succeed")
        job = desk.run(desk.submit(models.small(), models.batch()))
        assert job.status == JobStatus.SUCCEEDED
        assert len(desk.results(job.id)) == 2
        wait_until(lambda: last_heard(redis_url, job.id) == (JobStatus.SUCCEEDED, 1))

    def test_followers_hear_of_a_failure_whose_commit_was_not_acknowledged(self, desk, monkeypatch, redis_url):
        lose_first_acknowledgement(monkeypatch, runner, "fail")
        job = desk.run(desk.submit(b"nonsense", models.batch()))
        assert job.status == JobStatus.FAILED
        wait_until(lambda: last_heard(redis_url, job.id) == (JobStatus.FAILED, 1))

    @pytest.mark.parametrize("what", ["cancel", "store", "lease"])
    def test_what_breaks_off_the_storing_leaves_no_file(self, desk, monkeypatch, what):
        job_id = desk.submit(models.small(), models.batch(), ["grad", "variance", "batch_grad"])
        objects, stored, leases = desk.runner._tools.objects, [], []
        put, enter = objects.put_file, Lease.__enter__
        monkeypatch.setattr(Lease, "__enter__", lambda lease: leases.append(lease) or enter(lease))

        def put_file(key, path):
            if key.startswith("results/"):
                stored.append(key)
                if len(stored) == 2:
                    break_off(desk, job_id, leases[0], what)
            return put(key, path)

        monkeypatch.setattr(objects, "put_file", put_file)
        job = desk.run(job_id)
        assert len(stored) == 2
        assert job.status == {"cancel": "cancelled", "store": "queued", "lease": "running"}[what]
        assert desk.results(job_id) == []

    @pytest.mark.parametrize("meddle", ["kept open", "linked"])
    def test_a_result_that_its_process_could_still_change_is_not_taken(self, desk, monkeypatch, meddle):
        """The test stands for the process: it opens the file, or names it twice, before the worker takes it."""
        take, kept = Confined.take, []

        def take_late(process, name):
            if name == "batch_grad.safetensors":
                file = process.outbox / name
                kept.append(file.open("r+b") if meddle == "kept open" else (process.outbox / "b").hardlink_to(file))
            return take(process, name)

        monkeypatch.setattr(Confined, "take", take_late)
        job_id = desk.submit(models.small(), models.batch())
        job = desk.run(job_id)
        if meddle == "kept open":
            kept[0].close()
        assert (job.status, job.error.code) == (JobStatus.FAILED, "internal_error")
        assert "kept hold of" in job.error.detail
        assert desk.results(job_id) == []
        assert "default" not in desk.pool._children
        monkeypatch.undo()
        assert desk.run(desk.submit(models.small(), models.batch())).status == JobStatus.SUCCEEDED

    def test_progress_is_noted_while_computing(self, desk):
        job_id = desk.submit(
            models.small(), models.batch(200), [{"name": "diag_ggn_mc", "options": {"mc_samples": 100_000}}]
        )
        seen = {}

        def note():
            seen["progress"] = wait_until(
                lambda: (p := desk.job(job_id).progress) and p.phase == "computing" and p.done and p
            )
            request_cancel(desk.database, job_id)

        desk.run_while(job_id, note)
        assert 0 < seen["progress"].done < seen["progress"].total == 100_000


def over(desk, job_id):
    return desk.job(job_id).finished_at is not None


def last_heard(redis_url, job_id):
    """(state, attempt) that a job's followers were told last; it is told a moment after it was written."""
    with redis.Redis.from_url(redis_url) as connection:
        entries = connection.xrange(event_stream(job_id))
    events = [JobEvent.model_validate_json(fields[b"event"]) for _, fields in entries]
    states = [(event.status, event.attempt) for event in events if event.event == "state"]
    return states[-1] if states else None


def lose_first_acknowledgement(monkeypatch, module, name):
    """The step commits, but the connection breaks before it can say so."""
    step, calls = getattr(module, name), []

    def commit_silently(*arguments):
        done = step(*arguments)
        calls.append(done)
        if len(calls) == 1:
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))
        return done

    monkeypatch.setattr(module, name, commit_silently)


def break_off(desk, job_id, lease, what):
    """Something that ends an attempt in the middle of storing."""
    if what == "store":
        raise OSError(errno.ENOSPC, "No space left on device")
    if what == "cancel":
        request_cancel(desk.database, job_id)
        kind = JobStopped
    else:
        give_away(desk, job_id)
        kind = LeaseLost
    wait_until(lambda: raises(lease.check, kind))


def raises(check, kind):
    try:
        check()
    except kind:
        return True
    return False


def give_away(desk, job_id):
    """What the reconciler and another worker do when this one seems dead."""
    with desk.database.write() as session:
        row = session.get(JobRow, job_id)
        row.lease_expires_at = datetime.now(UTC) - timedelta(seconds=1)
    # A renewal may come in between; the other worker is then a moment later.
    with desk.database.write() as session:
        row = session.get(JobRow, job_id)
        row.status, row.attempt = "running", row.attempt + 1


class TestAbsences:
    def test_a_broker_that_is_away_costs_a_job_nothing(self, settings, shared_pool, tmp_path):
        desk = Desk(settings.model_copy(update={"redis_url": "unix:///nowhere.sock?db=0"}), shared_pool, tmp_path)
        begun = time.monotonic()
        assert desk.run(desk.submit(models.small(), models.batch())).status == JobStatus.SUCCEEDED
        assert time.monotonic() - begun < 5
        desk.close()

    def test_a_database_that_is_away_at_the_claim_harms_nobody(self, settings, shared_pool, tmp_path, caplog):
        broken = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/empty.db"})
        desk = Desk(broken, shared_pool, tmp_path)
        assert not desk.runner.run_next()
        assert "database does not answer" in caplog.text
        assert "Traceback" not in caplog.text
        desk.close()


class TestLimits:
    def test_memory_beyond_the_childs_limit_fails_the_job_only(self, settings, tmp_path):
        limited = settings.model_copy(update={"memory_limit_bytes": 6 * 2**30})
        scratch = tmp_path / "pool"
        scratch.mkdir()
        pool = ChildPool(limited, scratch)
        desk = Desk(limited, pool, tmp_path)
        try:
            pool.open()
            job = desk.run(desk.submit(models.Hungry(), models.batch()))
            assert (job.status, job.error.code) == (JobStatus.FAILED, "out_of_memory"), job.error
            assert desk.run(desk.submit(models.small(), models.batch())).status == JobStatus.SUCCEEDED
        finally:
            pool.close()
            desk.close()

    def test_a_worker_whose_children_no_longer_start_hands_the_job_back(self, settings, tmp_path):
        scratch = tmp_path / "pool"
        scratch.mkdir()
        pool = ChildPool(settings.model_copy(update={"device": "cuda:99"}), scratch)
        pool.greeting = {"budget_bytes": 1}  # of a child before, which did start
        desk = Desk(settings, pool, tmp_path)
        try:
            job_id = desk.submit(models.small(), models.batch())
            with pytest.raises(WorkerUnfit, match="cuda:99"):
                desk.runner.run_next()
            assert (desk.job(job_id).status, desk.job(job_id).attempt) == (JobStatus.QUEUED, 1)
        finally:
            pool.close()
            desk.close()
