"""Export of quantized models to ONNX files that compute with integers (extra ``[export]``)."""

from importlib.util import find_spec

from fimaq_core.errors import ModelError


def require_export() -> None:
    """Check that the packages of the extra are installed. Raises ModelError."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"Exports need the packages {', '.join(missing)}: install the extra with "
            "pip install '.[export]' in the project's folder."
        )
