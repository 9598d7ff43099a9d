"""Requests that schemathesis makes of /openapi.json: no server error, nothing undescribed.

EARLYFUSION_SCHEMA_CASES sets how many are tried on each route, good and bad ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi import checks
from serve_case import Running, running

CASES = int(os.environ.get("EARLYFUSION_SCHEMA_CASES", "12"))
load_all_checks()
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


def operations(server: Running) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_request_is_answered_as_described(server: Running, mode: GenerationMode) -> None:
    tried = 0
    for operation in operations(server):
        # Any text is a good name in a path, so only bodies can be bad.
        if mode == GenerationMode.NEGATIVE and not operation.body:
            continue

        @settings(
            max_examples=CASES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            nonlocal tried
            tried += 1
            case.call_and_validate(checks=CHECKS, timeout=120)

        ask()
    print(f"{tried:,} requests")
    server.wait_until_idle()
    assert tried >= CASES
