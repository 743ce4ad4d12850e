"""Commands of the classification task."""

from tasks.classification.heads import HEADS
from tasks.common.cli.commands import build_group
from tasks.common.cli.options import TaskOptions

SUMMARY = "Quantize timm classifiers, measure their accuracy, export them to ONNX."
OPTIONS = TaskOptions(calibration_data=True, elsewhere=True, heads=tuple(HEADS))
group = build_group("classification", SUMMARY, OPTIONS)
