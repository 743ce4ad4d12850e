"""``python -m benchmarks.speed``; the process that measures memory imports this file too."""

if __name__ == "__main__":
    from benchmarks.speed.command import main

    main(prog_name="python -m benchmarks.speed")
