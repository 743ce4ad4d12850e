"""``python -m tasks.classification``."""

from tasks.common.cli.commands import build_group, main

SUMMARY = "Quantize timm classifiers (simulated) and measure their accuracy."
main(build_group("classification", SUMMARY))
