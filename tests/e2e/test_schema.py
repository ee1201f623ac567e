"""Requests generated from the server's OpenAPI document cause no internal error, and responses are as documented."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.conftest import ServerProcess

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
NUM_CASES, NUM_CASES_OF_ALL = 25, 100
OPERATIONS = (
    "DELETE /v1/responses/{response_id}",
    "GET /get_model_info",
    "GET /get_server_info",
    "GET /health",
    "GET /health_generate",
    "GET /live",
    "GET /metrics",
    "GET /model_info",
    "GET /ready",
    "GET /server_info",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "GET /v1/responses/{response_id}",
    "POST /abort_request",
    "POST /detokenize",
    "POST /flush_cache",
    "POST /load_lora_adapter",
    "POST /parse_function_call",
    "POST /separate_reasoning",
    "POST /tokenize",
    "POST /unload_lora_adapter",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/detokenize",
    "POST /v1/load_lora_adapter",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/responses",
    "POST /v1/responses/{response_id}/cancel",
    "POST /v1/tokenize",
    "POST /v1/unload_lora_adapter",
)


@pytest.fixture(scope="module")
def schema(server: ServerProcess) -> schemathesis.BaseSchema:
    # The document describes its own route as text.
    return schemathesis.openapi.from_url(f"{server.url}/schema/openapi.json").exclude(path_regex="^/schema")


def test_every_operation_is_listed(schema: schemathesis.BaseSchema) -> None:
    assert sorted(result.ok().label for result in schema.get_all_operations()) == list(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_operation(
    schema: schemathesis.BaseSchema, label: str, mode: GenerationMode, pytestconfig: pytest.Config
) -> None:
    method, path = label.split()
    operation = schema[path][method]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("it takes no body")
    num_cases = NUM_CASES_OF_ALL if pytestconfig.getoption("--all") else NUM_CASES

    @settings(
        # Half of an operation's cases are valid bodies and half are not; without a body there is one kind.
        max_examples=num_cases if operation.body else 2 * num_cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        for limit in ("max_tokens", "max_output_tokens"):
            if isinstance(case.body, dict) and case.body.get(limit) is None:
                case.body[limit] = 4
        case.call_and_validate(checks=CHECKS, timeout=30)

    check()
