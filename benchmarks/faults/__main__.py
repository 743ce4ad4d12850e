"""See `benchmarks.faults.kills`."""

from benchmarks.faults.kills import main

main()
