"""Tables say what the models are; plots are images of the spectra."""

from io import StringIO

import matplotlib.image
import pytest
import torch
from models import tiny_model, tokens
from rich.console import Console

from slicegpt_fast import slice_model
from slicegpt_fast.evaluation import flops_per_token, stored_parameters
from slicegpt_fast.plots import plot_spectra
from slicegpt_fast.slicing import SliceOptions, block_parameters, fit_bases
from slicegpt_fast.tables import Measure, comparison, decimal, size_measures, size_notes


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
    assert [note.partition(":")[0] for note in size_notes(dense)] == ["Stored", "FLOPs"]
    assert [note.partition(":")[0] for note in size_notes(tiny_model())] == ["FLOPs"]


@pytest.mark.parametrize("basis", ["per-norm", "shared", 2])
def test_plot(basis, tmp_path):
    model = tiny_model()
    bases = fit_bases(model, [tokens(4, 32)], SliceOptions(sparsity=0.5, basis=basis), progress=False)
    plot_spectra(bases, tmp_path / "plain.png")
    plot_spectra(bases, tmp_path / "again.png")
    sites = fit_bases(model, [tokens(4, 32)], SliceOptions(sparsity=0), progress=False).spectra
    plot_spectra(bases, tmp_path / "sites.png", sites=sites)
    plain, again, with_sites = (
        matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("plain", "again", "sites")
    )
    assert plain.shape == with_sites.shape == (750, 1800, 4)
    assert (plain == again).all()
    assert (plain != with_sites).any()


def test_plot_of_a_stream_that_fills_few_directions(tmp_path):
    """Eigenvalues of zero, and less than zero by rounding, are drawn at the floor without a warning."""
    bases = fit_bases(tiny_model(), [tokens(4, 32)], SliceOptions(sparsity=0.5, basis="shared"), progress=False)
    bases.spectra[:, 10:] = torch.linspace(0, -1e-17, 38)
    plot_spectra(bases, tmp_path / "flat.png")
    assert matplotlib.image.imread(tmp_path / "flat.png").shape == (750, 1800, 4)
