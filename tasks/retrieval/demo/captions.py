"""Captions of digit scenes: which digit is where, in one of four forms."""

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
    """The fact of a cell with a digit; that of an empty cell is 0."""
    return 1 + 2 * digit + large


def write_caption(facts: Sequence[int], order: Sequence[int], form: int) -> str:
    """Write the caption of a scene by the facts of its four cells, told in this order and form.

    Empty cells are passed over. Different facts give different captions, whatever order and form.
    """
    item, separator, last = _FORMS[form]
    items = []
    for cell in order:
        if facts[cell]:
            digit, size = divmod(facts[cell] - 1, 2)
            items.append(item.format(size=SIZE_WORDS[size], digit=DIGIT_WORDS[digit], place=PLACE_WORDS[cell]))
    return last.join([separator.join(items[:-1]), items[-1]] if items[1:] else items)
