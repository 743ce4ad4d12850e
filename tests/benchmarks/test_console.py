"""Sizes, durations and cells of tables as text."""

import io

import pandas as pd
import pytest

from benchmarks.console import csv_cell, csv_value, duration, markdown_cell, size_text
from benchmarks.results.scores import csv_text


def test_sizes_are_for_people() -> None:
    sizes = (1.5e12, 9_014_226_944, 2.5e6, 900)
    assert [size_text(size) for size in sizes] == ["1.5 TB", "9.0 GB", "2.5 MB", "1 kB"]


def test_durations_are_for_people() -> None:
    short = [duration(seconds) for seconds in (0.0003, 0.052, 4.26, 9.97, 24.2)]
    assert short == ["0 s", "0.05 s", "4.3 s", "10 s", "24 s"]
    assert [duration(seconds) for seconds in (360, 7500)] == ["6 min", "2 h 05 min"]


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "＝1", "'", "'=1", "'x", "x=1", "", "–"]
)
def test_no_text_of_a_csv_file_is_a_formula_and_reading_gives_it_back(text: str) -> None:
    cell = csv_cell(text)
    assert isinstance(cell, str)
    assert cell[:1] not in tuple("=+-@\t\r＝")
    assert csv_value(cell) == text


def test_numbers_of_a_csv_file_stay_numbers() -> None:
    table = pd.DataFrame({"name": ["=a", "b"], "value": [-1.5, 2.0], "n": [-1, 3]})
    text = csv_text(table)
    assert text == "name,value,n\n'=a,-1.5000,-1\nb,2.0000,3\n"
    read = pd.read_csv(io.StringIO(text)).map(csv_value)
    pd.testing.assert_frame_equal(read, table)


def test_a_cell_of_a_markdown_table_stays_in_its_cell() -> None:
    assert markdown_cell("a|b\n| c \x1b") == r"a\|b \| c \x1b"
