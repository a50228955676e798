"""Measurement of τ and speed: the same prompts for all decoders, in alternation, with confidence intervals."""

from vsd.evaluation.bench import Contender, Run, bench
from vsd.evaluation.prompts import Prompt, load_prompts
from vsd.evaluation.report import print_details, print_server, print_table, write_json
from vsd.evaluation.served import compare
from vsd.evaluation.serving import connect
from vsd.evaluation.trained import trained_length
from vsd.evaluation.tune import Tuned, best, print_trees, tune

__all__ = [
    "Contender",
    "Prompt",
    "Run",
    "Tuned",
    "bench",
    "best",
    "compare",
    "connect",
    "load_prompts",
    "print_details",
    "print_server",
    "print_table",
    "print_trees",
    "trained_length",
    "tune",
    "write_json",
]
