"""``python -m benchmarks`` with another adapter, its name first: what the bench starts, kills and starts again."""

import sys

from benchmarks.cli import cli
from benchmarks.faults.audit import audited
from benchmarks.faults.standin import stand_in

if __name__ == "__main__":
    cli.main(sys.argv[2:], obj={"audited": audited, "stand-in": stand_in}[sys.argv[1]]())
