"""What a check found, and checks that survive the failure of what they check."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: its name.
        state: ``note`` is worth knowing, ``problem`` hinders a run.
        text: what was found, for people.
        fix: what to do about it, a command where there is one.
        data: the same for programs.
    """

    check: str
    state: State
    text: str
    fix: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


def guarded(check: str, examine: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run a check; whatever it raises is a finding too, behind those before it."""
    found: list[Finding] = []
    try:
        found.extend(examine())
    except Exception as error:  # noqa: BLE001 a broken machine is what is examined
        found.append(Finding(check, "problem", f"{check} cannot be examined: {type(error).__name__}: {error}"))
    return found


def size_text(size: float) -> str:
    """Return bytes for people: ``1.6 GB`` (of 10⁹)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.exists()), path)
