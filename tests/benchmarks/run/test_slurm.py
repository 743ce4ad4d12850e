"""The SLURM script, with stand-ins for srun and scontrol that use this machine for both nodes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_fakes import HANG, ray_folder, until

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[3] / "scripts/slurm.sh"

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "$1" >> "$SHIM_LOG"; shift; done
export SLURM_CPUS_ON_NODE=1
exec "$@"
"""
MAKEFILE = """reproduce-table:
\t@.venv/bin/python -c "import ray; ray.init('$(RAY_ADDRESS)', logging_level='ERROR'); \\
print('machines:', len(ray.nodes()), 'cores:', ray.cluster_resources()['CPU'])"
\t@echo "grid: $(ENGINE) $(PROFILE)"
\t@touch started; sleep $(or $(SLEEP),0)
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Make a checkout in ``tmp_path``; yield the environment of a job."""
    shims = tmp_path / "bin"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shims.mkdir()
    for name in ("python", "ray"):
        launcher = tmp_path / ".venv/bin" / name
        launcher.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).with_name(name)}" "$@"\n')
        launcher.chmod(0o755)
    for name, content in (
        ("srun", SRUN),
        ("scontrol", '#!/bin/sh\nprintf "%s\\n" localhost second\n'),
    ):
        (shims / name).write_text(content)
        (shims / name).chmod(0o755)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    environment = {
        **os.environ,
        "PATH": f"{shims}:{os.environ['PATH']}",
        "SHIM_LOG": str(tmp_path / "shim.log"),
    }
    environment |= {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    with ray_folder() as folder:
        yield environment | {"PYTHONPATH": str(SCRIPT.parents[1]), "RAY_TMPDIR": str(folder)}


def test_a_job_starts_ray_on_all_machines_runs_the_grid_and_ends_it(
    job: dict[str, str], tmp_path: Path
):
    result = subprocess.run(
        [SCRIPT, "PROFILE=paper"], env=job, capture_output=True, text=True, timeout=HANG
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "machines: 2 cores: 2.0" in result.stdout
    assert "grid: ray paper" in result.stdout
    lines = (tmp_path / "shim.log").read_text().splitlines()
    nodes = [line for line in lines if "nodelist" in line]
    assert nodes == ["--nodelist=localhost", "--nodelist=second"]


def test_a_job_whose_time_is_up_leaves_nothing_running(job: dict[str, str], tmp_path: Path):
    job["SLURM_JOB_NODELIST"] = "n1"
    process = subprocess.Popen([SCRIPT, "SLEEP=300"], env=job, stderr=subprocess.PIPE, text=True)
    until((tmp_path / "started").exists)
    below = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in below)
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=HANG)
    assert process.returncode == 143
    assert "submit the same job again to continue" in words
    until(
        lambda: (
            not any(
                child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in below
            )
        )
    )


def test_outside_a_job_it_says_what_to_do(tmp_path: Path):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM")
    }
    result = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: not in a SLURM job: submit this script with sbatch.\n"


def test_a_folder_that_ray_cannot_use_ends_a_job_at_once(job: dict[str, str], tmp_path: Path):
    job["RAY_TMPDIR"] = str(tmp_path / ("long" * 20))
    result = subprocess.run([SCRIPT], env=job, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 2
    assert result.stderr.startswith("error: Ray cannot start: its folder RAY_TMPDIR=")
    assert not (tmp_path / "shim.log").exists()
