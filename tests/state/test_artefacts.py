"""Records of uploads."""

from concurrent.futures import ThreadPoolExecutor

from curvature_state.artefacts import find_artefact, record_artefact

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
