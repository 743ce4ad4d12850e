"""Running of exported files by onnxruntime, on the CPU."""

import functools
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.export.coverage import Coverage, coverage_of
from fimaq_core.export.opening import OnnxFile, open_onnx
from fimaq_core.terminal import one_line

#: Settings of every session.
SETTINGS = {
    # Otherwise activations of layers with packed weights would be quantized to 8 bits.
    "session.qdq_matmulnbits_accuracy_level": "0",
    # Otherwise products of signed activations would run in float on x86 processors.
    "session.qdqisint8allowed": "1",
}
#: Settings with which the weights of an optimised graph are not written into it.
_APART = {
    "session.optimized_model_external_initializers_file_name": "weights",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
#: Bytes that all runs in this process may use, and each loading: three quarters of the machine's
#: memory. A small file can ask for tensors of any size.
_MOST_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 * 3


class OnnxModel(nn.Module):
    """An exported file as a module: a batch of inputs in, the output or a tuple of outputs out.

    Inputs are float32 (n, C, H, W) images, uint8 (n, H, W, C) images or int64 (n, L) token ids, as
    the file's facts say. Tensors are on the CPU.

    Example::

        model = OnnxModel(Path("model.onnx"))
        logits = model(images)
        print(model.coverage().text())

    Attributes:
        file: the opened file with its facts.
    """

    def __init__(
        self, file: OnnxFile | Path, threads: int | None = None, optimised: bool = True
    ) -> None:
        """Load a file into onnxruntime.

        Args:
            file: an opened file, or the path of one.
            threads: threads of onnxruntime; by default as many as torch uses.
            optimised: False switches all optimisations of the graph off, so that nothing runs in
                integers.

        Raises:
            ModelError: the file is no export of fimaq, or onnxruntime does not load it.
        """
        super().__init__()
        self.file = open_onnx(file) if isinstance(file, Path) else file
        self.threads, self.optimised = threads or torch.get_num_threads(), optimised
        self._session = self._load()
        (self._input,) = (one.name for one in self._session.get_inputs())
        self.eval()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run one batch. Raises ModelError if the file does not take it or memory is short."""
        values = x.detach().cpu().contiguous().numpy()
        try:
            found = self._session.run(None, {self._input: values})
        except Exception as error:
            raise ModelError(self._reason("run", error)) from error
        outputs = tuple(torch.from_numpy(one) for one in found)
        return outputs[0] if len(outputs) == 1 else outputs

    def coverage(self) -> Coverage:
        """Find what runs in integers, in the graph that onnxruntime makes of the file.

        Raises:
            ModelError: onnxruntime does not write its graph, for example because the disk is full.
        """
        import onnx

        with tempfile.TemporaryDirectory(prefix="fimaq-") as folder:
            path = Path(folder) / "optimised.onnx"
            self._load(path)
            optimised = onnx.load(path, load_external_data=False)
        return coverage_of(self.file.facts.layers, self.file.model, optimised)

    def _load(self, written: Path | None = None) -> Any:
        """Return a session; ``written`` is the place for its graph."""
        import onnxruntime

        _prepare()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 4  # errors are raised
        if not self.optimised:
            levels = onnxruntime.GraphOptimizationLevel
            options.graph_optimization_level = levels.ORT_DISABLE_ALL
        entries = {**SETTINGS, "session.use_env_allocators": "1"}
        if written is not None:
            options.optimized_model_filepath = str(written)
            entries |= _APART
        for name, value in entries.items():
            options.add_session_config_entry(name, value)
        # The checked content, written anew: the file itself may have changed.
        content = self.file.model.SerializeToString()
        try:
            with _bounded_memory():
                return onnxruntime.InferenceSession(
                    content, options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:
            raise ModelError(self._reason("load", error)) from error

    def _reason(self, step: str, error: Exception) -> str:
        said = str(error)
        if "memory" in said.lower():
            return (
                f"onnxruntime does not {step} {self.file.path}: it needs more memory than is free, "
                f"or than the {_MOST_MEMORY / 2**30:.0f} GiB that it may use. Take a smaller batch."
            )
        return f"onnxruntime does not {step} {self.file.path}: {one_line(said, 300)}"


@functools.cache
def _prepare() -> None:
    """Bound the memory of all runs in this process, and switch reports to the maker off."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    usual = ("arena_extend_strategy", "initial_chunk_size_bytes", "max_dead_bytes_per_chunk")
    bounds = {"max_mem": _MOST_MEMORY, **dict.fromkeys(usual, -1)}
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(bounds))


_LOADING = threading.Lock()


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Bound the memory that this process takes in the block, where the system can do so.

    While it loads a file, onnxruntime computes constants outside its own bound.
    """
    sizes = Path("/proc/self/statm")
    if not sizes.exists():
        yield
        return
    with _LOADING:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(sizes.read_text(encoding="ascii").split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + _MOST_MEMORY
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
