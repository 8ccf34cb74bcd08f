"""A server of nano, and a client of it, one for each file that does not start its own."""

import pytest

from tests.runtime.server.served import serving


@pytest.fixture(scope="module")
def served(nano_engine_bundle):
    with serving(nano_engine_bundle, "--sequences", 4) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    return served.client()
