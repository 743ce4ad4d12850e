"""Compiled code lies in a folder that no other user can write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import os, torch
from fimaq_core.reconstruction.flat import _compiled
x = torch.ones(8)
assert torch.equal(_compiled(torch.sin, "cpu", 1)(x), torch.sin(x))
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""
ASK = """
import os
from fimaq_core.compile_cache import use_own_cache
use_own_cache()
use_own_cache()
print(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.path.isdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
"""


def said(code: str, tmp_path: Path, **variables: str) -> tuple[str, str]:
    """Run code in a new process, whose home and temporary folder lie in ``tmp_path``."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    for folder in (home, temporary):
        folder.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "TMPDIR")}
    kept |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    kept.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_compiled_code_lies_in_the_users_cache_only(tmp_path: Path) -> None:
    folder = Path(said(COMPILE, tmp_path)[0])
    assert folder.parent == tmp_path / "home" / ".cache" / "fimaq"
    assert list(folder.rglob("*.so"))
    made = [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
    assert made == []


def test_the_folder_is_closed_to_others(tmp_path: Path) -> None:
    own = tmp_path / "cache" / "fimaq"
    own.mkdir(parents=True)
    own.chmod(0o777)
    text, warning = said(ASK, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    folder = Path(text.removesuffix(" True"))
    assert folder.parent == own
    assert [place.stat().st_mode & 0o777 for place in (folder, own)] == [0o700, 0o700]
    assert warning == ""


def test_a_folder_that_the_user_gives_is_taken_and_pytorchs_own_is_not(tmp_path: Path) -> None:
    given = str(tmp_path / "given")
    assert said(ASK, tmp_path, TORCHINDUCTOR_CACHE_DIR=given)[0] == f"{given} False"
    default = str(tmp_path / "temporary" / "torchinductor_me")
    text, _ = said(ASK, tmp_path, TORCHINDUCTOR_CACHE_DIR=default, XDG_CACHE_HOME="relative")
    assert text.startswith(str(tmp_path / "home" / ".cache" / "fimaq"))


def taken(cache: Path) -> None:
    cache.mkdir()
    (cache / "fimaq").write_text("")


def dangling(cache: Path) -> None:
    cache.mkdir()
    (cache / "fimaq").symlink_to(cache / "nowhere")


def everyones(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


def another_users(cache: Path) -> None:
    cache.mkdir()
    place = Path("/usr")  # of root
    if os.getuid() == 0:
        place = cache / "other"
        place.mkdir()
        os.chown(place, 65534, 65534)
    (cache / "fimaq").symlink_to(place)


@pytest.mark.parametrize("hinder", [taken, dangling, everyones, another_users])
def test_a_folder_that_others_could_write_is_not_used(tmp_path: Path, hinder: object) -> None:
    assert callable(hinder)
    hinder(tmp_path / "cache")
    text, warning = said(ASK, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert text.startswith(str(tmp_path / "temporary" / "fimaq-kernels-"))
    assert text.endswith("True")
    assert warning.count("compiled code is not kept") == 1
    assert "set XDG_CACHE_HOME" in warning
    assert os.listdir(tmp_path / "temporary") == []  # removed at the end of the process
