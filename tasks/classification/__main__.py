"""``python -m tasks.classification``."""

from tasks.common.cli.commands import build_group, main

main(
    build_group(
        "classification", "Quantize timm classifiers (simulated) and measure their accuracy."
    )
)
