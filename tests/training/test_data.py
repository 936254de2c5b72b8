"""Long-tailed subsets, sources, their errors, and the synthetic sets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from training import data

# ---- counts ----------------------------------------------------------------------------------------------------------

CIFAR10_LT = {
    100: (5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50),
    1000: (5000, 2320, 1077, 500, 232, 107, 50, 23, 10, 5),
    10: (5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500),
    50: (5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100),
}


@pytest.mark.parametrize(("ratio", "total"), [(100, 12406), (1000, 9324), (10, 20431), (50, 13996)])
def test_cifar10_counts(ratio, total):
    counts = data.long_tail_counts(5000, 10, ratio)
    assert counts == CIFAR10_LT[ratio]
    assert sum(counts) == total
    assert counts == data.long_tail_counts(5000, 10, data.resolve_imbalance(imb_factor=1 / ratio))


@pytest.mark.parametrize(("ratio", "total"), [(100, 10847), (10, 19573), (50, 12608)])
def test_cifar100_counts(ratio, total):
    counts = data.long_tail_counts(500, 100, ratio)
    assert sum(counts) == total
    assert [len(group) for group in data.split_groups(counts)] == [33, 34, 33]


def test_cifar_figures_of_the_papers():
    counts = data.long_tail_counts(5000, 10, 100)
    assert np.round(np.array(counts) / sum(counts), 4)[[0, 1, -1]].tolist() == [0.4030, 0.2416, 0.0040]
    assert data.long_tail_counts(500, 100, 100)[:5] == (500, 477, 455, 434, 415)
    assert [len(group) for group in data.split_groups(data.long_tail_counts(500, 100, 100), "count")] == [35, 35, 30]


def test_other_profiles():
    assert data.long_tail_counts(100, 4, 10, "step") == (100, 100, 10, 10)
    assert data.long_tail_counts(100, 3, 10, "uniform") == (100, 100, 100)
    for profile in data.PROFILES:
        assert data.long_tail_counts(7, 1, 1, profile) == (7,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 10, 0.5), "imbalance_ratio must be finite and >= 1"),
        ((100, 10, float("nan")), "imbalance_ratio must be finite and >= 1"),
        ((5, 10, 10), "needs n_max >= 10, got 5"),
        ((0, 10, 10), "n_max and num_classes must be >= 1; got 0 and 10"),
        ((100, 10, 10, "pareto"), "profile must be one of exp, step, uniform; got 'pareto'"),
    ],
)
def test_counts_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.long_tail_counts(*arguments)


def test_both_spellings_of_the_imbalance():
    assert data.resolve_imbalance() == 10
    assert data.resolve_imbalance(imbalance_ratio=100) == data.resolve_imbalance(imb_factor=0.01) == 100
    with pytest.raises(ValueError, match="not both; got 10 and 0.1"):
        data.resolve_imbalance(10, 0.1)
    for factor in (0, 1.5, -1, float("nan")):
        with pytest.raises(ValueError, match=r"imb_factor must be in \(0, 1\]"):
            data.resolve_imbalance(imb_factor=factor)


def test_groups():
    counts = data.long_tail_counts(5000, 10, 100)
    assert data.split_groups(counts) == ((0, 1, 2), (3, 4, 5, 6), (7, 8, 9))
    assert data.split_groups(counts[::-1]) == ((7, 8, 9), (3, 4, 5, 6), (0, 1, 2))  # by count, not by id
    assert data.split_groups((101, 100, 20, 19), "count") == ((0,), (1, 2), (3,))
    assert data.split_groups((5, 1)) == ((0,), (), (1,))
    assert data.split_groups((5,)) == ((), (0,), ())
    with pytest.raises(ValueError, match="rule must be tercile or count"):
        data.split_groups(counts, "half")


def test_rows_are_those_of_ldam():
    labels = np.random.RandomState(1).randint(0, 3, 60)
    counts = (9, 4, 2)
    np.random.seed(7)  # LDAM's own loop, on numpy's global state
    expected = []
    for label, count in enumerate(counts):
        own = np.where(labels == label)[0]
        np.random.shuffle(own)
        expected.extend(own[:count])
    assert data.select_rows(labels, counts, seed=7).tolist() == expected
    with pytest.raises(ValueError, match="class 1 needs 60 rows; the source has"):
        data.select_rows(labels, (1, 60, 1))


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_digits_lt():
    digits = data.load()
    assert len(digits) == 707 and digits.counts == (174, 134, 104, 80, 62, 48, 37, 29, 22, 17)
    assert digits.images.shape == (707, 1, 8, 8) and digits.images.dtype == torch.float32 and digits.features is None
    assert digits.images.min() == -1 and digits.images.max() == 1
    assert digits.labels.bincount().tolist() == list(digits.counts)
    whole = data.load("digits")
    assert len(whole) == 1797 and torch.equal(whole.images[digits.indices], digits.images)
    assert torch.equal(whole.labels[digits.indices], digits.labels)
    assert torch.equal(data.load().indices, digits.indices)
    assert not torch.equal(data.load(seed=1).indices, digits.indices)


def test_indices_round_trip(tmp_path):
    digits = data.load(imbalance_ratio=100, seed=3)
    for suffix in (".npy", ".json"):
        path = data.save_indices(digits, tmp_path / "rows" / f"rows{suffix}")
        again = data.load("digits", indices=path)
        assert torch.equal(again.images, digits.images) and again.counts == digits.counts
    with pytest.raises(ValueError, match="must end in .npy or .json"):
        data.save_indices(digits, tmp_path / "rows.txt")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1797], r"must name rows in \[0, 1797\); got 0 to 1797"),
        ([-1, 2], r"got -1 to 2"),
        ([0.5], "1-D array of integers; got float64"),
        ([], "non-empty"),
        ([[1, 2]], r"of shape \(1, 2\)"),
        ([[1], [1, 2]], "is not a list of row numbers"),
        ([4, 4, 5], "names 1 rows twice"),
    ],
)
def test_indices_refuse(tmp_path, rows, message):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        data.load("digits", indices=path)


def test_missing_indices(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load("digits", indices=tmp_path / "rows.npy")


@pytest.mark.parametrize(
    "name", ["", "mnist", "digits:x", "folder", "folder:", "features:", "cifar10:x", "digits-lt-lt"]
)
def test_unknown_names(name):
    with pytest.raises(ValueError, match="dataset: expected one of digits"):
        data.load(name)


@pytest.mark.parametrize("name", ["cifar10-lt", "cifar100"])
def test_cifar_never_downloads(tmp_path, name, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", None)
    with pytest.raises(FileNotFoundError, match=f"ltkernels fetch {name.removesuffix('-lt')} --root"):
        data.load(name, root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "num_classes", "total"), [("cifar10-lt", 10, 20431), ("cifar100-lt", 100, 19573)])
def test_cifar_lt_from_a_stand_in(monkeypatch, name, num_classes, total):
    class StandIn:  # the two attributes of torchvision's data sets that are read
        def __init__(self, root, train, download):
            assert train and not download
            self.targets = [i % num_classes for i in range(50000)]
            self.data = np.zeros((50000, 2, 2, 3), dtype=np.uint8)
            self.data[::num_classes, 0, 1, 2] = 255

    monkeypatch.setattr(data, "torchvision_set", lambda base: StandIn)
    cifar = data.load(name)
    assert len(cifar) == total and cifar.num_classes == num_classes
    head = cifar.images[: cifar.counts[0]]
    assert (head[:, 2, 0, 1] == 1).all() and (head[:, 0] == -1).all()
    assert len(data.load(name.removesuffix("-lt"))) == 50000


def pictures(folder, names, value):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(folder / name)


def test_tiny_imagenet_from_a_stand_in(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for label, (wnid, count) in enumerate([("n01", 6), ("n02", 6), ("n03", 6)]):
        pictures(root / "train" / wnid / "images", [f"{wnid}_{i}.JPEG" for i in range(count)], 100 * label)
    pictures(root / "val" / "images", ["val_0.JPEG", "val_1.JPEG"], 200)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03\t0\t0\t8\t8\nval_1.JPEG\tn01\t0\t0\t8\t8\n")
    whole = data.load("tiny-imagenet", root=tmp_path, image_size=8)
    assert whole.counts == (6, 6, 6) and whole.images[:, 0, 0, 0].unique().numel() == 3
    assert data.load("tiny-imagenet-lt", root=tmp_path, image_size=8, imbalance_ratio=4).counts == (6, 3, 1)
    for answer in (data.balanced_reference, data.test_set):
        held = answer("tiny-imagenet-lt", root=tmp_path, image_size=4)
        assert held.labels.tolist() == [2, 0] and held.images.shape == (2, 3, 4, 4)

    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\t0\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt must name classes of .*; got \['val_0.JPEG', 'n99'\]"):
        data.balanced_reference("tiny-imagenet-lt", root=tmp_path)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(FileNotFoundError, match="expected .*val_annotations.txt with lines of an image and its wnid"):
        data.balanced_reference("tiny-imagenet", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="expected .*/train/<wnid>/images/<image>, as unpacked"):
        data.load("tiny-imagenet", root=tmp_path / "nowhere")


def test_imagenet_lt_from_a_stand_in(tmp_path):
    pictures(tmp_path / "train" / "n01", ["a.JPEG", "b.JPEG"], 0)
    pictures(tmp_path / "train" / "n02", ["c.JPEG"], 255)
    pictures(tmp_path / "val", ["d.JPEG"], 255)
    (tmp_path / "ImageNet_LT_train.txt").write_text("train/n01/a.JPEG 0\ntrain/n01/b.JPEG 0\ntrain/n02/c.JPEG 1\n")
    (tmp_path / "ImageNet_LT_val.txt").write_text("val/d.JPEG 1\n")
    lt = data.load("imagenet-lt", root=tmp_path, image_size=8, imbalance_ratio=50)  # the list is a long tail already
    assert lt.counts == (2, 1) and (lt.images[2] == 1).all() and lt.indices.tolist() == [0, 1, 2]
    assert data.balanced_reference("imagenet-lt", root=tmp_path, image_size=8).counts == (0, 1)
    (tmp_path / "ImageNet_LT_test.txt").write_text("val/d.JPEG 1\ntrain/n01/a.JPEG 0\n")
    assert data.test_set("imagenet-lt", root=tmp_path, image_size=8).labels.tolist() == [1, 0]

    (tmp_path / "ImageNet_LT_train.txt").write_text("train/n01/gone.JPEG 0\n")
    with pytest.raises(FileNotFoundError, match="names .*gone.JPEG; there is no such file"):
        data.load("imagenet-lt", root=tmp_path)
    (tmp_path / "ImageNet_LT_train.txt").write_text("train/n01/a.JPEG 0\ntrain/n01/b.JPEG\n")
    with pytest.raises(ValueError, match="must have lines 'path label'; got another line 2"):
        data.load("imagenet-lt", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="expected the public list .*ImageNet_LT_val.txt"):
        data.balanced_reference("imagenet-lt", root=tmp_path / "train")


def test_balanced_references_are_the_sets_without_their_tails():
    assert len(data.balanced_reference("digits-lt")) == len(data.balanced_reference("digits")) == 1797


def rows_of(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_digits_without_their_test_set():
    test = data.test_set("digits-train")
    train, whole = data.load("digits-train"), data.load("digits")
    assert len(rows_of(whole.images)) == 1797  # no image is there twice, so an image says which row it is
    assert len(train) == 1201 and len(test) == 596 and rows_of(train.images) | rows_of(test.images) == rows_of(whole.images)
    assert test.counts == tuple(n // 3 for n in whole.counts)
    for one in (train, test):
        digits = {tuple(image.flatten().tolist()): label for image, label in zip(whole.images, whole.labels.tolist(), strict=True)}
        assert [digits[tuple(image.flatten().tolist())] for image in one.images] == one.labels.tolist()


@pytest.mark.parametrize("order", [None, "reversed", "seed:3"])
def test_no_image_of_a_long_tail_is_in_its_test_set(order):
    test = data.test_set("digits-train-lt")
    head = data.class_order(order, 10)[0]
    for seed in range(3):
        tail = data.load("digits-train-lt", imbalance_ratio=20, seed=seed, order=order)
        assert len(tail) == 390 and tail.counts[head] == 116 == max(tail.counts)
        assert not rows_of(tail.images) & rows_of(test.images)
        whole = data.load("digits-train")
        assert torch.equal(whole.images[tail.indices], tail.images) and torch.equal(whole.labels[tail.indices], tail.labels)
    assert torch.equal(data.test_set("digits-train").images, test.images)  # no seed, ratio or order changes it
    reference = data.balanced_reference("digits-train-lt")
    assert torch.equal(reference.images, whole.images) and reference.name == "digits-train"


@pytest.mark.parametrize("name", ["digits", "digits-lt", "folder:images", "folder:", "features:x/train", "mnist", "imagenet"])
def test_sets_without_a_test_set(name):
    with pytest.raises(ValueError, match=r"test_set: expected a data set with a test set of its own \(digits-train, cifar10.*got '"):
        data.test_set(name)


def test_digits_names_the_set_that_has_one():
    with pytest.raises(ValueError, match="got 'digits-lt'; digits-train is digits without the images of its test set"):
        data.test_set("digits-lt")


def test_test_split_of_cifar(monkeypatch):
    class StandIn:
        def __init__(self, root, train, download):
            assert not download
            self.targets, self.data = [3, 1] if train else [2, 9, 0], np.full((2 if train else 3, 2, 2, 3), 255 * train, dtype=np.uint8)

    monkeypatch.setattr(data, "torchvision_set", lambda base: StandIn)
    test = data.test_set("cifar10-lt")
    assert test.labels.tolist() == [2, 9, 0] and (test.images == -1).all() and test.num_classes == 10


def test_test_folder(tmp_path):
    for name in ("train/ant", "train/bee", "train/cat", "test/bee", "test/cat"):
        pictures(tmp_path / name, ["0.png"], 255 if name.startswith("test") else 0)
    test = data.test_set(f"folder-lt:{tmp_path}/train", image_size=8)
    assert test.labels.tolist() == [1, 2] and test.num_classes == 3 and (test.images == 1).all()  # numbers of the training folder's classes
    pictures(tmp_path / "test" / "dog", ["0.png"], 0)
    with pytest.raises(ValueError, match="test must hold classes of .*train; got dog"):
        data.test_set(f"folder:{tmp_path}/train")
    with pytest.raises(FileNotFoundError, match="no such folder: .*elsewhere/test"):
        pictures(tmp_path / "elsewhere" / "train" / "ant", ["0.png"], 0)
        data.test_set(f"folder:{tmp_path}/elsewhere/train")


def test_class_order():
    """Which class is the head is a choice (Table 5 of 001); labels keep their numbers."""
    plain, turned = (data.load("digits-lt", imbalance_ratio=20, order=order) for order in (None, "reversed"))
    assert turned.counts == plain.counts[::-1] and sum(turned.counts) == 587
    order = data.class_order("7,2,6,4,5,3,9,0,1,8", 10)
    horses = data.load("digits-lt", imbalance_ratio=20, order="7,2,6,4,5,3,9,0,1,8")
    assert [horses.counts[label] for label in order] == list(plain.counts)
    shuffled = data.class_order("seed:3", 10)
    assert sorted(shuffled) == list(range(10)) and shuffled == data.class_order("seed:3", 10) != data.class_order("seed:4", 10)
    for text in ("0,1", "0,0,1,2,3,4,5,6,7,8", "seed:", "head", "0,1,2,3,4,5,6,7,8,-9"):
        with pytest.raises(ValueError, match="class_order: expected reversed, seed:N or each of 0 to 9 once"):
            data.class_order(text, 10)


def test_public_names():
    import training

    assert training.class_counts is data.class_counts and training.long_tail_counts(10, 2, 10) == (10, 1)
    assert training.split_groups((9, 5, 1)) == ((0,), (1,), (2,))


def test_folder(tmp_path):
    for label, (name, count) in enumerate([("ant", 6), ("bee", 4), ("cat", 5)]):
        (tmp_path / name).mkdir()
        for i in range(count):
            wide = np.full((8, 16, 3), 60 * label, dtype=np.uint8)
            wide[:, :4] = wide[:, 12:] = 255  # what the centre crop must cut away
            Image.fromarray(wide).save(tmp_path / name / f"{i}.{'png' if i % 2 else 'PNG'}")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    whole = data.load(f"folder:{tmp_path}", image_size=4)
    assert whole.images.shape == (15, 3, 4, 4) and whole.counts == (6, 4, 5)
    centre = whole.images[-1, :, 1, 1]
    assert torch.allclose(centre, torch.tensor(120 / 127.5 - 1), atol=0.03)  # bicubic bleeds a little
    kept = data.load(f"folder:{tmp_path}", image_size=8).images[0]
    assert torch.allclose(kept, torch.tensor(-1.0))
    tail = data.load(f"folder-lt:{tmp_path}", imbalance_ratio=4, image_size=4)
    assert tail.counts == (4, 2, 1)  # n_max is the smallest class
    assert torch.equal(whole.images[tail.indices], tail.images)


def test_folder_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.load(f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "ant").mkdir()
    with pytest.raises(FileNotFoundError, match="got 1 folders, no image"):
        data.load(f"folder:{tmp_path}")
    (tmp_path / "ant" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="cannot read image .*0.png"):
        data.load(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="image_size must be >= 1; got 0"):
        data.load(f"folder:{tmp_path}", image_size=0)
    Image.new("RGB", (4, 4)).save(tmp_path / "ant" / "0.png")
    (tmp_path / "bee").mkdir()
    with pytest.raises(ValueError, match="class 1 has none"):
        data.load(f"folder-lt:{tmp_path}")


def test_features(tmp_path):
    path = tmp_path / "features.npz"
    features = np.random.RandomState(0).randn(40, 5)
    np.savez(path, features=features, labels=np.repeat(np.arange(4), 10), extra=1)
    whole = data.load(f"features:{path}", width=5)
    assert whole.images is None and whole.counts == (10, 10, 10, 10) and whole.data is whole.features
    assert torch.equal(whole.features, torch.from_numpy(features).float())
    assert data.load(f"features-lt:{path}").counts == (10, 4, 2, 1)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_features_are_mapped_where_they_are_stored_plainly(tmp_path, order, dtype):
    features = np.asarray(10 * np.random.RandomState(0).randn(50, 7), dtype=dtype, order=order)
    for save, mapped in ((np.savez, True), (np.savez_compressed, False)):
        path = tmp_path / f"{save.__name__}.npz"
        save(path, first=np.arange(3), features=features, labels=np.repeat(np.arange(5), 10))
        found = data._mapped(path, "features")
        assert isinstance(found, np.memmap) == mapped and np.array_equal(found, features)
        assert torch.equal(data.load(f"features:{path}").features, torch.from_numpy(features.astype(np.float32)))


GOOD = np.zeros((4, 3), dtype=np.float32), np.array([0, 1, 2, 1])
NAN = np.where(np.arange(12).reshape(4, 3) == 7, np.nan, 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": GOOD[0]}, "labels is missing, got features"),
        ({"x": GOOD[0], "labels": GOOD[1]}, "features is missing, got x, labels"),
        (
            {"features": GOOD[0][0], "labels": GOOD[1]},
            r"features must be numbers of shape \(N, D\); got float32 of shape",
        ),
        ({"features": GOOD[0][:, :0], "labels": GOOD[1]}, r"of shape \(4, 0\)"),
        ({"features": GOOD[0].astype(str), "labels": GOOD[1]}, "features must be numbers"),
        ({"features": GOOD[0].astype(complex), "labels": GOOD[1]}, "features must be numbers"),
        ({"features": GOOD[0].astype(object), "labels": GOOD[1]}, "features: Object arrays"),
        ({"features": GOOD[0][:, :2], "labels": GOOD[1]}, "features must have width 3; got 2"),
        (
            {"features": NAN, "labels": GOOD[1]},
            r"features must be finite in float32; got NaN or inf in 1 rows, first \[2\]",
        ),
        ({"features": GOOD[0] + np.float64(1e300), "labels": GOOD[1]}, "features must be finite in float32"),
        (
            {"features": GOOD[0], "labels": GOOD[1][:3]},
            r"labels must be integers of shape \(4,\); got int64 of shape \(3,\)",
        ),
        ({"features": GOOD[0], "labels": GOOD[1] / 2}, "got float64"),
        ({"features": GOOD[0], "labels": GOOD[1] - 1}, "got -1 to 1"),
        ({"features": GOOD[0], "labels": GOOD[1] + 2**40}, r"labels must be in \[0, N\) with N=4"),
    ],
)
def test_features_refuse(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        data.load(f"features:{path}", width=3)
    assert str(path) in str(error.value)


def test_features_refuse_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load(f"features:{tmp_path / 'none.npz'}")
    np.save(tmp_path / "lone.npy", GOOD[0])
    for name, content in [("lone.npy", None), ("text.npz", b"hello"), ("empty.npz", b""), ("cut.npz", b"PK\x03\x04")]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            data.load(f"features:{tmp_path / name}")


def test_subset_and_holdout():
    digits = data.load()
    part = digits.subset(digits.labels == 9)
    assert len(part) == 17 and part.num_classes == 10 and part.counts == (0,) * 9 + (17,)
    assert torch.equal(digits.subset([3, 1]).images, digits.images[[3, 1]])
    train, holdout = data.train_holdout_split(digits, 0.2)
    assert sorted(train.indices.tolist() + holdout.indices.tolist()) == sorted(digits.indices.tolist())
    assert holdout.counts == tuple(round(0.2 * n) for n in digits.counts)
    assert torch.equal(data.train_holdout_split(digits)[1].indices, holdout.indices)
    assert not torch.equal(data.train_holdout_split(digits, seed=1)[1].indices, holdout.indices)
    rare = digits.subset(torch.cat([torch.arange(10), torch.tensor([700, 701, 200])]))  # classes of 10, 2 and 1 rows
    assert [n for n in data.train_holdout_split(rare, 0.01)[1].counts if n] == [1, 1]
    with pytest.raises(ValueError, match="fraction must be in"):
        data.train_holdout_split(digits, 1.0)


# ---- synthetic latents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.SYNTHETIC)
def test_synthetic_density_is_the_density(name):
    z, labels, log_density, shares = data.synthetic_latents(name, 8000, seed=1)
    assert torch.isclose(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(labels.bincount() / 8000, shares.float(), atol=0.01)
    if z.shape[1] == 2:  # integrates to one, with and without smoothing
        axis = torch.linspace(-9, 9, 241, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        for bandwidth in (0.0, 0.5):
            mass = log_density(grid, bandwidth).exp().sum() * (axis[1] - axis[0]) ** 2
            assert abs(mass - 1) < 1e-3
    # E[(score . v)^2] = -E[v' Hessian v] under the true density only (Fisher information), so density and samples agree
    z = z.double().requires_grad_()
    score = torch.autograd.grad(log_density(z).sum(), z, create_graph=True)[0]
    curvature = torch.autograd.grad(score[:, 0].sum(), z)[0][:, 0]
    assert torch.isclose(score[:, 0].square().mean(), -curvature.mean(), rtol=0.05)


def test_synthetic_two_gaussians_closed_form():
    _, _, log_density, shares = data.synthetic_latents("two-gaussians", 1)
    at_tail = log_density(torch.tensor([[0.0, -3.0]], dtype=torch.float64)).exp().item()
    assert at_tail == pytest.approx((10 / 11 * np.exp(-18) + 1 / 11) / (2 * np.pi), rel=1e-9)
    smooth = log_density(torch.zeros(1, 2, dtype=torch.float64), 2.0).exp().item()  # variance 1 + 4, both at distance 3
    assert smooth == pytest.approx(np.exp(-9 / 10) / (10 * np.pi), rel=1e-9)
    assert shares.tolist() == [10 / 11, 1 / 11]


def test_synthetic_is_reproducible_and_density_ignores_the_seed():
    first, second, other = (data.synthetic_latents("tail-16d", 50, seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])
    assert torch.equal(first[2](first[0]), other[2](first[0]))
    assert first[0].dtype == torch.float32 and first[3][0] / first[3][-1] == pytest.approx(10)


def test_synthetic_refuses():
    with pytest.raises(ValueError, match="name must be one of two-gaussians, moons, tail-16d; got 'rings'"):
        data.synthetic_latents("rings", 10)
    with pytest.raises(ValueError, match="n must be >= 1; got 0"):
        data.synthetic_latents("moons", 0)
