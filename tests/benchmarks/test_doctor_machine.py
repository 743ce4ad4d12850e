"""The doctor's checks of packages, devices, disks and results: each finds what is wrong, and survives it."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import benchmark_fakes as fakes
import pytest

from benchmarks.doctor import devices, disks
from benchmarks.doctor.findings import Finding, guarded, size_text
from benchmarks.doctor.packages import package_findings, python_findings, read_packages
from fimaq_core.recipe import make_recipe
from tasks.common.lease import acquire
from tasks.common.record import write_record

FACTS = {
    "version": "2.11.0+cu130", "cuda_build": "13.0", "cuda": True, "architectures": ["sm_80", "sm_90"], "cpu_capability": "AVX2",
    "devices": [{"name": "Fine GPU", "memory": 80e9, "free": 60e9, "capability": "9.0"}], "threads": 2,
}  # fmt: skip


def requirements(folder: Path, lock: str, dependencies: list[str], python: str = ">=3.11") -> tuple[Path, Path]:
    (folder / "lock.txt").write_text(lock)
    (folder / "pyproject.toml").write_text(f'[project]\nrequires-python = "{python}"\ndependencies = {dependencies}\n')
    return folder / "lock.txt", folder / "pyproject.toml"


def states(findings) -> list[tuple[str, str]]:
    return [(one.check, one.state) for one in findings]


def test_packages_as_wanted_are_fine(tmp_path: Path):
    lines = [f"{name}=={metadata.version(name)}" for name in ("click", "numpy", "open_clip_torch")]
    found = list(package_findings(*requirements(tmp_path, "\n".join(lines), ["click>=8", "numpy"])))
    assert [(one.state, one.text) for one in found] == [("ok", "3 of 3 packages are as lock.txt has them")]
    assert {entry["state"] for entry in found[0].data["packages"]} == {"ok"}


def test_other_and_missing_packages_are_found_with_what_was_wanted(tmp_path: Path):
    click, numpy = metadata.version("click"), metadata.version("numpy")
    lock = (
        "# a comment\nclick==1.0\nnumpy==1.0 ; python_version >= '3'\nrich==0.1\nno-such-thing==2.0\nNo_Such.Tool==3.0\n"
        "for-elsewhere==1.0 ; sys_platform == 'nowhere'\n=== nonsense\n"
    )
    found = list(package_findings(*requirements(tmp_path, lock, ["click==1.0", "numpy>=1", "no_such_thing"])))
    problems = {one.check: one for one in found if one.state == "problem"}
    assert problems["package click"].text == f"click is {click}; wanted: ==1.0"
    assert problems["package click"].fix == "make setup"
    assert problems["package no-such-thing"].text == "no-such-thing is missing; wanted: ==2.0"
    assert "nonsense" in problems["packages"].text
    assert set(problems) == {"package click", "package no-such-thing", "packages"}
    # Numpy is not as locked but as the project allows, rich and the tool are none of the project's own: notes.
    notes = {one.text for one in found if one.state == "note"}
    assert notes == {
        f"other: numpy {numpy} (wanted ==1.0), rich {metadata.version('rich')} (wanted ==0.1)",
        "missing: No_Such.Tool",
    }
    assert "for-elsewhere" not in str(found)


def test_without_a_lock_file_the_project_says_what_is_wanted(tmp_path: Path):
    _, project = requirements(tmp_path, "", ["click>=8", "no-such-thing>=1"])
    packages, unclear = read_packages(tmp_path / "none.txt", project)
    assert [(one.name, one.state) for one in packages] == [("click", "ok"), ("no-such-thing", "missing")]
    assert unclear == []


def test_half_a_package_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, about, files in (
        ("half", "Metadata-Version: 2.1\nName: half\nVersion: 1.0\n", "half/__init__.py,,\n"),
        ("bare", None, None),
        ("whole", "Metadata-Version: 2.1\nName: whole\nVersion: 1.0\n", "whole/__init__.py,,\n"),
    ):
        folder = tmp_path / "site" / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        for file, content in (("METADATA", about), ("RECORD", files)):
            if content is not None:
                (folder / file).write_text(content)
    (tmp_path / "site" / "whole").mkdir()
    (tmp_path / "site" / "whole" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    lock, project = requirements(tmp_path, "half==1.0\nbare==1.0\nwhole==1.0\n", ["half"])
    packages, _ = read_packages(lock, project)
    assert {one.name: one.state for one in packages} == {"half": "broken", "bare": "broken", "whole": "ok"}
    assert ("package half", "problem") in states(package_findings(lock, project))


def test_an_old_python_is_a_problem(tmp_path: Path):
    _, project = requirements(tmp_path, "", [], python=">=99")
    (found,) = python_findings(project)
    assert (found.state, ">=99" in found.text, found.data["executable"]) == ("problem", True, sys.executable)
    _, project = requirements(tmp_path, "", [])
    assert next(python_findings(project)).state == "ok"


def test_a_check_that_fails_keeps_what_it_found_before():
    def examine():
        yield Finding("first", "ok", "fine")
        raise OSError("gone")

    found = guarded("disk", examine)
    assert [one.state for one in found] == ["ok", "problem"]
    assert found[1].text == "disk cannot be examined: OSError: gone"


def with_program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_what_pytorch_sees_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_program(tmp_path, "nvidia-smi", "echo 580.65", monkeypatch)
    torch, gpu = devices.torch_findings(FACTS, "")
    assert torch.text == "PyTorch 2.11.0+cu130, built for CUDA 13.0"
    assert gpu.text == "cuda:0: Fine GPU, 80.0 GB (60.0 GB free), capability 9.0, driver 580.65"
    old = {**FACTS, "devices": [{**FACTS["devices"][0], "capability": "7.0", "free": None}]}
    *_, gpu = devices.torch_findings(old, "")
    assert (gpu.state, "kernels for sm_80, sm_90 only" in gpu.text) == ("note", True)
    *_, gpu = devices.torch_findings({**FACTS, "devices": [], "cuda": False}, "")
    assert (gpu.state, "PyTorch sees no GPU" in gpu.text) == ("note", True)
    (broken,) = devices.torch_findings(None, "ImportError: no library")
    assert (broken.state, broken.fix) == ("problem", "make setup")


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        (["sm_80", "sm_90"], "9.0", True), (["sm_80"], "8.6", True), (["sm_86"], "8.0", False), (["sm_90a"], "9.0", True),
        (["sm_90"], "10.0", False), (["sm_90", "compute_90"], "10.0", True), (["sm_100"], "10.0", True), ([], "7.5", True),
        (["compute_120"], "9.0", False),
    ],
)  # fmt: skip
def test_a_gpu_needs_kernels_of_its_generation_or_ptx(architectures: list[str], capability: str, fits: bool):
    assert devices.has_kernels(architectures, capability) is fits


def test_pytorch_is_asked_in_a_process_that_may_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for content, words in (
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended with -11"),
        ("raise ImportError('libcudart is gone')", "libcudart is gone"),
        ("import time\ntime.sleep(60)", "no answer within 1 s"),
    ):
        (tmp_path / "torch" / "__init__.py").write_text(content)
        facts, problem = devices.torch_facts(seconds=1.0 if "sleep" in content else 60.0)
        assert facts is None
        assert words in problem


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_limits_of_containers_are_read_of_both_kinds_of_groups(tmp_path: Path):
    proc, groups = tmp_path / "cgroup", tmp_path / "groups"
    assert devices.container_limits(proc, groups) == {"memory": None, "cores": None}
    # Version 2: the tightest on the way up counts.
    proc.write_text("0::/pod/box\n")
    write(groups / "pod" / "box" / "memory.max", "max\n")
    write(groups / "pod" / "memory.max", "4000000000\n")
    write(groups / "pod" / "box" / "cpu.max", "150000 100000\n")
    write(groups / "cpu.max", "max 100000\n")
    assert devices.container_limits(proc, groups) == {"memory": 4e9, "cores": 1.5}
    # Inside of a container the group's own path is not there: the top is the group.
    proc.write_text("0::/not/visible\n")
    write(groups / "memory.max", "3000000000\n")
    assert devices.container_limits(proc, groups)["memory"] == 3e9
    # Version 1, where a huge number means none.
    other = tmp_path / "v1"
    proc.write_text("4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n")
    write(other / "memory" / "box" / "memory.limit_in_bytes", "2000000000\n")
    write(other / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(other / "cpu" / "box" / "cpu.cfs_quota_us", "200000\n")
    write(other / "cpu" / "box" / "cpu.cfs_period_us", "100000\n")
    write(other / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(other / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert devices.container_limits(proc, other) == {"memory": 2e9, "cores": 2.0}
    tight = {one.check: one for one in devices.machine_findings(FACTS, proc, other)}["container"]
    assert (tight.state, "2.0 GB of memory and 2 cores" in tight.text) == ("note", True)


def test_processor_and_memory_are_said_without_pytorch_too():
    import psutil

    found = {one.check: one for one in devices.machine_findings(None)}
    assert found["cpu"].data["cores"] == len(os.sched_getaffinity(0))
    assert found["memory"].data["total"] == psutil.virtual_memory().total


def test_programs_that_are_not_there_are_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = {one.check: one for one in devices.program_findings()}
    assert (found["compiler"].state, found["browser"].state) == ("note", "note")
    with_program(tmp_path, "g++", "", monkeypatch)
    assert next(one for one in devices.program_findings() if one.check == "compiler").state == "ok"


def test_little_room_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = {"results": tmp_path / "not" / "yet"}
    (found,) = disks.disk_findings(folders)
    assert found.data["free"] > 0
    monkeypatch.setattr(disks, "_LITTLE", 1e18)
    (found,) = disks.disk_findings(folders)
    assert (found.state, found.fix != "") == ("note", True)
    assert {"results", "temporary files", "weights from the hub"} == set(disks.places(tmp_path))


def results(folder: Path) -> dict[str, Finding]:
    records, damaged = disks.read_results(folder)
    return {
        f"{one.check} {one.state}": one
        for one in guarded("results", lambda: disks.results_findings(folder, len(records), damaged))
    }


def test_a_bare_results_folder_is_fine_and_stays_bare(tmp_path: Path):
    assert set(results(tmp_path)) == {"results ok", "records ok", "leases ok", "file system ok"}
    assert "can be made" in results(tmp_path / "new" / "one")["results ok"].text
    assert not list(tmp_path.iterdir())


def test_a_results_folder_that_cannot_be_written_is_a_problem(tmp_path: Path):
    (tmp_path / "file").touch()
    assert "is a file" in results(tmp_path / "file" / "results")["results problem"].text
    # Nobody, not even root, makes files there.
    assert "cannot be written" in results(Path("/proc/results"))["results problem"].text


def test_records_are_counted_and_damaged_ones_named(tmp_path: Path):
    for seed in (1, 2, 3):
        record = fakes.make_record(recipe=make_recipe("rtn", {"w_bits": 4, "a_bits": 4, "seed": seed}))
        path = write_record(record, tmp_path / "runs" / str(seed))
    path.write_text(path.read_text().replace('"n": 2000', '"n": 2001'))
    (tmp_path / "runs" / "2" / "result.json").write_text("{")
    found = results(tmp_path)
    assert found["records ok"].data == {"count": 1, "damaged": 2}
    assert str(path) in found["record note"].text
    assert disks.read_results(tmp_path)[0][0][0] == tmp_path / "runs" / "1" / "result.json"


def test_leases_of_the_living_and_of_the_dead_are_told_apart(tmp_path: Path):
    dead, alive = tmp_path / "runs" / "dead" / "result.json", tmp_path / "mlp" / "shared.safetensors"
    script = f"""if True:
        import os, pathlib
        from tasks.common.lease import acquire
        lease = acquire(pathlib.Path({str(dead)!r}))
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    with acquire(alive):
        found = [one for one in disks.results_findings(tmp_path, 0, []) if one.check == "leases"]
    held, left = found
    assert (held.data["held"][0].startswith(str(alive)), f"process {os.getpid()}" in held.text) == (True, True)
    assert left.data["dead"] == [str(dead)]
    assert "leases" not in {one.check for one in disks.results_findings(tmp_path / "none", 0, []) if one.state == "note"}


@pytest.mark.parametrize(
    ("kind", "network"),
    [("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("lustre", True), ("ext4", False), ("overlay", False)],
)
def test_network_file_systems_are_known(kind: str, network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert disks.is_network(kind) is network
    monkeypatch.setattr(disks, "file_system", lambda path: kind)
    assert any(one.check == "file system" and one.data["network"] is network for one in disks.results_findings(tmp_path, 0, []))


def test_the_file_system_of_a_path_is_that_of_its_mount():
    assert disks.file_system(Path("/proc/self")) == "proc"


def test_sizes_are_for_people():
    assert [size_text(size) for size in (1.5e12, 9_014_226_944, 2.5e6, 900)] == ["1.5 TB", "9.0 GB", "2.5 MB", "1 kB"]
