"""``python -m benchmarks.faults``."""

from tasks.common.cli.process import start

if __name__ == "__main__":
    start("benchmarks.faults.kills:main", prog_name="python -m benchmarks.faults")
