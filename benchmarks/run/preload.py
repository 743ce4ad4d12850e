"""Imported by the fork server of cells: it imports what cells need before they are forked.

Threads do not survive a fork, so PyTorch must compute with one thread until then.
"""

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
    # Looking for garbage among the imported objects would copy their memory into each cell.
    gc.collect()
    gc.freeze()
