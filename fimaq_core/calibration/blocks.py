"""How much data a search works on at a time."""

import torch

#: Elements of a temporary. On a CPU a few temporaries fit into the last cache, and passes over them are long beside what
#: starting them costs (measured: 2**18 took 1.3 times as long, 2**23 as long). GPUs need larger ones for the same.
_CPU, _OTHER = 2**21, 2**25


def block_elements(device: torch.device) -> int:
    """Elements that one temporary of a search may have on ``device``."""
    return _CPU if device.type == "cpu" else _OTHER
