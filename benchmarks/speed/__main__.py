"""``python -m benchmarks.speed``. The process that measures memory imports this file too: nothing outside the guard."""

if __name__ == "__main__":
    from benchmarks.speed.cli import main

    main(prog_name="python -m benchmarks.speed")
