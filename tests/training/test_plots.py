"""Pictures: what is in them, that they are PNG files, and that nothing global changes."""

import math
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from training import data, plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look inside."""
    figures = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, *rest: figures.append(figure) or save(figure, *rest))
    return figures


def is_picture(path):
    with Image.open(path) as image:
        return path.suffix == ".png" and image.format == "PNG" and len(np.unique(image.convert("L"))) > 2


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.parametrize("d", [1, 2, 16])
def test_latents(tmp_path, drawn, d):
    z = torch.randn(200, d, generator=torch.Generator().manual_seed(0))
    far = torch.cat([z[:50], torch.full((1, d), 1e6)])  # must not shrink the picture to a dot
    sets = {"unguided": z[:30] + 0.1, "guided": far}
    path = plots.latents(tmp_path / "pictures" / "latents", z, -z.square().sum(1) / 2, -z, sets)
    assert path == tmp_path / "pictures" / "latents.png" and is_picture(path)
    real, unguided, guided = drawn[0].axes[:3]
    assert "n = 200" in real.get_title() and "unguided (n = 30)" in unguided.get_title()
    assert "n = 51, 1 outside the frame" in guided.get_title()
    assert np.abs(guided.get_xlim()).max() < 10
    quiver = next(c for c in real.collections if isinstance(c, matplotlib.quiver.Quiver))
    assert quiver.N == 60
    along = quiver.U * quiver.X + quiver.V * quiver.Y  # the score of a Gaussian points home, in any projection of it
    assert (along <= 1e-6).mean() > 0.9 and along.sum() < 0


def test_latents_survive_rows_without_density(tmp_path):
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e9, 0.0]])
    log_density = torch.tensor([-1.0, -2.0, -math.inf])
    assert is_picture(
        plots.latents(tmp_path / "a.png", z, log_density, torch.tensor([[1.0, 0], [0, 1], [math.nan] * 2]))
    )
    assert is_picture(plots.latents(tmp_path / "b.png", z[:1], log_density[:1], z[:1]))


def test_density_histogram(tmp_path, drawn):
    path = plots.density_histogram(
        tmp_path / "h", torch.tensor([-1.0, -2, -3]), {"guided": np.array([-4.0, -5, -6, -math.inf])}
    )
    assert is_picture(path)
    words = texts(drawn[0])
    assert "real (n = 3, median -2.00)" in words and "guided (n = 3, median -5.00)" in words
    assert any("1 rows without a finite density" in word for word in words)
    for polygon in drawn[0].axes[0].patches:  # three rows in three bins, as shares of their own set
        assert polygon.get_xy()[:, 1].max() == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match="at least one finite log-density"):
        plots.density_histogram(tmp_path / "h", [math.nan], {})


def test_loss_curves(tmp_path, drawn):
    rows = [{"step": i, "loss_diffusion": 2.0, "lr": 0.1} for i in range(40)]
    rows += [{"step": i, "loss_diffusion": 2.0, "loss_info_nce": float(i), "note": "x"} for i in range(40, 80)]
    assert is_picture(plots.loss_curves(tmp_path / "l.png", rows))
    first, second = drawn[0].axes
    assert (first.get_title(), second.get_title()) == ("loss diffusion", "loss info nce")
    assert np.allclose(first.lines[1].get_ydata(), 2)  # the running mean has no dip at the ends
    assert first.lines[0].get_xdata().tolist() == list(range(80)) and len(second.lines[0].get_xdata()) == 40
    assert is_picture(plots.loss_curves(tmp_path / "m", [{"epoch": 1, "loss": 3.0}], x="epoch"))
    with pytest.raises(ValueError, match="a key that contains 'loss'; got 1 rows"):
        plots.loss_curves(tmp_path / "l", [{"step": 1, "lr": 0.1}])


def test_comparison(tmp_path, drawn):
    table = {"k-means": {"acc": [0.5, 0.7], "acc_tail": [None, None]}, "DGD": {"acc": [0.6, 0.8]}}
    assert is_picture(plots.comparison(tmp_path / "c", table, title="digits-lt", unit="accuracy"))
    words = texts(drawn[0])
    assert {"k-means", "DGD", "acc", "acc tail", "accuracy", "0.600", "0.700", "none", "digits-lt"} <= set(words)
    assert any("over 2 seeds" in word for word in words)
    top, bottom = drawn[0].axes[0].get_yticks()[:2]
    assert drawn[0].axes[0].transData.transform((0, top))[1] > drawn[0].axes[0].transData.transform((0, bottom))[1]
    with pytest.raises(ValueError, match="got no values"):
        plots.comparison(tmp_path / "c", {})


def test_class_mass(tmp_path, drawn):
    truth = torch.tensor([0.1, 0.6, 0.3])
    shares = {"unguided": torch.tensor([0.1, 0.5, 0.4]), "guided": np.array([[0.2, 0.6, 0.2], [0.4, 0.4, 0.2]])}
    assert is_picture(plots.class_mass(tmp_path / "m", truth, shares))
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "0"]  # head first
    assert [bar.get_height() for bar in axes.containers[0]] == pytest.approx([50, 40, 10], rel=1e-5)
    assert {"unguided (TV 0.100)", "guided (TV 0.200)", "truth"} <= set(texts(drawn[0]))
    with pytest.raises(ValueError, match="expected 3 shares for 'guided'; got 2"):
        plots.class_mass(tmp_path / "m", truth, {"guided": [0.5, 0.5]})


@pytest.mark.parametrize("n", [1, 5, 60])
def test_assignments(tmp_path, drawn, n):
    z = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    label = np.arange(n) % 3
    assert is_picture(plots.assignments(tmp_path / "e.png", z, label, label[::-1].copy(), at_most=50))
    left, right = drawn[0].axes[:2]
    shown = min(n, 50)
    assert (left.get_title(), right.get_title()) == ("coloured by cluster", "coloured by class")
    assert len(left.collections[0].get_offsets()) == shown
    assert any(f"{shown} of {n} rows" in word for word in texts(drawn[0]))
    assert is_picture(plots.assignments(tmp_path / "same", torch.ones(9, 4), np.zeros(9, int), np.arange(9)))


def test_confusion_is_after_matching(tmp_path, drawn):
    label, truth = np.array([1, 1, 1, 0, 0, 2]), np.array([0, 0, 0, 1, 1, 1])
    assert is_picture(plots.confusion(tmp_path / "c", label, truth))
    axes = drawn[0].axes[0]
    assert axes.get_title() == "Clusters matched to classes, ACC 0.833"
    image = axes.images[0].get_array()
    assert image[0].tolist() == [100, 0, 0] and image[1].tolist() == pytest.approx([0, 200 / 3, 100 / 3])
    assert {"3", "2", "1"} <= {text.get_text() for text in axes.texts}


def test_averaging_and_sweep(tmp_path, drawn):
    samples = {"count": [1, 2, 4], "clean": [[0.5, 0.7], [0.7, 0.7], [0.8, 0.8]], "augmented": [[0.2, 0.2], [0.4, 0.4], [0.6, 0.6]]}
    assert is_picture(plots.averaging(tmp_path / "a", samples))
    lines = {line.get_label(): line[0].get_ydata().tolist() for line in drawn[0].axes[0].containers}
    assert lines["clean"] == pytest.approx([0.6, 0.7, 0.8]) and lines["augmented"] == pytest.approx([0.2, 0.4, 0.6])
    panels = {"F^2": {"digits": {4.0: [0.5, 0.6], 25.0: [0.9, 0.9]}}, "d": {"digits": {8.0: [0.1, 0.3]}}}
    assert is_picture(plots.sweep(tmp_path / "s", panels, title="two options"))
    left, right = drawn[1].axes
    assert left.containers[0][0].get_ydata().tolist() == pytest.approx([0.55, 0.9]) and right.get_xlabel() == "d"
    assert {"two options", "4", "25"} <= set(texts(drawn[1])) and any("over 2 seeds" in word for word in texts(drawn[1]))


def test_nothing_global_changes(tmp_path):
    before = dict(matplotlib.rcParams)
    z, *_ = data.synthetic_latents("moons", 50)
    plots.latents(tmp_path / "z", z, z[:, 0], z)
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")  # another library may have imported it
    assert pyplot is None or not pyplot.get_fignums()
