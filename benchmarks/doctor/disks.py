"""Where there is room, and what lies in the results folder."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.doctor.findings import Finding, existing, size_text
from fimaq_core.errors import FimaqError
from tasks.common.record import ResultRecord, read_record

#: Free bytes below which a folder is worth a note.
_LITTLE = 5e9
#: Kinds of file systems that lie on other machines.
_NETWORK = re.compile(r"nfs|cifs|smb|sshfs|lustre|gpfs|beegfs|ceph|glusterfs|9p|afs|davfs|s3fs|gcsfuse|blobfuse|orangefs|pvfs")


def places(results: Path) -> dict[str, Path]:
    """Folders that runs write to, by what they are for."""
    found = {"results": results, "temporary files": Path(tempfile.gettempdir())}
    try:
        from huggingface_hub import constants

        found["weights from the hub"] = Path(constants.HF_HUB_CACHE)
    except ImportError:
        found["weights from the hub"] = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    return found


def disk_findings(folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Say how much room there is."""
    for purpose, path in folders.items():
        free = shutil.disk_usage(existing(path)).free
        little = free < _LITTLE
        text = f"{size_text(free)} free for {purpose} ({path})"
        data = {"purpose": purpose, "path": str(path), "free": free}
        yield Finding("disk", "note" if little else "ok", text, "free space there" if little else "", data)


def file_system(path: Path) -> str | None:
    """Return the kind of the file system a path is on; None where the system does not tell."""
    import psutil

    place = existing(path).resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in (place, *place.parents) if mounts.get(folder)), None)


def is_network(kind: str) -> bool:
    """Whether files of a file system of this kind lie on other machines."""
    return _NETWORK.search(kind.lower()) is not None


def read_results(results: Path) -> tuple[list[tuple[Path, ResultRecord]], list[str]]:
    """Return the records below the results folder with their files, and what is said of those that cannot be read."""
    records: list[tuple[Path, ResultRecord]] = []
    damaged: list[str] = []
    try:
        paths = sorted((results / "runs").rglob("result.json"))
    except OSError as error:
        return [], [f"{results / 'runs'} cannot be listed: {error}"]
    for path in paths:
        try:
            records.append((path, read_record(path)))
        except (FimaqError, OSError) as error:
            damaged.append(str(error))
    return records, damaged


def results_findings(results: Path, records: int, damaged: list[str]) -> Iterator[Finding]:
    """Examine the results folder: whether it can be written, its records, leases and file system."""
    place = existing(results)
    data = {"path": str(results), "exists": results.is_dir()}
    if not place.is_dir():
        yield Finding(
            "results", "problem", f"{place} is a file, not a folder", f"move {place} away, or give another --results", data
        )
        return
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        text = f"the results folder {results} cannot be written: {error.strerror or error}"
        yield Finding("results", "problem", text, f"make {place} writable, or give another --results", data)
    else:
        words = f"the results folder {results} " + ("can be written" if results.is_dir() else "can be made")
        yield Finding("results", "ok", words, data=data)
    yield Finding("records", "ok", f"{records} records can be read", data={"count": records, "damaged": len(damaged)})
    for problem in damaged:
        yield Finding("record", "note", problem)
    yield from _lease_findings(results)
    kind = file_system(results)
    if kind is not None and is_network(kind):
        text = (
            f"results are on a network file system ({kind}): several machines can share them; other programs' locks may be slow"
        )
        yield Finding("file system", "note", text, data={"kind": kind, "network": True})
    else:
        yield Finding(
            "file system", "ok", f"results are on {kind or 'an unknown file system'}", data={"kind": kind, "network": False}
        )


def _lease_findings(results: Path) -> Iterator[Finding]:
    from tasks.common.lease import Observer

    held, left, observer = [], [], Observer()
    files = sorted(results.rglob(".*.lease"))
    for file in files:
        path = file.with_name(file.stem[1:])
        who = observer.holder(path)
        if who is None:
            left.append(str(path))
        else:
            held.append(f"{path} by {who}")
    if held:
        yield Finding("leases", "note", f"{len(held)} files are being made: {'; '.join(held[:5])}", data={"held": held})
    if left:
        text = f"{len(left)} files were being made by processes that died: {', '.join(left[:5])}"
        yield Finding("leases", "note", text, "run the same command again: what is finished is kept", {"dead": left})
    if not files:
        yield Finding("leases", "ok", "nothing is being made, and nothing was broken off")
