"""The malformed inputs of the campaign: case i of a seed is made by rule i, counted round."""

from pathlib import Path
from random import Random

import bad_checkpoints
import bad_lines
import bad_options
import bad_servers
from case import Rule, Workshop, complaint

RULES: dict[str, Rule] = {**bad_lines.RULES, **bad_options.RULES, **bad_checkpoints.RULES, **bad_servers.RULES}


def rule_of(number: int) -> str:
    """The rule that makes this case."""
    return list(RULES)[number % len(RULES)]


def attempt(shop: Workshop, folder: Path, seed: int, number: int) -> str:
    """Run a case in an empty folder; what is wrong, or nothing."""
    folder.mkdir(parents=True)
    return complaint(RULES[rule_of(number)](shop, folder, Random(f"{seed} {number}")), folder)
