"""The toy problem of this folder as a fixture: tests are imported one by one, so the module is loaded here."""

import importlib.util
import pathlib
import sys

import pytest


@pytest.fixture(scope="session")
def toy():
    """The module toy.py."""
    path = pathlib.Path(__file__).with_name("toy.py")
    spec = importlib.util.spec_from_file_location("train_toy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
