"""``python -m benchmarks.speed``."""

from tasks.common.cli.process import start

if __name__ == "__main__":
    start("benchmarks.speed.command:main", prog_name="python -m benchmarks.speed")
