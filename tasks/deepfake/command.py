"""Commands of the deepfake task."""

from tasks.common.cli.commands import build_group
from tasks.common.cli.options import TaskOptions
from tasks.deepfake.tags import EVALUATIONS, LAYOUT

OPTIONS = TaskOptions(
    evaluations=EVALUATIONS,
    calibration_data=True,
    class_order=False,
    data=f"{LAYOUT} (demo models bring their own data).",
)
SUMMARY = "Quantize detectors of tampered faces, measure frames and videos, export to ONNX."
group = build_group("deepfake", SUMMARY, OPTIONS)
