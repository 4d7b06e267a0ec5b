"""What the tests of deploy/ share."""

from __future__ import annotations

import pytest
from progress import Progress


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest) -> Progress:
    return Progress(request.config)
