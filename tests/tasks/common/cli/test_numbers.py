"""Options that are numbers: each command refuses senseless values in one line."""

import math
import os
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from benchmarks import cli
from benchmarks.faults import kills
from benchmarks.run import cluster
from benchmarks.speed import command as speed
from tasks.classification import command as classification
from tasks.common.cli.numbers import FiniteRange
from tasks.detection import command as detection
from tasks.retrieval import command as retrieval

COMMANDS = {
    "benchmarks": cli.cli,
    "faults": kills.main,
    "cluster": cluster.main,
    "speed": speed.main,
    "classification": classification.group,
    "detection": detection.group,
    "retrieval": retrieval.group,
}
NUMBERS = (click.types.IntParamType, click.types.FloatParamType)
BAD = ("nan", "inf", "-inf", "1e400", "-1", "9" * 40, "9" * 6000, "")


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Yield the names of all commands without own commands, as a command line gives them."""
    if isinstance(command, click.Group):
        for name, own in command.commands.items():
            yield from leaves(own, (*path, name))
    else:
        yield list(path)


def command_of(name: str, path: list[str]) -> click.Command:
    found = COMMANDS[name]
    for part in path:
        assert isinstance(found, click.Group)
        found = found.commands[part]
    return found


PATHS = [(name, path) for name, command in COMMANDS.items() for path in leaves(command)]
NAMES = ["-".join([name, *path]) for name, path in PATHS]


@pytest.mark.parametrize(("name", "path"), PATHS, ids=NAMES)
def test_each_number_is_finite_and_bounded(name: str, path: list[str]) -> None:
    for option in command_of(name, path).params:
        kinds = option.type.types if isinstance(option.type, click.Tuple) else [option.type]
        for kind in kinds:
            if isinstance(kind, NUMBERS):
                assert isinstance(kind, click.IntRange | FiniteRange), option.name
                assert kind.min is not None, option.name
                assert kind.max is not None, option.name
                assert math.isfinite(kind.max), option.name


@pytest.mark.parametrize(("name", "path"), PATHS, ids=NAMES)
def test_senseless_numbers_are_refused_in_a_line(name: str, path: list[str]) -> None:
    for option in command_of(name, path).params:
        if isinstance(option, click.Option) and isinstance(option.type, (*NUMBERS, click.Tuple)):
            count = len(option.type.types) if isinstance(option.type, click.Tuple) else 1
            for text in BAD:
                flag = option.opts[0]
                values = [f"{flag}={text}"] if count == 1 else [flag, *count * [text]]
                result = CliRunner().invoke(COMMANDS[name], [*path, *values])
                assert result.exit_code == 2, (flag, text[:50], result.output)
                line = result.output.splitlines()[-1]
                assert line.startswith(f"Error: Invalid value for '{flag}'"), line[:200]
                assert "Traceback" not in result.output


def test_a_cluster_is_waited_for_with_sensible_numbers() -> None:
    for values in (["nan", "5"], ["2", "nan"], ["0", "5"], ["2", "1e400"]):
        result = CliRunner().invoke(cluster.main, ["127.0.0.1:1", *values])
        assert result.exit_code == 2
        assert "Error: Invalid value" in result.output
    assert os.environ.get("RAY_AUTH_TOKEN") is None
