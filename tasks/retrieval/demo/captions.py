"""Captions of digit scenes: what is where, in one of four forms.

Cells are numbered row by row. A cell's fact is 0 if the cell is empty, else ``1 + 2 * digit + large``.
"""

from __future__ import annotations

from collections.abc import Sequence

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE_WORDS = ("small", "large")
PLACE_WORDS = ("top left", "top right", "bottom left", "bottom right")
NUM_FACTS = 1 + 2 * 10

# How one digit is told, what stands between two, and what before the last.
_FORMS = (
    ("a {size} {digit} {place}", ", ", " and "),
    ("{place} a {size} {digit}", ", ", " and "),
    ("{size} {digit} at {place}", ", ", ", "),
    ("{place}: {size} {digit}", "; ", "; "),
)
NUM_FORMS = len(_FORMS)


def fact_of(digit: int, large: int) -> int:
    """Returns the fact of a cell with a digit."""
    return 1 + 2 * digit + large


def write_caption(facts: Sequence[int], order: Sequence[int], form: int) -> str:
    """Writes the caption of a scene; different facts give different captions, whatever order and form.

    Args:
        facts: Fact of each of the four cells; at least one is not empty.
        order: The four cells in the order in which they are told; empty ones are passed over.
        form: Number of the form, less than `NUM_FORMS`.

    Returns:
        The caption.
    """
    item, separator, last_separator = _FORMS[form]
    items = [
        item.format(size=SIZE_WORDS[(facts[cell] - 1) % 2], digit=DIGIT_WORDS[(facts[cell] - 1) // 2], place=PLACE_WORDS[cell])
        for cell in order
        if facts[cell]
    ]
    head = separator.join(items[:-1])
    return head + last_separator + items[-1] if head else items[-1]
