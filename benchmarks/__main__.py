"""``python -m benchmarks``. Worker processes import this file too, hence the guard."""

if __name__ == "__main__":
    from benchmarks.cli import cli

    cli(prog_name="python -m benchmarks")
