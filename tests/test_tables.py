"""Tables say what the models are; plots are images of the spectra."""

from dataclasses import replace
from io import StringIO

import matplotlib.image
import pytest
import torch
from models import tiny_model, tokens
from rich.console import Console

from slicegpt_fast import slice_model
from slicegpt_fast.architectures import Decoder
from slicegpt_fast.evaluation import flops_per_token, stored_parameters
from slicegpt_fast.plots import plot_sizes, plot_spectra
from slicegpt_fast.slicing import CutResult, SliceOptions, SlicePlan, block_parameters, dense_sizes, fit_bases
from slicegpt_fast.slicing.cuts.budget import Trial
from slicegpt_fast.slicing.cuts.choice import Sizes
from slicegpt_fast.slicing.summary import kept_sizes
from slicegpt_fast.tables import (
    Measure,
    comparison,
    cut_table,
    decimal,
    plan_title,
    size_measures,
    size_notes,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (999, "999.0"), (1000, "1.0 k"), (134_515_008, "134.5 M"), (7e9, "7.0 G"), (1.5e12, "1.5 T")],
)
def test_decimal(value, text):
    assert decimal(value) == text


def test_comparison():
    page = StringIO()
    Console(width=100, file=page).print(
        comparison("A model", [Measure("perplexity", 10.0, 12.5, "{:.2f}".format)], ["One note.", "[b]Two."])
    )
    lines = [line.strip() for line in page.getvalue().splitlines()]
    assert lines[0] == "A model"
    assert ["perplexity", "10.00", "12.50", "1.250"] in [line.replace("│", "").split() for line in lines]
    assert lines[-2:] == ["One note.", "[b]Two."]


def test_sizes():
    dense = tiny_model(tied=True)
    sliced = slice_model(dense, [tokens(4, 32)], sparsity=0.25, progress=False)
    rows = {row.label.strip(): (row.dense, row.sliced) for row in size_measures(dense, sliced)}
    assert rows == {
        "stored parameters": (stored_parameters(dense), stored_parameters(sliced)),
        "in decoder blocks": (block_parameters(dense), block_parameters(sliced)),
        "bytes": (4 * stored_parameters(dense), 4 * stored_parameters(sliced)),
        "matmul FLOPs per token": (flops_per_token(dense), flops_per_token(sliced)),
    }
    assert [note.partition(":")[0] for note in size_notes(dense, sliced)] == ["Stored", "FLOPs"]
    assert [note.partition(":")[0] for note in size_notes(dense, dense)] == ["FLOPs"]  # the tie stays
    assert [note.partition(":")[0] for note in size_notes(tiny_model(), sliced)] == ["FLOPs"]


LEFT = dict(full_width=48, widths=(48,) * 7, groups=(0,) * 7)  # the stream, left alone


class TestCuts:
    @pytest.mark.parametrize(
        ("plan", "title"),
        [
            (
                SlicePlan(None, "normalized", **LEFT, channels=(80, 32, 64), values=(12, 8, 8)),
                "A model, channels 32 to 80 of 80, values 8 to 12 of 12, stream 48 of 48",
            ),
            (SlicePlan(None, "normalized", **LEFT, channels=(64,) * 3), "A model, channels 64 of 80, stream 48 of 48"),
            (
                SlicePlan("shared", "normalized", **LEFT | dict(widths=(40,) * 7), values=(8,) * 3),
                "A model, values 8 of 12, stream 40 of 48",
            ),
            (
                SlicePlan("shared", "normalized", **LEFT | dict(widths=(40,) * 7)),
                "A model, shared basis, normalized signal, 40 of 48 directions kept",
            ),
        ],
    )
    def test_title(self, plan, title):
        assert plan_title("A model", tiny_model(), plan) == title

    def test_layers_of_different_sizes(self):
        plan = SlicePlan(None, "normalized", **LEFT, channels=(80, 40, 32))
        assert kept_sizes(tiny_model("qwen3-moe"), plan) == "channels 32 to 80 of 40 to 80, stream 48 of 48"

    def test_trials(self):
        trials = (Trial(Sizes(48, (80, 32, 64), (), 0.79, 0.0151), 0.0204), Trial(Sizes(40, (), (8, 8, 8), 0.8, 1.5)))
        page = StringIO()
        Console(width=100, file=page).print(cut_table(CutResult(tiny_model(), None, trials, None)))
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in page.getvalue().splitlines()]
        assert ["48", "32 to 80", "as before", "0.790", "0.015", "0.020"] in cells
        assert ["40", "as before", "8", "0.800", "1.500", ""] in cells

    def test_plot(self, tmp_path):
        both = SlicePlan(None, "normalized", **LEFT, channels=(80, 32, 64), values=(12, 8, 8))
        full = dense_sizes(Decoder(tiny_model()))
        images = []
        for number, plan in enumerate((both, both, replace(both, values=()), replace(both, channels=(80, 32, 32)))):
            plot_sizes(plan, full, tmp_path / f"{number}.png")
            images.append(matplotlib.image.imread(tmp_path / f"{number}.png"))
        assert {image.shape for image in images} == {(750, 1800, 4)}
        assert [(image == images[0]).all() for image in images] == [True, True, False, False]


@pytest.mark.parametrize("basis", ["per-norm", "shared", 2])
def test_plot(basis, tmp_path):
    model = tiny_model()
    bases = fit_bases(model, [tokens(4, 32)], SliceOptions(sparsity=0.5, basis=basis), progress=False)
    plot_spectra(bases, tmp_path / "plain.png")
    plot_spectra(bases, tmp_path / "again.png")
    narrower = fit_bases(model, [tokens(4, 32)], SliceOptions(sparsity=0.75, basis=basis), progress=False)
    plot_spectra(narrower, tmp_path / "narrower.png")
    plain, again, other = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("plain", "again", "narrower"))
    assert plain.shape == other.shape == (750, 1800, 4)
    assert (plain == again).all()
    assert (plain != other).any()


def test_plot_of_a_stream_that_fills_few_directions(tmp_path):
    """Eigenvalues of zero, and less than zero by rounding, are drawn at the floor without a warning."""
    bases = fit_bases(tiny_model(), [tokens(4, 32)], SliceOptions(sparsity=0.5, basis="shared"), progress=False)
    bases.spectra[:, 10:] = torch.linspace(0, -1e-17, 38)
    plot_spectra(bases, tmp_path / "flat.png")
    assert matplotlib.image.imread(tmp_path / "flat.png").shape == (750, 1800, 4)
