"""Speed of an exported file beside its float32 export."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fimaq_core.export.runtime import SETTINGS

#: Height and width of images for files that take any size.
FREE_SIDE = 256


class Speed(NamedTuple):
    """Median of the ratios of pairs of runs, its quartiles, and median times per run."""

    ratio: float  # time of the float32 file / time of the file
    low: float
    high: float
    float_ms: float
    ms: float


def speed(float_file: Path, file: Path, batch: int, threads: int, rounds: int = 30) -> Speed:
    """Run both files in turn in this process; each pair of neighbours gives a ratio.

    Args:
        float_file, file: files with one input of equal shape, written by this process.
        batch: samples per run; values are random, token ids 1.
        threads: threads of onnxruntime.
        rounds: number of pairs, at least 2.
    """
    plain, own = (_runner(path, batch, threads) for path in (float_file, file))
    for run in (plain, own):
        run()
    pairs = [(plain(), own()) for _ in range(rounds)]
    low, ratio, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
    float_s, own_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Speed(ratio, low, high, 1e3 * float_s, 1e3 * own_s)


def _runner(path: Path, batch: int, threads: int) -> Callable[[], float]:
    """Return a function that runs a file once and returns the seconds."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in SETTINGS.items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (port,) = session.get_inputs()
    shape = [batch, *(size if isinstance(size, int) else FREE_SIDE for size in port.shape[1:])]
    values: Any = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if port.type != "tensor(float)":
        values = np.ones(shape, dtype=np.int64 if port.type == "tensor(int64)" else np.uint8)

    def run() -> float:
        start = time.perf_counter()
        session.run(None, {port.name: values})
        return time.perf_counter() - start

    return run
