"""Types of options that are numbers: finite, and between bounds that work on a machine."""

import math
from typing import Any

import click
from pydantic.fields import FieldInfo

#: Largest whole number of an option that has no smaller bound.
MOST = 2**31 - 1


class FiniteRange(click.FloatRange):
    """Finite number in a range; click itself takes NaN for a number in any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


COUNT = click.IntRange(1, MOST)  #: number of things
COUNT_OR_NONE = click.IntRange(0, MOST)  #: number of things, or 0
THREADS = click.IntRange(1, 1024)  #: threads of a process
PROCESSES = click.IntRange(0, 1024)  #: helping processes of a process
SECONDS = FiniteRange(0, 1e9)  #: time


def of_field(field: FieldInfo, kind: type) -> click.ParamType:
    """Return the type of an option for a field of numbers (``kind``: int or float)."""
    limits = {
        name: getattr(limit, name)
        for limit in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(limit, name)
    }
    if kind is int:
        return click.IntRange(limits.get("ge", 0), limits.get("le", MOST))
    low, high = limits.get("ge", limits.get("gt", 0.0)), limits.get("le", limits.get("lt", 1e30))
    return FiniteRange(low, high, min_open="gt" in limits, max_open="lt" in limits)
