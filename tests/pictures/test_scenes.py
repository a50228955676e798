"""Scenes: a function of the seed, and their words are true of their pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsd.pictures import SIDE, Scene, Thing, caption, questions, render, scene
from vsd.pictures.scenes import COLOURS, COLUMNS, MOST, ROWS

SEEDS = st.integers(0, 2**40)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_seed_gives_one_scene(seed: int) -> None:
    assert scene(seed) == scene(seed) != scene(seed + 1)
    assert render(scene(seed)).tobytes() == render(scene(seed)).tobytes()
    assert render(scene(seed)).size == (SIDE, SIDE)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_the_named_place_has_the_named_colour(seed: int) -> None:
    one = scene(seed)
    bare = pixels(Scene((), one.ground, one.pattern, one.shades, one.period))
    seen = pixels(one)
    changed = np.abs(seen - bare).sum(-1) > 0
    for row in range(3):
        for column in range(3):
            cell = slice(row * SIDE // 3, (row + 1) * SIDE // 3), slice(column * SIDE // 3, (column + 1) * SIDE // 3)
            here = [thing for thing in one.things if thing.place == f"{ROWS[row]} {COLUMNS[column]}"]
            share = changed[cell].mean()
            if not here:
                assert share < 0.03  # the margin of a neighbour
                continue
            assert share > 0.04
            assert dominant(seen[cell][changed[cell]], here[0]) == here[0].colour


def pixels(one: Scene) -> np.ndarray:
    return np.asarray(render(one)).astype(float)


def dominant(drawn: np.ndarray, thing: Thing) -> str:
    """The name of the colour that most of the drawn pixels [n, 3] are nearest to."""
    names = list(COLOURS)
    distances = np.stack([np.abs(drawn - COLOURS[name]).sum(-1) for name in names])
    near = distances.min(0) < 45  # without the blended pixels of edges
    return names[np.bincount(distances.argmin(0)[near], minlength=len(names)).argmax()]


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_answers_have_their_facts_and_no_alternative(seed: int) -> None:
    one = scene(seed)
    told = caption(one)
    assert 1 <= len(one.things) <= MOST
    assert told.count(" at ") == len(one.things) and f"{one.pattern} {one.ground} background" in told
    assert [place(thing) for thing in one.things] == sorted({place(thing) for thing in one.things})
    for question in questions(one):
        words = set(question.answer.lower().strip(".").split())
        assert words.issuperset(question.facts) and words.isdisjoint(question.wrong)
        assert all(fact in told for fact in question.facts)


def place(thing: Thing) -> int:
    return 3 * thing.row + thing.column


@pytest.mark.parametrize("least", range(1, 10))
def test_crowded_scenes_have_as_many_things_as_asked(least: int) -> None:
    assert all(least <= len(scene(seed, least, 9).things) <= 9 for seed in range(20))


def test_only_things_with_a_name_of_their_own_are_asked_for_colour_and_place() -> None:
    twins = next(s for s in map(scene, range(10_000)) if len({thing.noun for thing in s.things}) < len(s.things) == 2)
    assert {question.about for question in questions(twins)} == {"count", "ground", "object"}
