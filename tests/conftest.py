"""Fixtures shared by all tests.

Tiny models are fastest on one thread; tests on the real one ask for more.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes tests start

import pytest
from transformers import PreTrainedTokenizerFast

import tiny
from vsd.targets.target import Target


def pytest_collection() -> None:
    """Imports leave no garbage behind."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Collections of garbage, of which every training asks for one, pass over all that is imported by now."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_target() -> Target:
    return tiny.tiny_target()
