"""What the store has and no record names."""

import os
import time

import pytest
from tests.state.stocks import DAY, Stock

from curvature_protocol.names import admitted_key, artefact_key, result_key
from curvature_state.retention import Line, Report
from curvature_state.tables import ResultUseRow
from curvature_state.tidying import tidy


@pytest.fixture
def stock(database, objects):
    return Stock(database, objects)


@pytest.fixture
def plant(objects):
    def store(key, age_seconds=2 * DAY):
        objects.put_bytes(key, b"four")
        os.utime(objects.local_path(key), (time.time() - age_seconds,) * 2)
        return key

    return store


def run(stock, **options):
    before = stock.stored()
    foreseen = tidy(stock.database, stock.objects, dry_run=True, **options)
    assert stock.stored() == before
    assert tidy(stock.database, stock.objects, **options) == foreseen
    assert tidy(stock.database, stock.objects, **options) == Report()
    return foreseen


def test_admitted_forms_of_uploads_that_are_gone_go(stock, plant):
    model, loss = stock.upload("m"), stock.upload("l", "losses")
    kept = [plant(admitted_key(sha256, "0")) for _, sha256 in (model, loss)]
    plant(admitted_key("0" * 64, "1"))
    kept.append(plant(admitted_key("1" * 64, "1"), age_seconds=DAY / 2))
    assert run(stock) == Report((Line("files", "admitted, of uploads that are gone", 1, 4),))
    assert set(kept) <= set(stock.stored("admitted"))


def test_what_attempts_left_goes(stock, plant):
    job_id = stock.result()
    plant(result_key(job_id, 0, "grad.safetensors"))
    assert run(stock) == Report((Line("files", "of attempts that came to nothing", 1, 4),))
    assert stock.has_files(job_id)


def test_what_has_no_record_goes_only_when_asked_for(stock, plant):
    named = stock.upload("m")
    plant(artefact_key("models", "0" * 64))
    plant(artefact_key("batches", named[1]))
    plant(result_key("0" * 32, 1, "manifest.json"))
    plant(result_key("0" * 32, 1, "grad.safetensors"))
    assert run(stock) == Report()
    why = "no record names them"
    lines = (Line("batches", why, 1, 4), Line("models", why, 1, 4), Line("results", why, 1, 8))
    assert run(stock, orphans=True) == Report(lines)
    assert stock.stored("models") == [artefact_key(*named)]
    assert stock.stored("results") == stock.stored("batches") == []


def test_files_that_results_still_use_are_no_orphans(stock, plant):
    source = "0" * 32
    plant(result_key(source, 1, "grad.safetensors"))
    user = stock.result()
    with stock.database.write() as session:
        session.add(ResultUseRow(job_id=user, source_id=source))
    assert run(stock, orphans=True) == Report()


def test_what_came_within_the_day_is_no_orphan(stock, plant):
    plant(artefact_key("models", "0" * 64), age_seconds=DAY / 2)
    plant(result_key("0" * 32, 1, "old.safetensors"))
    plant(result_key("0" * 32, 2, "young.safetensors"), age_seconds=DAY / 2)
    assert run(stock, orphans=True) == Report()
