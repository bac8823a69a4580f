"""The API document is whole and valid, and its examples are true; the documentation page needs nothing else."""

import json
import re

import jsonschema
import pytest

from curvature_protocol.requests import JobRequest
from curvature_service import ServiceSettings, create_app, examples
from curvature_service.extensions.service import built_in_catalogue, check_request

DOCUMENT = create_app(ServiceSettings()).openapi()
OPERATIONS = [
    pytest.param(path, verb, operation, id=f"{verb.upper()} {path}")
    for path, verbs in DOCUMENT["paths"].items()
    for verb, operation in verbs.items()
]
OPEN = {"/v1/health", "/v1/ready"}


def media(found):
    """(schema, example) of each content below `found`, at any depth."""
    if isinstance(found, list):
        for item in found:
            yield from media(item)
    if isinstance(found, dict):
        for content in found.get("content", {}).values() if isinstance(found.get("content"), dict) else ():
            cases = [case["value"] for case in content.get("examples", {}).values()]
            for example in [*cases, *([content["example"]] if "example" in content else [])]:
                yield content.get("schema"), example
        for value in found.values():
            yield from media(value)


def references(found):
    if isinstance(found, dict):
        yield from [found["$ref"]] if isinstance(found.get("$ref"), str) else []
        for value in found.values():
            yield from references(value)
    elif isinstance(found, list):
        for value in found:
            yield from references(value)


def test_the_issues_endpoints_are_there():
    kinds = ("models", "batches", "losses")
    wanted = {
        *(f"{verb} /v1/{kind}/{{sha256}}" for verb in ("put", "head", "get") for kind in kinds),
        *(f"{verb} /v1/{kind}/{{sha256}}/content" for verb in ("head", "get") for kind in kinds),
        "post /v1/uploads",
        "get /v1/uploads/{upload_id}",
        "delete /v1/uploads/{upload_id}",
        "put /v1/uploads/{upload_id}/parts/{number}",
        "post /v1/uploads/{upload_id}/parts/{number}",
        "post /v1/uploads/{upload_id}/complete",
        *(f"delete /v1/{kind}/{{sha256}}" for kind in kinds),
        *(f"{verb} /v1/{kind}/{{sha256}}/pin" for verb in ("put", "delete") for kind in kinds),
        "delete /v1/jobs/{job_id}",
        "delete /v1/sweeps/{sweep_id}",
        "put /v1/jobs/{job_id}/pin",
        "delete /v1/jobs/{job_id}/pin",
        "post /v1/plans",
        "get /v1/plans/{job_id}",
        "post /v1/jobs",
        "get /v1/jobs",
        "get /v1/jobs/{job_id}",
        "post /v1/jobs/{job_id}/cancel",
        "post /v1/jobs/{job_id}/retry",
        "get /v1/jobs/{job_id}/events",
        "get /v1/jobs/{job_id}/result",
        "get /v1/jobs/{job_id}/result/{label}.safetensors",
        "head /v1/jobs/{job_id}/result/{label}.safetensors",
        "post /v1/sweeps",
        "get /v1/sweeps",
        "get /v1/sweeps/{sweep_id}",
        *(f"get /v1/sweeps/{{sweep_id}}/{what}" for what in ("rows", "states", "events")),
        *(f"post /v1/sweeps/{{sweep_id}}/{what}" for what in ("cancel", "retry")),
        "get /v1/extensions",
        "get /v1/health",
        "get /v1/ready",
    }
    assert {f"{verb} {path}" for path, verbs in DOCUMENT["paths"].items() for verb in verbs} == wanted


def test_every_reference_leads_somewhere():
    names = {ref.removeprefix("#/components/schemas/") for ref in references(DOCUMENT)}
    assert names <= set(DOCUMENT["components"]["schemas"])
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_names_of_components_and_operations_are_valid_and_unique():
    for kind in DOCUMENT["components"].values():
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in kind)
    ids = [operation["operationId"] for _, _, operation in (p.values for p in OPERATIONS)]
    assert len(set(ids)) == len(ids)


def test_the_document_is_of_openapi_3_1_and_says_what_the_api_is():
    assert DOCUMENT["openapi"].startswith("3.1")
    assert DOCUMENT["info"]["version"]
    assert {tag["name"] for tag in DOCUMENT["tags"]} == {
        tag for _, _, operation in (p.values for p in OPERATIONS) for tag in operation["tags"]
    }


@pytest.mark.parametrize(("path", "verb", "operation"), OPERATIONS)
def test_an_operation_is_described_with_parameters_answers_and_errors(path, verb, operation):
    assert operation["summary"]
    assert operation["description"]
    declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
    assert declared == set(re.findall(r"{(\w+)}", path))
    if path in OPEN:
        return
    assert operation["security"] == [{"api_key": []}]
    errors = {int(status): answer for status, answer in operation["responses"].items() if int(status) >= 400}
    assert {401, 422, 500, 503} <= set(errors)
    for status, answer in errors.items():
        (content,) = answer["content"].items()
        assert content[0] == "application/problem+json"
        assert content[1]["example"]["status"] == status


@pytest.mark.parametrize(("path", "verb", "operation"), OPERATIONS)
def test_every_json_body_and_answer_has_an_example_that_fits_its_schema(path, verb, operation):
    for answer in [*operation["responses"].values(), operation.get("requestBody", {})]:
        for content_type, content in answer.get("content", {}).items():
            if "json" in content_type and verb != "head":
                assert "example" in content or "examples" in content
                assert content["schema"]
    for schema, example in media(operation):
        if schema is not None and not isinstance(example, str):
            whole = {**schema, "components": DOCUMENT["components"]}
            jsonschema.Draft202012Validator(whole).validate(example)


@pytest.mark.parametrize("name", sorted(examples.JOB_REQUESTS))
def test_the_example_requests_are_accepted(name):
    check_request(built_in_catalogue(), JobRequest.model_validate(examples.JOB_REQUESTS[name]["value"]))


def test_examples_of_errors_have_their_own_code():
    assert all(problem["code"] == code for code, problem in examples.PROBLEMS.items())


@pytest.mark.integration
def test_the_document_is_served(server):
    assert server.client.get("/openapi.json").json() == json.loads(json.dumps(DOCUMENT))


@pytest.mark.integration
def test_the_documentation_page_loads_nothing_from_elsewhere(server):
    reply = server.client.get("/docs")
    assert reply.headers["content-type"].startswith("text/html")
    assert re.findall(r"""(?:src|href)=|https?://|@import|url\(""", reply.text) == []
    assert "fetch('openapi.json')" in reply.text
