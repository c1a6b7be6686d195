"""Fixtures of the hostile and of the broken: what makes them, in a test's own folder."""

from pathlib import Path

import pytest

from tests.security.hostile import Maker


@pytest.fixture
def maker(workdir: Path, tiny_model: Path, tiny_data: dict[str, str]) -> Maker:
    return Maker(workdir, tiny_model, tiny_data)
