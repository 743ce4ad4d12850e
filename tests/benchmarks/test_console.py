"""Sizes and durations as text."""

from benchmarks.console import duration, size_text


def test_sizes_are_for_people() -> None:
    sizes = (1.5e12, 9_014_226_944, 2.5e6, 900)
    assert [size_text(size) for size in sizes] == ["1.5 TB", "9.0 GB", "2.5 MB", "1 kB"]


def test_durations_are_for_people() -> None:
    short = [duration(seconds) for seconds in (0.0003, 0.052, 4.26, 9.97, 24.2)]
    assert short == ["0 s", "0.05 s", "4.3 s", "10 s", "24 s"]
    assert [duration(seconds) for seconds in (360, 7500)] == ["6 min", "2 h 05 min"]
