"""``python -m benchmarks``. Worker processes import this file too, hence the guard."""

from tasks.common.cli.process import start

if __name__ == "__main__":
    start("benchmarks.cli:cli", prog_name="python -m benchmarks")
