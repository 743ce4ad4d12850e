"""Try random input until the time is over, and count the cases.

python scripts/fuzz.py --minutes 10
"""

import os
import re
import subprocess
import sys
import time

import click

_COMMAND = (sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider")


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="Time; the last round is ended.")
@click.argument("tests", nargs=-1)
def main(minutes: float, tests: tuple[str, ...]) -> None:
    """Run the fuzz tests (TESTS, or all of them) again and again; stop at a case that fails."""
    end, cases = time.monotonic() + 60 * minutes, 0
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "fuzz"}
    while time.monotonic() < end:
        command = [*_COMMAND, *(tests or ["tests/fuzz"])]
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        cases += sum(map(int, re.findall(r"^(\d+) cases tried$", run.stdout, re.MULTILINE)))
        if run.returncode:
            click.echo(run.stdout)
        click.echo(f"{cases:,} cases")
        if run.returncode:
            sys.exit(1)


if __name__ == "__main__":
    main()
