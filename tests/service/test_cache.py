"""Requests answered from what was computed before; a worker's part is played by hand."""

import pytest
from tests.service.planting import build_manifest, request_body, safetensors_file, sha256
from tests.state.holders import hold

from curvature_protocol.jobs import Job
from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest
from curvature_service.extensions.service import built_in_catalogue
from curvature_state import endings
from curvature_state.cache import LoadedModel, cache_keys, record_digest
from curvature_state.endings import Success

pytestmark = pytest.mark.integration


def submit(client, **changes):
    reply = client.post("/v1/jobs", json=request_body(client, **changes))
    assert reply.status_code == 201, reply.text
    return Job.model_validate_json(reply.content)


def compute(server, job):
    """Finish a job of one extension as a worker would, and let others have the result; returns the file."""
    database, objects, catalogue = server.resources.database, server.resources.objects, built_in_catalogue()
    model = LoadedModel(job.request["model"], job.request["eval"], catalogue.engine_version)
    record_digest(database, model, sha256(b"the model"))
    ((label, key),) = cache_keys(job.request, catalogue, sha256(b"the model"), "cpu").items()
    held = hold(database, job.id)
    file, start = safetensors_file(list(range(10)))
    objects.put_bytes(result_key(job.id, held.attempt, f"{label}.safetensors"), file)
    manifest = build_manifest(job.id, held.attempt, label, start, len(file))
    objects.put_bytes(result_key(job.id, held.attempt, "manifest.json"), manifest.model_dump_json().encode())
    assert endings.succeed(database, job.id, held.attempt, Success([], len(file), cached={key: label}))
    return file


def test_asking_again_is_answered_at_once_and_says_so(server, client):
    first = submit(client)
    file = compute(server, first)
    again = submit(client)
    assert (again.status, again.attempt) == ("succeeded", 1)
    manifest = Manifest.model_validate_json(client.get(f"/v1/jobs/{again.id}/result").content)
    (group,) = manifest.groups
    assert manifest.job_id == again.id
    assert group.tensors[0].provenance.cached_from == first.id
    assert client.get(f"/v1/jobs/{again.id}/result/variance.safetensors").content == file


def test_another_label_is_no_other_quantity(server, client):
    file = compute(server, submit(client))
    again = submit(client, extensions=[{"name": "variance", "label": "v"}])
    assert again.status == "succeeded"
    assert client.get(f"/v1/jobs/{again.id}/result/v.safetensors").content == file


def test_an_option_at_its_default_is_no_other_quantity(server, client):
    compute(server, submit(client))
    assert submit(client, extensions=[{"name": "variance", "options": {"scale": "loss"}}]).status == "succeeded"


def test_the_seed_matters_only_where_numbers_are_drawn(server, client):
    compute(server, submit(client))
    assert submit(client, seed=7).status == "succeeded"
    compute(server, submit(client, extensions=["diag_ggn_mc"]))
    assert submit(client, extensions=["diag_ggn_mc"]).status == "succeeded"
    assert submit(client, extensions=["diag_ggn_mc"], seed=7).status == "queued"
    compute(server, submit(client, extensions=["saliency"]))
    assert submit(client, extensions=["saliency"], seed=7).status == "succeeded"
    drawn = {"name": "saliency", "options": {"diagonal": "mc"}}
    assert submit(client, extensions=[drawn]).status == "queued"


@pytest.mark.parametrize(
    "changes",
    [
        {"reduction": "sum"},
        {"loss": "cross_entropy"},
        {"parameters": "all"},
        {"eval": False},
        {"extensions": [{"name": "variance", "options": {"scale": "sample"}}]},
        {"extensions": ["variance", "grad"]},
        {"verify": True},
        {"precision": "bf16"},
        {"precision": "tf32", "requires": {"gpu": True}},
        {"channels_last": True},
        {"cache": False},
        {"requires": {"gpu": True}},
    ],
    ids=str,
)
def test_what_differs_is_computed(server, client, changes):
    compute(server, submit(client))
    assert submit(client, **changes).status == "queued"


def test_each_precision_and_layout_has_a_key_of_its_own_and_the_defaults_that_of_old(server, client):
    request = submit(client).request
    asked = [{}, {"precision": "bf16"}, {"precision": "tf32"}, {"channels_last": True}]
    asked += [{"precision": "bf16", "channels_last": True}]
    keys = [cache_keys({**request, **each}, built_in_catalogue(), "the model", "cuda")["variance"] for each in asked]
    assert len(set(keys)) == len(asked)
    before = {name: value for name, value in request.items() if name not in ("precision", "channels_last")}
    assert cache_keys(before, built_in_catalogue(), "the model", "cuda")["variance"] == keys[0]


def test_another_package_of_rules_is_another_number(server, client):
    request = submit(client).request
    catalogue = built_in_catalogue()
    other = catalogue.model_copy(update={"rules": ("alpha 1.0",)})
    found = [cache_keys(request, known, "the model", "cpu")["variance"] for known in (catalogue, other)]
    assert len(set(found)) == 2


def test_a_result_that_was_removed_is_computed_again(server, client):
    first = submit(client)
    compute(server, first)
    for key in server.stored():
        if key.startswith("results/"):
            server.resources.objects.delete(key)
    assert submit(client).status == "queued"
