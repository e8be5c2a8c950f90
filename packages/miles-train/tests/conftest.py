"""One tiny model for all tests of the trainer."""

from importlib import import_module

import pytest


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory):
    """Return the directory of a random two-layer Qwen3."""
    directory = str(tmp_path_factory.mktemp("tiny-model"))
    import_module("packages.miles-train.tests.tiny_trainer").save_model(directory)
    return directory
