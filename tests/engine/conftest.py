"""What several tests of the engine start from."""

import pytest


@pytest.fixture
def write(tmp_path):
    def write(text, name="experiment.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write
