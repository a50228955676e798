"""Draft trees as arguments of the benchmarks."""

import argparse

from vsd.errors import ConfigurationError
from vsd.paths import TreeShape


def tree(text: str) -> TreeShape:
    """Read depth x top_k x nodes [x p_min [x lookup]] for argparse, which reports a mistake in one line.

    Raises:
        ArgumentTypeError: another form, or a size that no tree has.
    """
    try:
        return TreeShape.parse(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
