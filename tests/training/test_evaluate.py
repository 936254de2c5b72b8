"""Evaluation of generated images: what a report says, what it refuses to say, the cache, and the pictures."""

import dataclasses
import json
import multiprocessing
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from training import checkpoint, classifier, data, evaluate, metrics, plots
from training.__main__ import main
from training.config import T2HConfig

FIGURES = {
    "fid", "fid_head", "fid_med", "fid_tail", "class_fid", "class_fid_rank_deficient", "is", "is_sd", "f8", "f1_8", "precision", "recall",
    "memorisation", "memorisation_all", "memorisation_in", "n", "reference", "guidance", "features", "split_ref", "split_rule", "remarks",
}  # fmt: skip


def images(labels, channels=1, size=8, seed=0, noise=0.3):
    """A pattern for every class, and noise."""
    patterns = torch.rand(int(labels.max()) + 1, channels, size, size, generator=torch.Generator().manual_seed(99)) * 2 - 1
    rng = torch.Generator().manual_seed(seed)
    return (patterns[labels] + noise * torch.randn(len(labels), channels, size, size, generator=rng)).clamp(-1, 1)


def made(counts, **options):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return data.Dataset("made", images(labels, **options), None, labels, torch.arange(len(labels)), len(counts), tuple(counts))


def plain_net(width=6, name="projection"):
    """Random features of whatever image size."""

    def net(x):
        x = (x.float() / 255 if x.dtype == torch.uint8 else x).flatten(1)
        matrix = torch.randn(x.shape[1], width + 4, generator=torch.Generator().manual_seed(1))
        out = x @ matrix
        return out[:, :width], out[:, width:]

    return evaluate.FeatureNet(name, net)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One clustering instead of ten, and a classifier of a few steps."""
    original = metrics.prd
    monkeypatch.setattr(metrics, "prd", lambda *sets, **options: original(*sets, **{**options, "runs": 1}))
    monkeypatch.setattr(classifier, "STEPS", 30)
    monkeypatch.setattr(classifier, "EPOCHS", 0)


def report_of(samples, labels, dataset, reference, net=None, **options):
    out = evaluate.evaluate_images(samples, labels, dataset, reference, net or plain_net(), **{"guidance": 0.5, **options})
    json.dumps(out, allow_nan=False)
    assert set(out) == FIGURES
    return out


# ---- a report --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 10, 8), (3, 2, 5), (3, 3, 32), (1, 200, 8)])
def test_a_report_for_any_images_and_classes(channels, classes, size):
    counts = np.linspace(30, 3, classes).astype(int).tolist()
    dataset, reference = (made(c, channels=channels, size=size, seed=s) for c, s in ((counts, 0), ([9] * classes, 1)))
    labels = torch.arange(classes).repeat_interleave(8)
    out = report_of(evaluate.to_uint8(images(labels, channels, size, seed=2)), labels, dataset, reference)
    assert out["n"] == 8 * classes and out["reference"] == f"made, n = {9 * classes}" and out["features"] == "projection"
    assert len(out["class_fid"]) == classes and None not in out["class_fid"] and not out["class_fid_rank_deficient"]
    assert all(out[name] is not None for name in ("fid", "fid_head", "fid_tail", "is", "precision", "recall", "memorisation"))
    assert out["f8"] is None and f"num_clusters must be in [1, {16 * classes}]" in out["remarks"]["f8"]  # 20 C clusters of 16 C rows
    assert f"compare {8 * classes} rows of each set" in out["remarks"]["equal_sets"]


def test_figures_are_those_of_the_metrics_on_the_right_rows():
    dataset, reference, net = made([60, 40, 30, 20, 12]), made([50] * 5, seed=1), plain_net()
    labels = torch.arange(5).repeat_interleave(40)
    samples = images(labels, seed=2)
    out = report_of(samples, labels, dataset, reference, seed=3)
    rounded, real = net(evaluate.to_uint8(samples))[0], net(evaluate.to_uint8(reference.images))[0]
    fid = lambda a, b: metrics.frechet_distance(metrics.moments(a), metrics.moments(b))  # noqa: E731
    assert out["fid"] == pytest.approx(fid(rounded, real))
    assert out["fid_head"] == pytest.approx(fid(rounded[labels < 2], real[reference.labels < 2]))
    assert out["fid_med"] == out["class_fid"][2] == pytest.approx(fid(rounded[labels == 2], real[reference.labels == 2]))
    assert out["fid_tail"] == pytest.approx(fid(rounded[labels > 2], real[reference.labels > 2]))
    pixels, train = (evaluate.to_uint8(x).flatten(1) / 127.5 - 1 for x in (samples, dataset.images))
    tail = (dataset.labels > 2).nonzero().flatten()
    assert out["memorisation"] == pytest.approx(metrics.memorisation(pixels[labels > 2], train, tail))
    assert out["memorisation_all"] == pytest.approx(metrics.memorisation(pixels, train))
    assert 1 < out["is"] <= 4  # four logits

    lt = report_of(samples, labels, dataset, reference, split_ref="lt")
    own = net(evaluate.to_uint8(dataset.images))[0]
    assert lt["fid"] == out["fid"] and lt["fid_tail"] == pytest.approx(fid(rounded[labels > 2], own[dataset.labels > 2]))
    exact = report_of(samples, labels, dataset, reference, round=False)
    assert exact["fid"] == pytest.approx(fid(net((samples + 1) / 2)[0], real)) and exact["fid"] != out["fid"]


def test_the_inception_score_does_not_depend_on_the_order_of_samples():
    """Samples come sorted by class; consecutive tenths of them would score 1."""
    labels = torch.arange(10).repeat_interleave(30)

    def one_hot(x):
        return x.flatten(1)[:, :3].float(), 100.0 * nn.functional.one_hot(x[:, 0, 0, 0].long() % 10, 10)

    samples = labels.to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    net = evaluate.FeatureNet("labels", one_hot)
    assert report_of(samples, labels, made([20] * 10), made([20] * 10, seed=1), net)["is"] > 8


def test_copies_and_real_images_are_told_apart():
    dataset, reference = made([60, 30, 20]), made([40] * 3, seed=1)
    tail = dataset.labels == 2
    copies = evaluate.to_uint8(dataset.images[tail])
    assert report_of(copies, dataset.labels[tail], dataset, reference)["memorisation"] == 0
    fresh = torch.full((100,), 2)
    assert report_of(images(fresh, seed=7), fresh, dataset, reference)["memorisation"] == pytest.approx(1, abs=0.15)


def test_what_cannot_be_computed_is_none_with_its_reason():
    dataset, reference = made([9, 5, 4, 3]), made([8] * 4, seed=1)
    labels = torch.tensor([0] * 4 + [1] * 1 + [3] * 2)
    out = report_of(images(labels, seed=2), labels, dataset, reference)
    assert out["class_fid"][1] is None and out["class_fid"][2] is None and out["class_fid"][3] is not None
    assert out["class_fid_rank_deficient"]  # four and two rows of six features
    assert out["is"] is out["is_sd"] is None and "N >= 10" in out["remarks"]["is"]
    assert out["f8"] is None and "num_clusters must be in [1, 14]" in out["remarks"]["f8"]
    assert out["fid_med"] is None or out["fid_med"] >= 0

    one = report_of(images(torch.tensor([0])), torch.tensor([0]), dataset, reference)
    assert one["fid"] is None and "N >= 2" in one["remarks"]["fid"]
    assert one["precision"] is one["memorisation"] is None and one["memorisation_all"] is not None
    few = report_of(images(labels[:6], seed=2), labels[:6], dataset, reference)
    assert "expected more rows than features" in few["remarks"]["fid"] and few["fid"] > 0  # a figure, and a warning
    none = torch.full((40,), -1)
    unlabelled = report_of(images(torch.arange(4).repeat(10), seed=3), none, dataset, reference)
    assert unlabelled["class_fid"] == [None] * 4 and not unlabelled["class_fid_rank_deficient"]
    assert unlabelled["fid"] > 0 and unlabelled["fid_tail"] is unlabelled["memorisation"] is None
    assert "needs two generated and two real images of classes [3]; got 0 and 8" in unlabelled["remarks"]["fid_tail"]
    empty = report_of(images(labels, seed=2), labels, dataset, reference, rule="count")
    assert empty["fid_head"] is None and empty["split_rule"] == "count"  # nobody has more than 100 images


WRONG = {
    "labels": ({"labels": torch.tensor([0, 4])}, r"labels in \[-1, 3\); got 0 to 4"),
    "length": ({"labels": torch.tensor([0])}, r"int64 labels of shape \(2,\); got torch.int64 of shape \(1,\)"),
    "shape": ({"samples": torch.zeros(2, 3, 8, 8)}, r"samples \(N, 1, 8, 8\); got \(2, 3, 8, 8\)"),
    "kind": ({"samples": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, "at least one sample, uint8 or float; got 2 of torch.int64"),
    "classes": ({"reference": made([4] * 4)}, "a reference of 3 classes; got 4"),
    "split_ref": ({"split_ref": "both"}, "split_ref balanced or lt; got 'both'"),
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls(call):
    changes, message = WRONG[call]
    right = {"samples": torch.zeros(2, 1, 8, 8), "labels": torch.tensor([0, 1]), "dataset": made([5, 4, 3]), "reference": made([6] * 3)}
    with pytest.raises(ValueError, match=f"evaluate: expected {message}"):
        evaluate.evaluate_images(**{**right, **changes}, net=plain_net(), guidance=0.0)


def test_figures_of_different_features_are_never_in_one_table():
    report = {"features": "inception-1", "fid": 3.25, "fid_tail": None}
    text = evaluate.tabulate({"t2h": report, "ddpm": {**report, "fid": 4}}, ["fid", "fid_tail"])
    assert [line.split() for line in text.splitlines()] == [["method", "fid", "fid_tail"], ["t2h", "3.250", "-"], ["ddpm", "4.000", "-"]]
    with pytest.raises(ValueError, match="a table holds figures of one feature network; got classifier-digits-2, inception-1"):
        evaluate.tabulate({"t2h": report, "ddpm": {**report, "features": "classifier-digits-2"}})


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_the_classifier_is_trained_once_and_is_a_function_of_the_images(tmp_path, monkeypatch):
    reference = data.load("digits").subset(torch.arange(600))
    net = evaluate.feature_net(reference, cache=tmp_path, progress=False)
    features, probabilities = net(evaluate.to_uint8(reference.images))
    assert features.shape == (600, 64) and probabilities.sum(1).sub(1).abs().max() < 1e-5
    assert (probabilities.argmax(1) == reference.labels).double().mean() > 0.5  # after 30 steps
    elsewhere = evaluate.feature_net(reference, cache=tmp_path / "elsewhere", progress=False)
    assert elsewhere.name == net.name and torch.equal(elsewhere(reference.images[:9] / 2 + 0.5)[0], net(reference.images[:9] / 2 + 0.5)[0])

    monkeypatch.setattr(classifier, "train_balanced_classifier", None)  # would be called
    assert evaluate.feature_net(reference, cache=tmp_path, progress=False).name == net.name
    for changed in (reference.subset(torch.arange(599)), dataclasses.replace(reference, images=-reference.images)):
        with pytest.raises(TypeError):
            evaluate.feature_net(changed, cache=tmp_path, progress=False)


def test_the_classifier_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "STEPS", 150)
    assert main(["classifier", "--dataset", "digits-lt", "--cache", str(tmp_path), "--no-progress"]) == 0
    words = capsys.readouterr().out
    assert words.startswith("classifier-digits-") and "on a held-out fifth of 1797 images" in words
    assert float(words.split("accuracy ")[1].split()[0]) > 0.9
    assert len(list(tmp_path.glob("classifier-digits-*.safetensors"))) == 1
    np.savez(tmp_path / "f.npz", features=np.zeros((4, 3), np.float32), labels=np.arange(4))
    assert main(["classifier", "--dataset", f"features:{tmp_path / 'f.npz'}", "--cache", str(tmp_path)]) == 2
    assert "classifier: expected a data set of images" in capsys.readouterr().err


@pytest.mark.parametrize(("channels", "size", "dim"), [(1, 8, 64), (3, 5, 64), (3, 32, 128), (3, 64, 128)])
def test_classifiers_of_other_images(channels, size, dim):
    net = classifier.Classifier(channels, size, 200)
    features, logits = net(torch.zeros(2, channels, size, size))
    assert features.shape == (2, dim) and logits.shape == (2, 200)
    assert sum(p.numel() for p in net.parameters()) < 2e6


def test_reference_statistics_are_cached_and_made_again_for_other_images(tmp_path):
    reference, calls = made([20] * 3), []
    net = plain_net()
    counting = evaluate.FeatureNet(net.name, lambda x: calls.append(len(x)) or net.net(x))
    first = evaluate.reference_features(reference, counting, tmp_path)
    second = evaluate.reference_features(reference, counting, tmp_path)
    assert sum(calls) == 60 and torch.equal(first[0], second[0]) and torch.equal(first[1].cov, second[1].cov) and second[1].n == 60
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("statistics-made-") and set(load_file(path)) == {"features", "mu", "sigma"}
    evaluate.reference_features(made([20] * 3, seed=4), counting, tmp_path)
    evaluate.reference_features(reference, evaluate.FeatureNet("another", counting.net), tmp_path)
    assert sum(calls) == 180 and len(list(tmp_path.iterdir())) == 3

    save_file(load_file(path), path, {"key": "of other images", "about": "{}"})  # stale
    again = evaluate.reference_features(reference, counting, tmp_path)
    assert sum(calls) == 240 and torch.equal(again[0], first[0])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=f"cache: cannot read .*{path.name}.*delete it"):
        evaluate.reference_features(reference, counting, tmp_path)


def _write(path, number, go, answers):
    def make():
        go.wait()  # all are making it before the first one is done
        return {"x": torch.full((1000,), float(number))}, {"by": number}

    answers.put([checkpoint.cached(path, "key", make)[1]["by"]] + [checkpoint.cached(path, "key", make)[0]["x"].mean().item()])


def test_several_writers_agree_on_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    go, answers, path = context.Barrier(4), context.SimpleQueue(), tmp_path / "cache" / "x.safetensors"
    writers = [context.Process(target=_write, args=(path, number, go, answers)) for number in range(4)]
    for writer in writers:
        writer.start()
    found = [answers.get() for _ in writers]
    for writer in writers:
        writer.join()
    assert len({by for by, _ in found} | {mean for _, mean in found}) == 1
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_the_cache_without_hard_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError("no links here")

    monkeypatch.setattr(checkpoint.os, "link", refuse)
    assert checkpoint.cached(tmp_path / "x.safetensors", "key", lambda: ({"x": torch.ones(2)}, {"by": 1}))[1] == {"by": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_digests_see_what_they_are_given():
    x = torch.arange(6)
    same = checkpoint.digest("a", x)
    assert same == checkpoint.digest("a", x.clone()) and len(same) == 64
    others = [("b", x), ("a", x.view(2, 3)), ("a", x.int()), ("a", x + 1), ("a", x, x), (x,)]
    assert len({same, *(checkpoint.digest(*parts) for parts in others)}) == 7
    assert checkpoint.digest(torch.arange(6).view(2, 3).T) == checkpoint.digest(torch.arange(6).view(2, 3).T.contiguous())


# ---- Inception -------------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """The interface of torch-fidelity's extractor."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True), strict=False)
        self.matrix = nn.Parameter(torch.randn(3, 80, generator=torch.Generator().manual_seed(0)))  # not 2048: quick

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        features = x.float().mean((2, 3)) @ self.matrix
        return features, features[:, :70] / 1000


@pytest.fixture
def fidelity(monkeypatch, tmp_path):
    """A machine with torch-fidelity and its weights in torch's hub folder."""
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    package = types.ModuleType("torch_fidelity")
    package.__spec__ = types.SimpleNamespace(name="torch_fidelity")
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    weights = tmp_path / "hub" / "checkpoints" / evaluate.INCEPTION[0]
    weights.parent.mkdir(parents=True)
    torch.save({"fc.weight": torch.ones(2)}, weights)
    return weights


def test_inception_where_it_is_on_the_machine(fidelity, tmp_path):
    photos = made([4] * 3, channels=3, size=20)
    net = evaluate.feature_net(photos, cache=tmp_path / "cache")
    assert net.name.startswith("inception-") and not (tmp_path / "cache").exists()
    features, probabilities = net(evaluate.to_uint8(photos.images))
    assert features.shape == (12, 80) and probabilities.shape == (12, 70)
    labels = photos.labels
    out = report_of(evaluate.to_uint8(images(labels, 3, 20, seed=1)), labels, photos, photos, net)
    assert out["features"] == net.name and out["class_fid_rank_deficient"] and "more rows than features" in out["remarks"]["fid"]
    with pytest.raises(ValueError, match="takes 8-bit images"):
        net(photos.images)

    digits = made([6] * 3)  # for small grey images Inception has to be asked for
    assert evaluate.feature_net(digits, cache=tmp_path / "cache", progress=False).name.startswith("classifier-made-")
    named = evaluate.feature_net(digits, cache=tmp_path / "cache", inception=fidelity)
    assert named.name == net.name and named(evaluate.to_uint8(digits.images))[0].shape == (18, 80)
    fidelity.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"cannot read Inception's weights from .*{fidelity.name}"):
        evaluate.feature_net(photos, cache=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file of Inception's weights: nowhere.pth"):
        evaluate.feature_net(photos, cache=tmp_path, inception="nowhere.pth")


def test_without_torch_fidelity_the_weights_are_of_no_use(fidelity, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        evaluate.feature_net(made([4] * 3), cache=tmp_path, inception=fidelity)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run that evaluates."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        original = metrics.prd
        patch.setattr(metrics, "prd", lambda *sets, **options: original(*sets, **{**options, "runs": 1}))
        patch.setattr(classifier, "STEPS", 30)
        patch.setattr(classifier, "EPOCHS", 0)
        options = "--no-progress --steps 4 --batch-size 32 --width 32 --samples 120 --sample-steps 3 --omega 0.7 --warmup 2".split()
        assert main(["ddpm", *options, "--out", str(folder / "run"), "--cache", str(folder / "cache")]) == 0
    return folder / "run"


def test_a_run_evaluates_its_samples(run):
    report = json.loads((run / "metrics.json").read_text())
    assert FIGURES <= set(report) and report["method"] == "ddpm" and report["guidance"] == 0.7 and report["n"] == 120
    assert report["reference"] == "digits, n = 1797" and report["features"].startswith("classifier-digits-")
    for name in ("samples.png", "class_fid.png"):
        with Image.open(run / name) as image:
            assert min(image.size) > 300
    names = sorted(path.name.rsplit("-", 1)[0] for path in (run.parent / "cache").iterdir())
    assert names == ["classifier-digits", "statistics-digits"]


def test_the_command_gives_the_same_figures_and_keeps_the_rest(run, capsys):
    stored = json.loads((run / "metrics.json").read_text())
    altered = {**stored, "fid": -1.0, "own": "kept"}
    (run / "metrics.json").write_text(json.dumps(altered))
    (run / "class_fid.png").unlink()
    assert main(["evaluate", str(run), "--no-progress"]) == 0
    words = capsys.readouterr().out
    assert f"features: {stored['features']}" in words and f"{stored['fid']:.3f}" in words and "guidance 0.7" in words
    assert json.loads((run / "metrics.json").read_text()) == {**stored, "own": "kept"} and (run / "class_fid.png").exists()

    assert main(["evaluate", str(run), "--no-progress", "--split-ref", "lt", "--split-rule", "count"]) == 0
    other = json.loads((run / "metrics.json").read_text())
    assert (other["split_ref"], other["split_rule"]) == ("lt", "count") and other["fid"] == stored["fid"]
    assert other["fid_head"] != stored["fid_head"]
    page = (run / "card.md").read_text()
    assert f" {other['fid_med']:.3g} |" in page and f" {stored['fid_med']:.3g} |" not in page, "evaluate left the card as it was"


def test_what_sample_writes_can_be_evaluated(run):
    assert main(["sample", str(run), "--n", "30", "--omega", "0"]) == 0
    assert main(["evaluate", str(run / "samples"), "--no-progress"]) == 0
    report = json.loads((run / "samples" / "metrics.json").read_text())
    assert report["n"] == 30 and report["guidance"] == 0 and report["method"] == "ddpm"


def test_the_command_refuses(run, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "expected a run of ddpm, cbdm, t2h, diffrop, ccua, analytic that has drawn samples; there is no" in capsys.readouterr().err
    for name in ("config.json", "samples.npy", "sample_labels.npy"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "samples.npy").write_bytes((run / "samples.npy").read_bytes()[:200])
    assert main(["evaluate", str(tmp_path), "--no-progress"]) == 2
    assert "cannot read the samples of" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"method": "dgd"}')
    assert main(["evaluate", str(tmp_path)]) == 2
    assert f"{tmp_path} is one of dgd" in capsys.readouterr().err
    nowhere = ["--inception", "nowhere.pth", "--out", str(tmp_path / "new")]
    assert main(["ddpm", *nowhere]) == 2 and not (tmp_path / "new").exists()  # before it trains, not after
    assert "no such file of Inception's weights" in capsys.readouterr().err


# ---- images that are no run's -----------------------------------------------------------------------------------------


def dump(run, folder, kind):
    """A run's images as somebody else would have saved them; the options for evaluate."""
    images, labels = np.load(run / "samples.npy"), np.load(run / "sample_labels.npy")
    if kind != "uint8":
        images = (images / 255).astype(kind)
    np.save(folder / "x.npy", images)
    np.save(folder / "y.npy", labels.astype(np.int32))
    files = ["--samples", str(folder / "x.npy"), "--labels", str(folder / "y.npy"), "--out", str(folder)]
    return ["evaluate", *files, "--dataset", "digits-lt", "--cache", str(run.parent / "cache"), "--no-progress"]


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "float16"])
def test_a_dump_is_scored_as_the_run_that_it_is_from(run, tmp_path, capsys, kind):
    assert main(["evaluate", str(run), "--no-progress", "--split-ref", "balanced", "--split-rule", "tercile"]) == 0
    own = json.loads((run / "metrics.json").read_text())
    assert main(dump(run, tmp_path, kind)) == 0
    words, found = capsys.readouterr().out, json.loads((tmp_path / "metrics.json").read_text())
    assert ("8-bit images, as they are" if kind == "uint8" else f"{kind} in [0, 1], rounded to 8 bits") in words
    assert "120 samples, guidance unknown; reference: digits, n = 1797" in words
    assert {**found, "guidance": own["guidance"]} == {**found, **{name: own[name] for name in FIGURES}}  # to the last digit
    for name in ("samples.png", "class_fid.png"):
        assert (tmp_path / name).exists()


def test_a_dump_without_labels_and_other_statistics(run, tmp_path, capsys):
    words = dump(run, tmp_path, "uint8")
    del words[3:5]  # --labels
    assert main(words) == 0
    plain = json.loads((tmp_path / "metrics.json").read_text())
    assert plain["fid"] > 0 and plain["fid_head"] is None and plain["remarks"]["fid_head"]
    mean = np.zeros(64)
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=np.eye(64))
    assert main([*words, "--statistics", str(tmp_path / "stats.npz")]) == 0
    other = json.loads((tmp_path / "metrics.json").read_text())
    assert other["fid"] != plain["fid"] and "stats.npz" in other["remarks"]["fid"] and other["is"] == plain["is"]
    np.savez(tmp_path / "stats.npz", mu=mean[:9], sigma=np.eye(9))
    assert main([*words, "--statistics", str(tmp_path / "stats.npz")]) == 2
    assert "expected statistics of the 64 features of classifier-digits-" in capsys.readouterr().err
    np.savez(tmp_path / "stats.npz", mean=mean)
    assert main([*words, "--statistics", str(tmp_path / "stats.npz")]) == 2
    assert "expected an .npz with mu and sigma" in capsys.readouterr().err
    crooked = np.eye(64)
    crooked[0, 1] = 0.5
    for sigma, words_of in (
        (np.full((64, 64), np.nan), "finite mu and sigma"), (crooked, "symmetric sigma"), (np.eye(64) * 1j, "an .npz with mu and sigma"),
        (-np.eye(64), "a covariance sigma; got the eigenvalue -1"),
    ):  # fmt: skip
        np.savez(tmp_path / "stats.npz", mu=mean, sigma=sigma)
        assert main([*words, "--statistics", str(tmp_path / "stats.npz")]) == 2 and words_of in capsys.readouterr().err
    (tmp_path / "cut.npy").write_bytes(b"PK\x03\x04cut")
    assert main(["evaluate", "--samples", str(tmp_path / "cut.npy"), "--dataset", "digits-lt"]) == 2
    assert "cut.npy" in capsys.readouterr().err


def spoiled(images, labels, what):
    return {
        "channels last": (images.transpose(0, 2, 3, 1), labels), "one image": (images[0], labels), "no image": (images[:0], labels[:0]),
        "size": (images[..., :7], labels), "integers": (images.astype(np.int64), labels), "[-1, 1]": (images / 127.5 - 1, labels),
        "0 .. 255": (images.astype(np.float32), labels), "NaN": (np.full(images.shape, np.nan, np.float32), labels),
        "pickle": (np.array([{}], dtype=object), labels), "too few labels": (images, labels[:-1]), "float labels": (images, labels / 1.0),
        "label 10": (images, labels + 1), "label -2": (images, labels - 2), "a little over 1": (images / 255 + 1e-7, labels),
    }[what]  # fmt: skip


@pytest.mark.parametrize("what, words", [
    ("channels last", "(120, 8, 8, 1), whose channels are last: transpose(0, 3, 1, 2)"),
    ("one image", "expected images of shape (N, 1, 8, 8); got (1, 8, 8)"),
    ("no image", "got (0, 1, 8, 8)"),
    ("size", "got (120, 1, 8, 7)"),
    ("integers", "expected uint8, or floats in [0, 1]; got int64"),
    ("[-1, 1]", "expected floats in [0, 1]; got -1 to 1: (x + 1) / 2"),
    ("0 .. 255", "x / 255"),
    ("NaN", "got nan to nan"),
    ("pickle", "cannot read"),
    ("too few labels", "expected one label an image, shape (120,); got (119,)"),
    ("float labels", "expected an array of integers; got float64"),
    ("label 10", "expected labels in [-1, 10); got 1 to 10"),
    ("label -2", "y.npy: expected labels from 0 on, or -1 for none; got -2 to 7"),
    ("a little over 1", "expected floats in [0, 1]; got 1e-07 to 1.0000001"),
])  # fmt: skip
def test_a_wrong_dump_is_refused_by_name(run, tmp_path, capsys, what, words):
    options = dump(run, tmp_path, "uint8")
    images, labels = spoiled(np.load(run / "samples.npy"), np.load(run / "sample_labels.npy"), what)
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", labels)
    assert main(options) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "metrics.json").exists()


def test_runs_and_dumps_do_not_mix(run, tmp_path, capsys):
    assert main(["evaluate"]) == 2 and "got neither" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--samples", "x.npy"]) == 2 and "got both" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--dataset", "digits"]) == 2 and "--dataset goes with --samples" in capsys.readouterr().err
    assert main(["evaluate", "--samples", str(tmp_path / "x.npy")]) == 2 and "no such file" in capsys.readouterr().err


def test_real_images_of_the_long_tail_as_an_anchor(run):
    dataset, reference = data.load("digits-lt", imbalance_ratio=20), data.load("digits")
    out = evaluate.real_data_anchor(dataset, reference, T2HConfig(cache=str(run.parent / "cache"), progress=False))
    same = evaluate.real_data_anchor(reference, reference, T2HConfig(cache=str(run.parent / "cache"), progress=False))
    assert out["n"] == 587 and out["guidance"] is None and out["fid"] > 100 * same["fid"] and out["is"] < same["is"]


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_rows_of_the_picture_go_from_head_to_tail():
    labels = torch.tensor([2, 2, 0, 1, 0, 2] * 4)
    rows = evaluate.picture_rows(labels, (5, 90, 20, 7), count=3)
    assert [(label, members.tolist()) for label, members in rows] == [(1, [3, 9, 15]), (2, [0, 1, 5]), (0, [2, 4, 8])]
    assert [label for label, _ in evaluate.picture_rows(torch.arange(100), range(100, 0, -1), at_most=4)] == [0, 33, 66, 99]
    assert [len(members) for _, members in evaluate.picture_rows(torch.full((20,), -1), (5, 4))] == [8, 8, 4]


@pytest.mark.parametrize("channels", [1, 3])
def test_sample_grid_shows_samples_and_their_neighbours(tmp_path, channels):
    shades = lambda *values: torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, channels, 8, 8)  # noqa: E731
    rows = [(3, shades(10, 20), shades(30, 40)), (0, shades(50), shades(60)), (-1, shades(70), shades(80))]
    path = plots.sample_grid(tmp_path / "grid", rows, (5, 4, 3, 9), [(3,), (0, 1), (2,)])
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for shade in (10, 20, 30, 40, 50, 60, 70, 80):
        assert (np.abs(pixels - shade).max(1) <= 2).sum() > 500, shade
    assert (np.abs(pixels - (0xE6, 0x9F, 0)).max(1) <= 8).sum() > 200  # frames


def test_class_bars_go_from_head_to_tail(tmp_path, monkeypatch):
    figures = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, *rest: figures.append(figure) or save(figure, *rest))
    table = {"DDPM": [[1.0, 2.0, None], [3.0, 4.0, None]], "T2H": [[5.0, 6.0, 7.0]]}
    assert plots.class_bars(tmp_path / "bars", table, (4, 9, 2), [(1,), (0,), (2,)], caption="features: x").exists()
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\n(9)", "0\n(4)", "2\n(2)"]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")]
    assert heights[0][:2] == [3, 2] and np.isnan(heights[0][2]) and heights[1] == [6, 5, 7]
    assert {"none", "head", "medium", "tail"} <= {text.get_text() for text in axes.texts}
    assert plots.class_bars(tmp_path / "many", {"": [list(range(200))]}, range(200, 0, -1), [range(67), range(67, 133), range(133, 200)])
