"""Axes: values to pixels, and the round numbers at which ticks stand."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Scale(NamedTuple):
    """A linear map of the values low … high to the pixels start … end."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, zero: bool = False) -> "Scale":
        """The scale of values, with a margin of 4 % on both sides; `zero`: from 0 on."""
        found = list(values)
        low, high = min(found), max(found)
        margin = 0.04 * (high - (0.0 if zero else low)) or 0.05 * abs(high) or 1.0
        return cls(0.0 if zero else low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """At most about `most` multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def brief(value: float) -> str:
    """A number of about three digits: 0.0123, 2.43, 150, 12k."""
    if abs(value) >= 10000:
        return f"{value / 1000:.4g}k"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
