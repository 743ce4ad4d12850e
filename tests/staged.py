"""Single stages of a quantization, with the files of a place or without."""

from pathlib import Path

from fimaq_core.store import Address, CheckpointStore, Part, Resources, Stage


def run_stage(
    stage: Stage,
    part: Part,
    file: Path | None = None,
    *,
    pieces: Path | None = None,
    resources: Resources = Resources(batch_size=8),
) -> bool:
    """Run `stage`, with a file and pieces beside it or with ``pieces`` only; True if loaded."""

    def address(stage: Stage, part: Part) -> Address:
        return Address(None, pieces) if file is None else Address.beside(file, stage)

    return CheckpointStore(resources, address).run(stage, part)
