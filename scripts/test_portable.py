"""Run all tests as on other processors: other instruction sets, other threads, a busy machine.

python scripts/test_portable.py --jobs 2 avx2-1 busy
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import click

_PLAIN = {"ATEN_CPU_CAPABILITY": "default"}
_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
#: Environment variables of each run. PyTorch, oneDNN and MKL each read their own variables.
RUNS = {
    f"{name}-{threads}": {**capability, "OMP_NUM_THREADS": str(threads)}
    for name, capability in {"native": {}, "avx2": _AVX2, "default": _PLAIN}.items()
    for threads in (1, 2)
}
RUNS |= {"sse4": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, "busy": {}}
#: Variables that any run sets; the caller's values are dropped.
VARIABLES = {variable for run in RUNS.values() for variable in run}
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "--dist", "worksteal", "-n")


@contextmanager
def busy_loops(count: int = 2) -> Iterator[None]:
    """Keep ``count`` processors busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(RUNS)))
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    default=2,
    show_default=True,
    help="Processes x threads of each run.",
)
def main(names: tuple[str, ...], jobs: int) -> None:
    """Run the tests once per setting (NAMES, or all of them); print a line of counts for each."""
    failed = False
    for name in names or RUNS:
        # Compiled kernels depend on the instruction set, so each run has its own folder of kernels.
        with (
            tempfile.TemporaryDirectory(prefix="fimaq-kernels-") as kernels,
            busy_loops() if name == "busy" else nullcontext(),
        ):
            environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
            environment |= {"OMP_NUM_THREADS": "1", **RUNS[name]}
            environment["TORCHINDUCTOR_CACHE_DIR"] = kernels
            command = [*_PYTEST, str(max(jobs // int(environment["OMP_NUM_THREADS"]), 1))]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            run = subprocess.run(command, env=environment, **streams)
        failed |= run.returncode != 0
        if run.returncode:
            click.echo(run.stdout)
        click.echo(f"{name}: {(run.stdout.splitlines() or ['no output'])[-1]}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
