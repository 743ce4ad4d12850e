"""``python -m benchmarks`` with the audited adapter: the driver that the bench starts and kills."""

from benchmarks.cli import cli
from benchmarks.faults.audit import audited

if __name__ == "__main__":
    cli.main(obj=audited())
