"""The figures of 001: closed forms of its toy examples with their numbers, Fig. 7 on white noise and on image folders, the table's jobs."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import ltkernels
from training import checkpoint, data, evaluate, figures_runs, figures_t2h, run_images, toy
from training.__main__ import main
from training.config import T2HConfig
from training.loop import generator
from training.runfolder import open_folder

CIFAR_LT = torch.tensor(data.long_tail_counts(5000, 10, 100))
DISTANCES = {  # |x_i - x_j| / sigma: probability of the transfer, its bound (beta = 0)
    0.0: (0.5, 0.5), 0.5: (0.470527, 0.484617), 1.0: (0.397973, 0.441248), 2.0: (0.224800, 0.303265), 3.0: (0.098621, 0.162326),
    4.0: (0.034299, 0.067668),
}  # fmt: skip


# ---- two images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance, expected", DISTANCES.items())
def test_two_images(distance, expected):
    probability, bound = toy.two_images(distance), toy.two_images_bound(distance)
    assert (probability, bound) == pytest.approx(expected, abs=1e-6)
    assert probability <= bound + 1e-12


RATIOS = {100: {1: 0.974537, 2: 0.836964, 4: 0.219052}, 0.01: {1: 0.009745, 2: 0.008370, 4: 0.002191}}


@pytest.mark.parametrize("ratio, expected", RATIOS.items())
def test_two_images_of_different_classes(ratio, expected):
    """beta = 1: q_j / q_i. A prior for the other image makes its share grow."""
    for distance, probability in expected.items():
        assert toy.two_images(distance, ratio) == pytest.approx(probability, abs=1e-6)


def test_proposition_3_1_needs_its_root():
    """D10: E over the unnormalised q_H exp(..) is q_H P(H -> T). The printed bound has (q_H q_T)^beta, a proof gives its root."""
    head, tail = 0.403, 0.00403
    for distance in (0.25, 0.5, 1.0, 2.0, 3.0, 4.0):
        for own, other in ((head, tail), (tail, head)):
            probability = toy.two_images(distance, other / own)
            assert probability <= toy.two_images_bound(distance, other / own)
            assert own * probability <= math.sqrt(head * tail) * math.exp(-(distance**2) / 8) / 2  # beta = 1, corrected
    left, printed = head * toy.two_images(1.0, tail / head), head * tail * math.exp(-1 / 8) / 2
    assert left == pytest.approx(0.00393, abs=1e-5) and printed == pytest.approx(0.000717, abs=1e-6) and left > printed
    assert math.sqrt(head * tail) * math.exp(-1 / 8) / 2 == pytest.approx(0.01778, abs=1e-5)


# ---- white noise and Fig. 7 ------------------------------------------------------------------------------------------


def level(t):
    return figures_t2h.coefficients(T2HConfig(), [t])[0]


def white(size, t, rows):
    return figures_t2h.white_curve(size, rows, [level(t)], seed=0)


def test_at_the_last_time_every_image_is_as_likely():
    x = torch.rand(128, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    p = ltkernels.p_sel(torch.zeros_like(x), x, 0.0, 1.0)
    torch.testing.assert_close(1 - p.diagonal(), torch.full((128,), 127 / 128), rtol=0, atol=1e-6)
    curve = white(128, 1000, 256)
    assert curve["mean"][0] == pytest.approx(127 / 128, abs=1e-3) and curve["batches"] == 2


FIG7 = {500: 0.0, 550: 0.001, 600: 0.059, 650: 0.365, 700: 0.747, 750: 0.929, 800: 0.976, 900: 0.990, 1000: 0.992}


def test_white_noise_curve_of_fig_7(monkeypatch):
    """200 fresh batches of 128 points, 64 of them noisy; the mean of such a batch has a standard deviation of .04 at t = 650."""
    monkeypatch.setattr(figures_t2h, "NOISY", 64)
    curve = figures_t2h.white_curve(128, 200 * 64, [level(t) for t in FIG7], seed=0)
    assert curve["batches"] == 200 and 0.02 < curve["sd"][3] < 0.06
    assert curve["mean"] == pytest.approx(list(FIG7.values()), abs=0.01)


def test_transfer_grows_with_the_batch():
    """At t = 650: .133, .363, .630 for K = 16, 128, 1024, by ten times as many batches as here."""
    small, large = white(16, 650, 16_384)["mean"][0], white(1024, 650, 8192)["mean"][0]
    assert small == pytest.approx(0.133, abs=0.006) and large == pytest.approx(0.63, abs=0.01)
    assert abs(small - 0.147) > 0.01  # another figure in circulation for K = 16, with this tolerance, is refuted


def direct(size, t, batches, spectrum):
    """The same with all 3072 coordinates, of standard deviations `spectrum`, and no points turned."""
    rng, own, ones = generator(0, "direct", size), torch.arange(size), torch.ones(size)
    scale, std = level(t)
    points = [torch.randn(size, 3072, generator=rng) * spectrum for _ in range(batches)]
    return np.mean([figures_t2h.moved(x, x, own, ones, own, scale, std, rng)[0] for x in points])


def test_turned_points_are_no_approximation():
    assert direct(16, 650, 250, torch.tensor(0.5)) == pytest.approx(white(16, 650, 4096)["mean"][0], abs=0.015)
    points = torch.stack([toy.white_points(8, 3072, 0.5, np.random.default_rng(seed)) for seed in range(300)])
    assert points.shape == (300, 8, 8) and toy.white_points(8, 3, 0.5, np.random.default_rng(0)).shape == (8, 3)
    gram = (points @ points.mT / (0.25 * 3072)).mean(0)  # E = I, standard deviation of an entry sqrt(1 or 2 / 3072)
    torch.testing.assert_close(gram, torch.eye(8), rtol=0, atol=5 * math.sqrt(2 / 3072 / 300))
    narrow = torch.stack([toy.white_points(8, 3, 0.5, np.random.default_rng(seed)) for seed in range(2000)])
    gram = (narrow @ narrow.mT / (0.25 * 3)).mean(0)
    torch.testing.assert_close(gram, torch.eye(8), rtol=0, atol=5 * math.sqrt(2 / 3 / 2000))


@pytest.mark.parametrize("t, expected", [(600, 0.086), (650, 0.413), (700, 0.769), (800, 0.976)])
def test_a_spectrum_like_that_of_images_rises_at_the_same_times(t, expected):
    """Variances 1 / k with the mean .25 of the white points; figures of 150 batches, here 30 (standard error .006 at t = 650)."""
    variance = 1 / torch.arange(1, 3073)
    found = direct(128, t, 30, (0.25 * variance / variance.mean()).sqrt())
    assert found == pytest.approx(expected, abs=0.02)
    assert t != 650 or abs(found - 0.361) > 0.03  # another figure in circulation; those for the other times agree with ours to .012


def test_moved_is_the_mean_of_score_select():
    """For every gate, and with a copy of an image in the batch, which is no other image."""
    rng = torch.Generator().manual_seed(0)
    x, y, counts = torch.randn(20, 6, generator=rng), torch.arange(20) % 4, torch.tensor([40, 20, 20, 5])
    source = torch.cat([torch.arange(20), torch.tensor([3, 3])])
    x, y, own, (scale, std) = x[source], y[source], torch.arange(12), (0.8, 0.9)
    found = figures_t2h.moved(x[own], x, source, counts[y], own, scale, std, torch.Generator().manual_seed(1))
    x_t = scale * x[own] + std * torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    for gate, expected in zip(figures_t2h.GATES, found, strict=True):
        shares = []
        for seed in range(400):
            chosen = ltkernels.score_select(
                x_t, x, scale, std, gate=gate, labels=y, class_counts=counts, self_index=own, seed=seed
            ).index  # fmt: skip
            shares.append((source[chosen] != source[own]).float().mean())
        assert torch.stack(shares).mean() == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(12 * 400))


def test_uniform_choices_and_the_gates():
    """(1 + sum p^2) / 2 of a long-tailed batch, (1 + 1 / 10) / 2 of a balanced one; the rarest class passes always, the head to itself."""
    shares, even = CIFAR_LT.double() / CIFAR_LT.sum(), torch.full((10,), 0.1, dtype=torch.float64)
    assert float(shares.square().sum()) == pytest.approx(0.25350, abs=1e-5)
    accepted = {gate: toy.uniform_acceptance(shares, CIFAR_LT, gate) for gate in figures_t2h.GATES}
    assert float(shares @ accepted["t2h"]) == pytest.approx(0.62675, abs=1e-5) == float(shares @ accepted["h2t"])
    assert float(even @ toy.uniform_acceptance(even, CIFAR_LT, "t2h")) == pytest.approx(0.55)
    assert float(accepted["t2h"][-1]) == pytest.approx(1) == float(accepted["h2t"][0])
    assert float(accepted["t2h"][0]) == pytest.approx(float(shares[0])) and float(accepted["h2t"][-1]) == pytest.approx(float(shares[-1]))
    torch.testing.assert_close(toy.uniform_acceptance(even, CIFAR_LT, "t2h"), toy.uniform_acceptance(even, CIFAR_LT, "h2t").flip(0))

    y = torch.multinomial(shares, 100, replacement=True, generator=torch.Generator().manual_seed(0))
    own, zeros = torch.arange(100).repeat(40), torch.zeros(4000, 1)  # scale 0: a choice among all, whatever the images are
    call = {"labels": y, "class_counts": CIFAR_LT, "self_index": own, "seed": 1}
    index = {gate: ltkernels.score_select(zeros, zeros[:100], 0.0, 1.0, gate=gate, **call).index for gate in figures_t2h.GATES}
    batch = torch.bincount(y, minlength=10).double() / 100
    for gate in figures_t2h.GATES:
        expected = float(batch @ toy.uniform_acceptance(batch, CIFAR_LT, gate)) - 1 / 100  # the own image is no move
        assert float((index[gate] != own).double().mean()) == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(4000))
    call["class_counts"] = torch.full((10,), 7)
    level = {gate: ltkernels.score_select(zeros, zeros[:100], 0.0, 1.0, gate=gate, **call).index for gate in figures_t2h.GATES}
    assert torch.equal(level["t2h"], index["full"]) and torch.equal(level["h2t"], index["full"])  # all ties: no gate


# ---- the toy of appendix J -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma, score", [(0.5, 8.712871), (1.0, 3.267327), (2.0, 0.933522), (3.0, 0.426173)])
def test_score_between_two_gaussians(sigma, score):
    middle = torch.zeros(1, 2)
    assert toy.two_gaussians(middle, sigma)[0].tolist()[0] == pytest.approx([0, score], abs=1e-6)
    assert toy.two_gaussians(middle, sigma, ratio=1.0)[0].tolist()[0] == pytest.approx([0, 0], abs=1e-12)


def test_who_rules_the_tail():
    tail = toy.CENTRES[1:]
    head = {sigma: float(toy.two_gaussians(tail, sigma)[1]) for sigma in (1.0, 2.0, 3.0)}
    assert head[1.0] == pytest.approx(2.62e-10, rel=2e-3) and head[2.0] == pytest.approx(0.0468, abs=5e-5)
    assert head[3.0] == pytest.approx(0.7553, abs=5e-5)
    assert float(toy.two_gaussians(tail, 3.0, ratio=1.0)[1]) == pytest.approx(0.02994, abs=5e-6)
    for sigma, height in ((1.0, -0.69078), (2.0, -2.41771), (3.0, -5.29595), (2.5978, -4.0)):
        assert toy.equal_line(sigma) == pytest.approx(height, abs=1e-4)
        on_it = torch.tensor([[1.5, toy.equal_line(sigma)]], dtype=torch.float64)
        assert float(toy.two_gaussians(on_it, sigma)[1]) == pytest.approx(0.5, abs=1e-9)


def test_score_of_samples_comes_near_the_closed_form():
    samples = toy.gaussian_samples(10_000, 100, torch.Generator().manual_seed(0))
    at = torch.tensor([[0.0, 0.0], [2.0, 1.0], [0.0, -4.0], [-3.0, -5.0]])
    for sigma in (1.0, 2.0, 3.0):
        exact, of_samples = toy.two_gaussians(at, sigma)[0].float(), toy.sample_score(at, samples, sigma)
        torch.testing.assert_close(of_samples, exact, rtol=0.1, atol=0.15)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three classes of 24, 12 and 6 tiny PNGs."""
    rng = np.random.RandomState(0)
    for name, count in (("cat", 24), ("dog", 12), ("eel", 6)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.randint(0, 256, (9, 7, 3), np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_pictures_of_an_image_folder(tmp_path, folder, capsys):
    out = tmp_path / "out"
    command = ["figures", "t2h", "--parts", "mixing", "transfer", "--dataset", f"folder:{folder}", "--image-size", "8"]
    command += ["--sizes", "4", "16", "64", "--rows", "32", "--out", str(out), "--no-progress"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert (out / "figures.md").read_text().strip() == text.strip() and "whole set, 42" in text
    transfer, mixing = (json.loads((out / f"{name}.json").read_text()) for name in ("transfer", "mixing"))
    assert list(transfer["curves"]["t2h"]) == ["K = 4", "K = 16", "whole set, 42"]  # no batch of 64 of 42 images
    full = transfer["curves"]["full"]["K = 16"]
    assert full["batches"] == 2 and full["mean"][0] < 1e-3 and full["mean"][-1] > 0.85
    for gate in ("t2h", "h2t"):
        assert (np.array(transfer["curves"][gate]["K = 16"]["mean"]) <= np.array(full["mean"]) + 1e-6).all()
    assert mixing["counts"] == [24, 12, 6] and mixing["own"] == 1
    for betas in mixing["weights"]:
        plain, to_head, to_tail = map(np.array, betas)
        assert betas[0] and np.sum(betas, 1) == pytest.approx(np.ones(3), abs=1e-5)
        assert to_head[0] > plain[0] > to_tail[0] and to_tail[2] > plain[2] > to_head[2]
    for name in ("mixing", "transfer"):
        with Image.open(out / f"{name}.png") as image:
            assert image.format == "PNG"


def test_field_picture_and_numbers(tmp_path):
    figures_t2h.field(T2HConfig(), tmp_path, arrows=5, pixels=9)
    with Image.open(tmp_path / "field.png") as image:
        assert image.format == "PNG"


class Runs:
    """`run_images.images` without the training: writes the folder of a finished run, whose figures say which run it was."""

    def __init__(self):
        self.made, self.features = [], "a classifier"

    def __call__(self, method, settings, preset):
        dataset = run_images.load(method, settings)
        out = open_folder(method, settings, preset, dataset)
        number = len(self.made) + 1.0
        self.made.append((out.name, method, settings))
        report = {"features": self.features, "n": 200, "reference": "digits", "guidance": settings.omega, "seconds": 1.0}
        report |= {"class_fid": [number]} | {figure: number for figure in evaluate.SCORES} | {"recall": None}
        report["fid_tail"] = None if out.name == "F-0" else number
        checkpoint.write_json(out / "metrics.json", report)
        return report


@pytest.fixture
def runs(monkeypatch):
    made = Runs()
    monkeypatch.setattr(run_images, "images", made)
    return made


def test_table_of_runs(tmp_path, capsys, runs):
    command = ["figures", "t2h", "--parts", "table", "--steps", "70", "--seeds", "3", "4", "--out", str(tmp_path), "--no-progress"]
    assert main(command) == 0
    text = capsys.readouterr().out
    by_name = {name: (method, settings) for name, method, settings in runs.made}
    assert len(runs.made) == 12 and all(settings.steps == 70 for _, settings in by_name.values())
    told = {name: (method, one.batch_resample, getattr(one, "transfer_mode", None)) for name, (method, one) in by_name.items()}
    assert told["F-3"] == ("ddpm", "none", None) and told["G-3"] == ("ddpm", "balanced", None) and told["CBDM-4"] == ("cbdm", "none", None)
    assert [told[f"{name}-4"] for name in "HIJ"] == [("t2h", "balanced", mode) for mode in ("h2t", "full", "t2h")]
    assert by_name["J-4"][1].seed == 4 and by_name["J-4"][1].transfer_cut_time is None
    summary = json.loads((tmp_path / "table.json").read_text())
    assert summary["table"]["F"]["fid"] == [1, 7] and summary["table"]["CBDM"]["fid"] == [6, 12]
    assert summary["class_fid"]["J"] == [[5], [11]]
    assert "seeds 3, 4; 200 samples, guidance 0.5, features: a classifier, reference: digits" in text
    assert "| J: G + T2H | 8.000 ± 4.243 |" in text and "| - |" in text
    with Image.open(tmp_path / "table.png") as image:
        assert image.format == "PNG"

    assert main(command) == 0 and len(runs.made) == 12  # nothing is run again
    assert main([*command[:-1], "--omega", "1.5", "--no-progress"]) == 2
    assert "was made with other settings (omega: 0.5 != 1.5); give another --out" in capsys.readouterr().err
    (tmp_path / "G-4" / "metrics.json").unlink()
    assert main(command) == 0 and runs.made[-1][0] == "G-4" and runs.made[-1][2].resume  # cut short: goes on
    runs.features = "Inception"
    (tmp_path / "G-4" / "metrics.json").unlink()
    assert main(command) == 2
    assert "were evaluated with different features (Inception, a classifier)" in capsys.readouterr().err


def test_steps_and_cut_share_the_table_s_runs(tmp_path, capsys, runs):
    command = ["figures", "t2h", "--steps", "100", "--seeds", "0", "1", "2", "--out", str(tmp_path), "--no-progress", "--parts"]
    assert main([*command, "table"]) == 0 and len(runs.made) == 18
    assert main([*command, "steps", "cut"]) == 0
    text = capsys.readouterr().out
    new = {name: settings for name, _, settings in runs.made[18:]}
    assert len(new) == 2 * (4 * 2 + 4)  # two seeds: four rows at two further lengths, four cut times
    assert new["CBDM-1-steps300"].steps == 300 and new["F-0-steps20"].steps == 20
    assert {new[name].transfer_cut_time for name in new if "cut" in name} == {200, 400, 600, 800}
    steps, cut = (json.loads((tmp_path / f"{part}.json").read_text()) for part in ("steps", "cut"))
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    line = steps["panels"]["fid"]["J: G + T2H"]
    assert list(line) == ["20", "100", "300"] and line["100"] == table["J"]["fid"][:2]
    curve = cut["panels"]["memorisation"]["T2H below the cut time"]
    assert list(curve) == ["0", "200", "400", "600", "800", "1000"]
    assert curve["0"] == table["G"]["fid"][:2] and curve["1000"] == table["J"]["fid"][:2]
    assert (tmp_path / "figures.md").read_text().count("features: a classifier") == 3 and text.count("features: a classifier") == 3
    for part in ("steps", "cut"):
        with Image.open(tmp_path / f"{part}.png") as image:
            assert image.format == "PNG"


def test_anchor_chooses_rows_anew_for_every_seed(tmp_path, capsys, monkeypatch):
    seen = []

    def score(dataset, reference, settings):
        seen.append(dataset.indices.tolist())
        about = {"n": len(dataset), "reference": f"{reference.name}, n = {len(reference)}", "features": "some"}
        return {**about, "fid": 20.0 + len(seen), "is": 6.0}

    monkeypatch.setattr(evaluate, "real_data_anchor", score)
    assert main(["figures", "t2h", "--parts", "anchor", "--seeds", "0", "1", "--out", str(tmp_path), "--no-progress"]) == 0
    assert len(seen) == 2 and len(seen[0]) == 587 and seen[0] != seen[1]
    assert "reference: digits, n = 1797" in (text := capsys.readouterr().out) and "n = 587 | 21.500 ± 0.707 | 6.000 ± 0.000 |" in text


@pytest.mark.parametrize(
    "words, message",
    [(["--parts", "nonsense"], "invalid choice: 'nonsense'"), (["--parts", "transfer", "--rows", "0"], "--sizes and --rows must be >= 1")],
)
def test_wrong_calls(tmp_path, capsys, words, message):
    try:
        code = main(["figures", "t2h", *words, "--out", str(tmp_path)])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_rows_of_the_table_are_what_their_names_say():
    """Whatever variant the command line asks for elsewhere."""
    settings = T2HConfig(transfer_beta=1.0, transfer_cut_time=300, transfer_estimator="mean")
    for name, mode in (("H", "h2t"), ("I", "full"), ("J", "t2h")):
        method, own = figures_t2h.METHODS[name]
        row = figures_runs.configured(method, settings, **own)
        assert (row.transfer_mode, row.transfer_beta, row.transfer_cut_time, row.transfer_estimator) == (mode, None, None, "sample")
        assert row.batch_resample == "balanced"
