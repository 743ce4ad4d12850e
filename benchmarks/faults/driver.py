"""``python -m benchmarks``, its cells watched: what the bench starts, kills and starts again."""

from benchmarks.cli import cli
from benchmarks.faults.audit import audited

if __name__ == "__main__":
    cli.main(obj=audited())
