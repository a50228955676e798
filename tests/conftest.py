"""Fixtures shared by all tests."""

import pytest
from transformers import PreTrainedTokenizerFast

import tiny
from vsd.targets.target import Target


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_target() -> Target:
    return tiny.tiny_target()
