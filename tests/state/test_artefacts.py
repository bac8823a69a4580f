"""Records of uploads."""

from concurrent.futures import ThreadPoolExecutor

from curvature_protocol.names import artefact_key
from curvature_state import Database, ObjectStore
from curvature_state.artefacts import announce_artefact, find_artefact, judge_artefact, record_artefact

SHA = "c" * 64


def test_a_recorded_upload_is_found(database):
    recorded = record_artefact(database, "models", SHA, 2**40)
    assert find_artefact(database, "models", SHA) == recorded
    assert recorded.size_bytes == 2**40


def test_a_models_hash_is_no_batchs(database):
    record_artefact(database, "models", SHA, 1)
    assert find_artefact(database, "batches", SHA) is None


def test_recording_twice_keeps_the_first(database):
    first = record_artefact(database, "models", SHA, 1)
    assert record_artefact(database, "models", SHA, 1) == first


def test_recording_at_once_is_no_error(database):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: record_artefact(database, "models", SHA, 1), range(8)))
    assert len({artefact.created_at for artefact in found}) == 1


def test_an_announced_upload_is_unverified_until_somebody_hashes_it(database):
    assert announce_artefact(database, "models", SHA, 1)
    assert not find_artefact(database, "models", SHA).verified
    judge_artefact(database, ObjectStore("memory:///"), "models", SHA, right=True)
    assert find_artefact(database, "models", SHA).verified


def test_verified_bytes_make_an_announced_upload_a_verified_one(database):
    announce_artefact(database, "models", SHA, 1)
    assert record_artefact(database, "models", SHA, 1).verified
    assert not announce_artefact(database, "models", SHA, 1)


def test_wrong_bytes_go_with_their_record(database):
    objects = ObjectStore("memory:///")
    objects.put_bytes(artefact_key("models", SHA), b"x")
    announce_artefact(database, "models", SHA, 1)
    judge_artefact(database, objects, "models", SHA, right=False)
    assert find_artefact(database, "models", SHA) is None
    assert objects.head(artefact_key("models", SHA)) is None


def test_a_database_that_is_away_does_not_keep_a_job_from_its_bytes(tmp_path, caplog):
    away = Database(f"sqlite:///{tmp_path}/empty.db")
    judge_artefact(away, ObjectStore("memory:///"), "models", SHA, right=True)
    assert "could not be written down" in caplog.text
    away.close()
