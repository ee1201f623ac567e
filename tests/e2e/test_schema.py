"""Requests made from the server's own OpenAPI document: none is an internal error, and answers are as documented."""

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


def test_every_operation(server: ServerProcess) -> None:
    # The document describes itself as text.
    schema = schemathesis.openapi.from_url(f"{server.url}/schema/openapi.json").exclude(path_regex="^/schema")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/chat/completions", "/v1/completions", "/tokenize"}

    for operation in operations:
        for mode in (
            (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if operation.body else (GenerationMode.POSITIVE,)
        ):

            @settings(
                max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict) and case.body.get("max_tokens") is None:
                    case.body["max_tokens"] = 4
                case.call_and_validate(checks=CHECKS, timeout=30)

            check()
