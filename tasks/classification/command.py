"""Commands of the classification task."""

from tasks.common.cli.commands import build_group

SUMMARY = "Quantize timm classifiers (simulated) and measure their accuracy."
group = build_group("classification", SUMMARY)
