"""Imported by the fork server of cells: it imports what cells need before they are forked.

Threads do not survive a fork, so PyTorch must compute with one thread until then.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from benchmarks.run.child import redirect

#: Environment variable with the log of the imports and the modules, as a JSON list.
VARIABLE = "FIMAQ_PRELOAD"

_chosen: int | None = None


def restore_threads() -> None:
    """Let PyTorch compute with several threads again, in the process of a cell."""
    torch, asked = sys.modules.get("torch"), os.environ.get("OMP_NUM_THREADS", "")
    if torch is not None and _chosen is not None:
        torch.set_num_threads(int(asked) if asked.isdecimal() else _chosen)


def cuda_is_up(open_files: Path = Path("/proc/self/fd")) -> bool:
    """Return whether this process has called CUDA's driver, which fails after a fork.

    Asking NVML for the GPUs, as PyTorch does here, is no such call.

    Args:
        open_files: folder of links to open files. Only the driver opens the one for unified memory.
    """
    for link in open_files.iterdir() if open_files.is_dir() else ():
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith("/dev/nvidia-uvm"):
                return True
    return False


if VARIABLE in os.environ:
    log, *modules = json.loads(os.environ.pop(VARIABLE))
    redirect(Path(log))
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 the cell tries again and reports it
            traceback.print_exc()
        torch = sys.modules.get("torch")
        if torch is not None and _chosen is None and hasattr(torch, "set_num_threads"):
            _chosen = torch.get_num_threads()
            torch.set_num_threads(1)
    if cuda_is_up():
        sys.exit("CUDA is in use, so that nothing can be forked: processes are spawned instead.")
    # Looking for garbage among the imported objects would copy their memory into each cell.
    gc.collect()
    gc.freeze()
