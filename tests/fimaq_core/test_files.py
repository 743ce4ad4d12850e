"""Files are complete or untouched: full disks, read-only folders and interrupted writes."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from small_models import quick

from fimaq_core import files
from fimaq_core.checkpoint import Fingerprint, read_header, save_checkpoint
from fimaq_core.errors import CheckpointError
from fimaq_core.files import is_there, remove_leftovers, replaced_whole


def write(path: Path, text: str) -> None:
    with replaced_whole(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text(text)


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "file.txt"
    write(path, "old")
    assert path.read_text() == "old"
    write(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


def fails(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_failed_writes_leave_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    path = tmp_path / "file.txt"
    write(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, name, fails(code))
        with pytest.raises(CheckpointError, match=r"Cannot write .*file.txt.*Free space") as caught:
            write(path, "new")
    assert os.strerror(code) in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    write(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EMFILE, "Raise the limit of open files"),
        (errno.EIO, "Check the disk or the network"),
        (errno.ESTALE, "Check the disk or the network"),
        (errno.EACCES, "for permission, for example by `chmod g\\+rwx"),
        (errno.EISDIR, "Remove the folder of that name"),
    ],
)
def test_each_error_has_its_own_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    monkeypatch.setattr(files.os, "replace", fails(code))
    path = tmp_path / "file.txt"
    with pytest.raises(CheckpointError, match=advice):
        write(path, "x")
    with pytest.raises(CheckpointError, match="Check the disk"), replaced_whole(path):
        raise SafetensorError("Input/output error (os error 5)")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_an_error_of_looking_is_no_absent_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    assert [is_there(tmp_path / name) for name in ("file", "loop", "file/x", "x")] == [
        True,
        *[False] * 3,
    ]
    monkeypatch.setattr(files.os, "stat", fails(code))
    with pytest.raises(CheckpointError, match=r"Cannot read .*(does not answer|raise the limit)"):
        is_there(tmp_path / "file")


def test_leftovers_are_files(tmp_path: Path) -> None:
    names = [".x.0123456789ab", ".x.0123456789ac", ".x.0123456789ad"]
    (tmp_path / names[0]).write_text("")
    (tmp_path / names[1] / "kept").mkdir(parents=True)
    (tmp_path / names[2]).symlink_to(names[1])
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [names[1]]


def test_disk_full_while_the_content_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write(path, "old")

    def half() -> None:
        with replaced_whole(path) as temporary:
            temporary.write_text("half of the n")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_that_is_full(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with (
        pytest.raises(CheckpointError, match="No space left"),
        replaced_whole(path),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)
    assert os.listdir(tmp_path) == []


def test_other_errors_pass_and_clean_up(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write(path, "old")

    def half() -> None:
        with replaced_whole(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        write(tmp_path / "taken" / "file.txt", "x")


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    """Results are shared: the usual permissions, not those of a private temporary file."""
    path = tmp_path / "file.txt"
    before = os.umask(0o022)
    try:
        write(path, "x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


def test_failed_checkpoint_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = Fingerprint(weights="w", calibration="c", recipe=quick().model_dump(mode="json"))
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"x": torch.ones(3)}, mark, {"stage": "old"})
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "replace", fails(errno.ENOSPC))
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(path, {"x": torch.zeros(3)}, mark, {"stage": "new"})
    assert path.read_bytes() == before
    assert read_header(path)[1] == {"stage": "old"}
    assert os.listdir(tmp_path) == ["a.safetensors"]
