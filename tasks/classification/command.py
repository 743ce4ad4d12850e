"""Commands of the classification task."""

from tasks.common.cli.commands import build_group

SUMMARY = "Quantize timm classifiers, measure their accuracy, export them to ONNX."
group = build_group("classification", SUMMARY)
