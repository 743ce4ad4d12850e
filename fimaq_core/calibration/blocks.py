"""How much data a search works on at a time."""

import torch

#: Elements of a temporary. On a CPU the few temporaries of a search stay in a core's caches; on a GPU kernels are
#: large enough that starting them costs nothing beside running them.
_CPU, _OTHER = 2**18, 2**25


def block_elements(device: torch.device) -> int:
    """Elements that one temporary of a search may have on ``device``."""
    return _CPU if device.type == "cpu" else _OTHER
