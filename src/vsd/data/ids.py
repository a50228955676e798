"""A map from ids to numbers for millions of ids: it keeps eight bytes of each id's hash, not the id.

Open addressing in two flat arrays, at most two thirds full: 24 to 48 bytes an id. Two of a million ids share their hash
with a probability of 3e-8.
"""

import hashlib
from array import array

_SLOTS = 1 << 10  # at the start; a power of two


class IdMap:
    """Numbers by id; an id cannot be removed."""

    def __init__(self) -> None:
        self._keys, self._numbers = _empty(_SLOTS), _empty(_SLOTS)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, id: str) -> bool:
        return self.get(id) is not None

    def __setitem__(self, id: str, number: int) -> None:
        key = _hash(id)
        slot = self._slot(key)
        self._count += self._keys[slot] == 0
        self._keys[slot], self._numbers[slot] = key, number
        if 3 * self._count > 2 * len(self._keys):
            self._grow()

    def get(self, id: str) -> int | None:
        """The number of an id; None for an id without one."""
        slot = self._slot(_hash(id))
        return self._numbers[slot] if self._keys[slot] else None

    def _slot(self, key: int) -> int:
        """Where a key is, or belongs: the first slot from its own on that holds it or is free (0)."""
        last = len(self._keys) - 1
        slot = key & last
        while self._keys[slot] not in (0, key):
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        keys, numbers = self._keys, self._numbers
        self._keys, self._numbers = _empty(2 * len(keys)), _empty(2 * len(keys))
        for key, number in zip(keys, numbers, strict=True):
            if key:
                slot = self._slot(key)
                self._keys[slot], self._numbers[slot] = key, number


def _empty(slots: int) -> "array[int]":
    return array("Q", bytes(8 * slots))


def _hash(id: str) -> int:
    """Eight bytes of a hash; never 0, which marks a free slot."""
    return int.from_bytes(hashlib.blake2b(id.encode(errors="surrogatepass"), digest_size=8).digest(), "big") or 1
