"""Fuzz tests: seconds in the suite, and with ``make fuzz`` as long as wanted.

In the suite the cases are always the same. ``HYPOTHESIS_PROFILE=fuzz`` draws others in each run,
and many more. The last line of a run says how many cases were tried.
"""

import os
import re
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

_COMMON = settings(
    deadline=None,  # a busy machine would fail
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
settings.register_profile("suite", _COMMON, derandomize=True, max_examples=80)
settings.register_profile("fuzz", _COMMON, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

_CASES = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the cases of a test to the count of the run."""
    if call.when == "call":
        said = getattr(item, "hypothesis_statistics", "")
        found = re.findall(r"(\d+) (?:passing|failing|invalid)", said)
        item.config.stash[_CASES] = item.config.stash.get(_CASES, 0) + sum(map(int, found))
    return (yield)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the number of cases."""
    if count := config.stash.get(_CASES, 0):
        terminalreporter.write_line(f"{count} cases tried")
