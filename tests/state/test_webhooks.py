"""Which messages are due, who sends them, and what becomes of them; the same on SQLite and PostgreSQL."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from sqlalchemy import event, insert, select, text, update

from curvature_protocol.jobs import FINAL, JobStatus
from curvature_protocol.requests import Webhook
from curvature_state import endings, webhooks
from curvature_state.jobs import NewJob, SweepPlace, insert_jobs
from curvature_state.sweeps import NewSweep, create_sweep, retry_sweep
from curvature_state.tables import JobRow, WebhookRow

REQUEST = {"model": "a" * 64, "batch": {"sha256": "b" * 64}, "extensions": [{"name": "grad"}]}
HOOK = Webhook(url="https://receiver.example/hook", secret="the-secret-of-this-request")


def make_job(database, *, tenant="default", webhook=HOOK, sweep=None):
    new = NewJob(REQUEST, "d", tenant=tenant, sweep=sweep)
    with database.write() as session:
        insert_jobs(session, [new])
        if webhook is not None:
            webhooks.register(session, "job", new.id, tenant, webhook)
    return new.id


def make_sweep(database, rows=3, webhook=HOOK):
    sweep_id = uuid.uuid4().hex
    jobs = [NewJob(REQUEST, "d", sweep=SweepPlace(sweep_id, row, {"seed": row})) for row in range(rows)]
    create_sweep(database, NewSweep(jobs, ("seed",), "d", webhook=webhook, id=sweep_id))
    return sweep_id, [job.id for job in jobs]


def set_status(database, job_id, status):
    """As any of the places does in which jobs change: none of them knows of webhooks."""
    ended = datetime.now(UTC) if status in FINAL else None
    with database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(status=status, finished_at=ended))


def row_of(database, subject_id):
    with database.read() as session:
        return session.scalars(select(WebhookRow).where(WebhookRow.subject_id == subject_id)).one()


def come_due(database):
    """As if the time until every next try had passed, and what the last one met was forgotten."""
    with database.write() as session:
        session.execute(update(WebhookRow).values(next_at=datetime.now(UTC), last_error=None))


def take_one(database):
    [delivery] = webhooks.take_due(database, 10)
    return delivery


# When a message is due


@pytest.mark.parametrize("status", sorted(FINAL))
def test_a_job_that_is_over_is_told_of_once(database, status):
    job_id = make_job(database)
    set_status(database, job_id, status)
    delivery = take_one(database)
    assert (delivery.subject, delivery.subject_id, delivery.tries) == ("job", job_id, 1)
    assert (delivery.url, delivery.secret) == (HOOK.url, HOOK.secret)
    assert webhooks.take_due(database, 10) == []


@pytest.mark.parametrize("status", sorted(set(JobStatus) - FINAL))
def test_a_job_that_is_not_over_is_not_told_of(database, status):
    set_status(database, make_job(database), status)
    assert webhooks.take_due(database, 10) == []


def test_a_job_without_a_webhook_is_not_told_of(database):
    set_status(database, make_job(database, webhook=None), "succeeded")
    assert webhooks.take_due(database, 10) == []


def test_a_sweep_is_told_of_when_its_last_job_is_over(database):
    sweep_id, jobs = make_sweep(database)
    for job_id, status in zip(jobs, ("succeeded", "failed", "cancelled"), strict=True):
        assert webhooks.take_due(database, 10) == []
        set_status(database, job_id, status)
    delivery = take_one(database)
    assert (delivery.subject, delivery.subject_id) == ("sweep", sweep_id)
    assert webhooks.take_due(database, 10) == []


def test_a_webhook_for_a_job_that_is_not_there_is_a_mistake_that_shows(database):
    with pytest.raises(LookupError, match="a job that has a row"), database.write() as session:
        webhooks.register(session, "job", "0" * 32, "default", HOOK)


def test_no_more_are_taken_than_asked_for(database):
    made = [make_job(database) for _ in range(5)]
    for job_id in made:
        set_status(database, job_id, "succeeded")
    assert webhooks.take_due(database, 0) == []
    first, rest = webhooks.take_due(database, 2), webhooks.take_due(database, 10)
    assert (len(first), len(rest)) == (2, 3)
    assert {delivery.subject_id for delivery in first + rest} == set(made)


def test_tenants_take_turns(database):
    busy = [make_job(database, tenant="busy") for _ in range(20)]
    for job_id in busy:
        set_status(database, job_id, "succeeded")
    assert len(webhooks.take_due(database, 4)) == 4  # all are due by now
    set_status(database, make_job(database, tenant="quiet"), "succeeded")
    assert {delivery.tenant for delivery in webhooks.take_due(database, 2)} == {"busy", "quiet"}


# Who sends it


def test_of_many_takers_one_gets_a_message(database):
    made = [make_job(database) for _ in range(40)]
    for job_id in made:
        set_status(database, job_id, "succeeded")
    with ThreadPoolExecutor(8) as pool:
        rounds = list(pool.map(lambda _: webhooks.take_due(database, 10), range(24)))
    taken = [delivery.subject_id for taken in rounds for delivery in taken]
    assert sorted(taken) == sorted(set(taken))
    rest = [delivery.subject_id for delivery in webhooks.take_due(database, 100)]
    assert sorted(taken + rest) == sorted(made)


def test_a_dead_senders_message_comes_due_again_under_the_same_id(database):
    set_status(database, make_job(database), "succeeded")
    first = take_one(database)
    come_due(database)
    second = take_one(database)
    assert (second.id, second.tries) == (first.id, 2)


def test_who_took_it_before_does_not_disturb_who_holds_it_now(database):
    job_id = make_job(database)
    set_status(database, job_id, "succeeded")
    late = take_one(database)
    come_due(database)
    take_one(database)
    webhooks.record_failure(database, late, "too late", give_up=True)
    assert row_of(database, job_id).state == "due"
    webhooks.record_delivered(database, late)  # delivered is delivered, by whomever
    assert row_of(database, job_id).state == "delivered"


# What becomes of it


def test_what_was_delivered_is_not_sent_again(database):
    job_id = make_job(database)
    set_status(database, job_id, "succeeded")
    webhooks.record_delivered(database, take_one(database))
    come_due(database)
    assert webhooks.take_due(database, 10) == []
    assert row_of(database, job_id).state == "delivered"


def test_a_failed_try_is_followed_by_others_ever_later_and_then_given_up(database):
    job_id = make_job(database)
    set_status(database, job_id, "succeeded")
    pauses = []
    for tries in range(1, webhooks.MAX_TRIES + 1):
        delivery = take_one(database)
        assert delivery.tries == tries
        last = webhooks.record_failure(database, delivery, "it answered 500\x00")
        assert last == (tries == webhooks.MAX_TRIES)
        row = row_of(database, job_id)
        assert row.last_error == "it answered 500"
        pauses.append((row.next_at - datetime.now(UTC)).total_seconds())
        assert webhooks.take_due(database, 10) == []
        come_due(database)
    assert row_of(database, job_id).state == "failed"
    assert all(later > 2 * sooner for sooner, later in pairwise(pauses))
    assert 14 * 3600 < sum(pauses[:-1]) < 34 * 3600
    assert webhooks.take_due(database, 10) == []


def test_pauses_are_spread():
    assert len({webhooks.backoff_seconds(1) for _ in range(10)}) == 10


def test_a_receiver_may_ask_for_a_longer_pause_up_to_a_day(database):
    job_id = make_job(database)
    set_status(database, job_id, "succeeded")
    for asked, least, most in ((3600, 3590, 3600), (10**9, 86_000, 86_400)):
        webhooks.record_failure(database, take_one(database), "it answered 429", pause_seconds=asked)
        pause = (row_of(database, job_id).next_at - datetime.now(UTC)).total_seconds()
        assert least < pause <= most
        come_due(database)


def test_a_message_can_be_given_up_at_once(database):
    job_id = make_job(database)
    set_status(database, job_id, "succeeded")
    assert webhooks.record_failure(database, take_one(database), "it answered 410", give_up=True)
    come_due(database)
    assert webhooks.take_due(database, 10) == []
    assert row_of(database, job_id).state == "failed"


# Subjects that are taken up again, or deleted


def retry(database, *subject_ids):
    with database.write() as session:
        session.execute(update(JobRow).where(JobRow.id.in_(subject_ids)).values(status="queued", finished_at=None))
        webhooks.rearm(session, subject_ids)


@pytest.mark.parametrize("before", ["delivered", "due", "failed"])
def test_a_job_that_is_retried_is_told_of_again_under_another_id(database, before):
    job_id = make_job(database)
    set_status(database, job_id, "failed")
    first = take_one(database)
    if before == "delivered":
        webhooks.record_delivered(database, first)
    else:
        webhooks.record_failure(database, first, "it answered 500", give_up=before == "failed")
    retry(database, job_id)
    come_due(database)
    assert webhooks.take_due(database, 10) == []
    webhooks.record_delivered(database, first)  # of the end before, on its way since
    set_status(database, job_id, "succeeded")
    second = take_one(database)
    assert second.id != first.id
    assert (second.tries, second.secret) == (1, HOOK.secret)


@pytest.mark.parametrize("alone", [True, False])
def test_a_sweep_that_is_retried_is_told_of_again(database, alone):
    sweep_id, jobs = make_sweep(database)
    for job_id in jobs:
        set_status(database, job_id, "failed")
    first = take_one(database)
    webhooks.record_delivered(database, first)
    if alone:
        endings.retry(database, jobs[0])
    else:
        retry_sweep(database, sweep_id, "default")
    assert webhooks.take_due(database, 10) == []
    for job_id in jobs:
        set_status(database, job_id, "succeeded")
    assert take_one(database).id != first.id


def test_a_sweep_without_anything_to_retry_is_not_told_of_again(database):
    sweep_id, jobs = make_sweep(database, rows=1)
    set_status(database, jobs[0], "succeeded")
    webhooks.record_delivered(database, take_one(database))
    retry_sweep(database, sweep_id, "default")
    assert webhooks.take_due(database, 10) == []


def test_taking_up_again_what_was_never_over_changes_nothing(database):
    job_id = make_job(database)
    before = row_of(database, job_id).id
    retry(database, job_id)
    assert row_of(database, job_id).id == before


def test_a_message_about_an_end_that_is_none_any_more_waits_for_the_next(database):
    job_id = make_job(database)
    set_status(database, job_id, "failed")
    first = take_one(database)
    set_status(database, job_id, "queued")
    webhooks.put_back(database, first)
    come_due(database)
    assert webhooks.take_due(database, 10) == []
    set_status(database, job_id, "succeeded")
    assert take_one(database).tries == 1


def test_of_what_is_deleted_nobody_is_told(database):
    gone, kept = make_job(database), make_job(database)
    for job_id in (gone, kept):
        set_status(database, job_id, "succeeded")
    with database.write() as session:
        webhooks.forget(session, [gone])
    assert take_one(database).subject_id == kept


# Secrets


def test_a_stored_request_has_no_secret():
    request = {"model": "m", "webhook": {"url": "https://a.example", "secret": "shown to nobody"}}
    assert webhooks.without_secret(request) == {"model": "m", "webhook": {"url": "https://a.example"}}
    assert request["webhook"]["secret"] == "shown to nobody"
    for without in ({"model": "m"}, {"webhook": None}, {"webhook": {"url": "https://a.example"}}):
        assert webhooks.without_secret(without) == without


def test_neither_a_delivery_nor_a_webhook_prints_its_secret(database):
    set_status(database, make_job(database), "succeeded")
    assert HOOK.secret not in repr(take_one(database))
    assert HOOK.secret not in repr(HOOK)


# Cost


def test_a_round_reads_only_what_is_over_however_many_wait(database):
    """Databases' plans of a round's questions, among as many jobs that were told of and as many that are not over."""
    now = datetime.now(UTC)
    waiting, told = ([NewJob(REQUEST, "d") for _ in range(3000)] for _ in range(2))
    hook = {"tenant": "default", "url": HOOK.url, "attempts": 1, "next_at": now, "created_at": now, "subject": "job"}
    hooks = [{**hook, "id": job.id, "subject_id": job.id, "state": "waiting"} for job in waiting]
    hooks += [{**hook, "id": job.id, "subject_id": job.id, "state": "delivered"} for job in told]
    with database.write() as session:
        insert_jobs(session, waiting + told)
        session.execute(update(JobRow).values(webhook_waits=True))
        over = update(JobRow).where(JobRow.id.in_([job.id for job in told]))
        session.execute(over.values(webhook_waits=False, status="succeeded"))
        session.execute(insert(WebhookRow), hooks)
        engine = session.get_bind()
    if engine.dialect.name == "postgresql":  # nobody tells SQLite to gather statistics, but PostgreSQL does by itself
        with database.write() as session:
            session.execute(text("ANALYZE"))
    asked = []
    event.listen(engine, "before_cursor_execute", lambda *given: asked.append(given[2:4]))
    assert webhooks.take_due(database, 10) == []
    questions = [(question, values) for question, values in asked if question.startswith("SELECT")]
    explain = "EXPLAIN " if engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    with engine.connect() as connection:
        plans = [str(connection.exec_driver_sql(explain + question, values).all()) for question, values in questions]
    assert len(plans) == 3
    for plan, index in zip(plans, ("jobs_to_tell", "webhooks_of_sweeps", "webhooks_by_turn"), strict=True):
        assert index in plan
    assert "jobs_unfinished_in_sweep" in plans[1]
