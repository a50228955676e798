"""Values of options: YAML, types, and descriptions from docstrings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from vsd.errors import ConfigurationError
from vsd.options.values import checked, described, documented, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-1", 0.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("10", 10),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("2026-01-01", "2026-01-01"),
        ("{a: 1e-3, b: [1, 2.0]}", {"a": 0.001, "b": [1, 2.0]}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = read_yaml(text, "text")
    assert read == value and type(read) is type(value)


def test_text_that_is_not_yaml() -> None:
    with pytest.raises(ConfigurationError, match=r"^recipe\.yaml is not YAML") as caught:
        read_yaml("a: [1", "recipe.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "value", "meant"),
    [
        (float, "5e-1", 0.5),
        (float, 1, 1.0),
        (int, 1000.0, 1000),
        (bool, "no", False),
        (bool, True, True),
        (str, "no", "no"),
        (float | None, None, None),
        (list[str], "a", ["a"]),
        (str | list[str], "a", "a"),
        (str | list[str], ["a", "b"], ["a", "b"]),
        (dict[str, Any], {"a": 0.5}, {"a": 0.5}),
        (Literal["a", "b"], "b", "b"),
    ],
)
def test_values_that_fit(kind: Any, value: object, meant: object) -> None:
    found = checked("name", kind, value)
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (int, 2.5, "anchors must be an integer, not 2.5"),
        (int, True, "anchors must be an integer, not True"),
        (int, None, "anchors must be an integer, not None"),
        (float, "fast", "anchors must be a number, not 'fast'"),
        (float, True, "anchors must be a number, not True"),
        (float | None, "x", "anchors must be a number or null, not 'x'"),
        (bool, "maybe", "anchors must be true or false, not 'maybe'"),
        (bool, 1, "anchors must be true or false, not 1"),
        (str, 5, "anchors must be a string, not 5"),
        (list[str], [1], "anchors must be a list, not [1]"),
        (dict[str, Any], 3, "anchors must be a mapping {name: value}, not 3"),
        (Literal["a", "b", "c"], "d", "anchors must be a, b or c, not 'd'"),
    ],
)
def test_values_that_do_not_fit(kind: Any, value: object, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        checked("anchors", kind, value)
    assert str(caught.value) == message


def test_types_in_words() -> None:
    assert described(Path) == "a path"
    assert described(Literal["a"] | None) == "a or null"


@dataclass
class Base:
    """base

    Attributes:
        one: the first
            of two lines
    """

    one: int = 1


@dataclass
class Derived(Base):
    """derived

    Attributes:
        two: the second
    """

    two: int = 2


def test_docstrings_of_base_classes_count() -> None:
    assert documented(Derived) == ("derived", {"one": "the first of two lines", "two": "the second"})


def test_docstrings_of_functions() -> None:
    def build(a: int = 1) -> None:
        """Build.

        Args:
            a: a number

        Raises:
            ValueError: never.
        """

    assert documented(build) == ("Build.", {"a": "a number"})
