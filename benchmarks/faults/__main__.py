"""The command ``python -m benchmarks.faults``; see `benchmarks.faults.kills`."""

from benchmarks.faults.kills import main

main()
