"""Fixtures shared by all tests.

Tiny models are fastest on one thread; tests on the real one ask for more. Tests see no GPU, unless VSD_TEST_DEVICE is
cuda: commands and models whose device is not named are then on the first one.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes tests start
if os.environ.get("VSD_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from transformers import PreTrainedTokenizerFast

import tiny
from vsd.targets.target import Target


def pytest_collection() -> None:
    """Imports leave no garbage behind."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of minutes come first, so that no worker is left alone with one."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


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
