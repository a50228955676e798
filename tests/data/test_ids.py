"""The map from ids to numbers equals a dictionary, and keeps no id."""

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from vsd.data.ids import IdMap


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 2**63)), max_size=60))
def test_it_equals_a_dictionary(pairs: list[tuple[str, int]]) -> None:
    ours, plain = IdMap(), dict[str, int]()
    for id, number in pairs:
        assert ours.get(id) == plain.get(id)
        ours[id] = plain[id] = number
    assert len(ours) == len(plain)
    assert all(id in ours and ours.get(id) == number for id, number in plain.items())
    assert "never" not in ours


def test_it_grows_and_stays_small() -> None:
    tracemalloc.start()
    ours = IdMap()
    for i in range(20_000):
        ours[f"{'a long id ' * 20}{i}"] = i
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 60 * 20_000
    assert [ours.get(f"{'a long id ' * 20}{i}") for i in range(20_001)] == [*range(20_000), None]
