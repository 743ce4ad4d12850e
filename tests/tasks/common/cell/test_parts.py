"""Models of several parts: their logs in one record, their modules in one map."""

from torch import nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.layers import QuantLinear
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from tasks.common.models.module_map import merge_logs, whole_map


def log(engine: str) -> ReconstructionLog:
    figures = {"blocks.0": 0.25}, {"blocks.0": 1e-3}, {"blocks.0": 3}
    return ReconstructionLog(
        {"blocks.0": 1.0}, {"blocks.0": 2}, ["blocks.0: a note"], engine, *figures
    )  # type: ignore[arg-type]


def test_logs_of_parts_name_their_part_and_an_engine_of_their_own() -> None:
    same, different, alone = ReconstructionLog(), ReconstructionLog(), ReconstructionLog()
    for name in ("vision", "text"):
        merge_logs(same, name, log("compiled"))
    assert same.last_loss == {"vision.blocks.0": 1.0, "text.blocks.0": 1.0}
    assert same.fisher_passes == {"vision.blocks.0": 2, "text.blocks.0": 2}
    assert same.error == {"vision.blocks.0": 0.25, "text.blocks.0": 0.25}
    assert same.fisher == {"vision.blocks.0": 1e-3, "text.blocks.0": 1e-3}
    assert same.notes == ["vision.blocks.0: a note", "text.blocks.0: a note"]
    assert same.near_floor == {"vision.blocks.0": 3, "text.blocks.0": 3}
    assert same.sentences() == [
        *same.notes,
        "Learned activation scales that ended at or near their lower bound (below 0.02 of the "
        "calibrated value; the bound is 0.01): 6 (vision.blocks.0 3, text.blocks.0 3). A lower "
        "lr_scale moves them less.",
    ]
    assert same.engine == "compiled"
    merge_logs(different, "vision", log("compiled"))
    merge_logs(different, "text", log("fused"))
    assert different.engine == "compiled"
    assert different.notes[-1] == "text: reconstructed by the engine 'fused'"
    merge_logs(alone, "", log("graph"))
    assert (alone.engine, alone.last_loss, alone.notes) == (
        "graph",
        {"blocks.0": 1.0},
        ["blocks.0: a note"],
    )


def test_the_map_of_several_parts_names_what_is_left_alone() -> None:
    chains = {
        name: BlockChain(
            [
                Segment(
                    "fc",
                    "block",
                    nn.Sequential(QuantLinear.from_float(nn.Linear(2, 2), 4, 4), nn.ReLU()),
                )
            ]
        )
        for name in ("a", "b")
    }
    found = whole_map(chains, {"c": nn.Sequential(nn.Linear(2, 2), nn.Dropout())})
    assert [entry.name for entry in found.quantized] == ["a.fc.0", "b.fc.0"]
    assert found.full_precision == ["a.fc.1 (ReLU)", "b.fc.1 (ReLU)", "c.0 (Linear)"]
    (alone,) = whole_map({"": chains["a"]}, {}).quantized
    assert alone.name == "fc.0"
