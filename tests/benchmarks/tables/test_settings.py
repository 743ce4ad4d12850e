"""Lines on settings: those that influence a method, shared values, released values."""

import benchmark_fakes as fakes

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.tables.settings import settings_lines


def lines(
    tmp_path,
    methods: tuple[str, ...],
    overrides: dict[str, object],
    bits: tuple[str, ...] = ("w3a3",),
) -> list[str]:
    grid = fakes.plain_demo(methods=methods, bits=bits, seeds=(1,), overrides=overrides)
    return settings_lines(
        fakes.write_cells(expand(grid, Filters(), RunOptions(results=tmp_path)), lambda cell: 50.0)
    )


def test_only_what_bears_on_a_method_is_named(tmp_path):
    (settings, seeds) = lines(tmp_path, ("mlp-recon", "rtn"), {"mlp_steps": 7, "steps": 5})
    assert settings.startswith(
        "Settings of mlp-recon, where a method has them: calibration_images 1024"
    )
    assert "mlp_steps 7 (released: 20000)" in settings
    assert " steps 5" not in settings
    assert seeds == "Seeds: 1."


def test_nothing_optimised_has_seeds_only(tmp_path):
    assert lines(tmp_path, ("rtn", "repq"), {}) == ["Seeds: 1."]


def test_values_that_differ_name_their_methods(tmp_path):
    (settings, _) = lines(
        tmp_path, ("brecq", "qdrop", "adalog-recon"), {"steps": 5, "range_images": 32}
    )
    assert "steps 5 (released: 20000)" in settings
    assert "range_images 32 (released: 128; adalog-recon 32)" in settings
    assert "batch_size 32," in settings


def test_released_settings_are_those_of_the_bits(tmp_path):
    (settings, _) = lines(tmp_path, ("aphq",), {"mlp_percentile": 0.99}, ("w4a4", "w3a3"))
    assert "mlp_percentile 0.99 (released: 0.98 or 0.99)" in settings
