"""Classifiers of long-tailed images and their scores."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from training import data, loop, recognition
from training.classifier import Classifier
from training.recognition import RECIPES, Recipe, group_std, recognition_scores, train_classifier

TINY = Recipe(net="small", steps=6, batch_size=8, lr=0.05, flip=False)


def some_images(count=40, classes=4, channels=1, size=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return torch.rand(count, channels, size, size, generator=rng) * 2 - 1, labels


def weights_of(net):
    return torch.cat([value.flatten().double() for value in net.state_dict().values()])


# ---- scores ----------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Answers with the class that the first pixel names."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.weight = classes, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), self.classes).float()


def told(pairs, classes):
    """A test set of (label, what Oracle answers)."""
    labels, answers = torch.tensor(pairs).T
    images = answers.float()[:, None, None, None].expand(-1, 1, 2, 2)
    return data.Dataset("test", images, None, labels, torch.arange(len(labels)), classes, data.class_counts(labels, classes))


def test_std_of_the_paper():
    assert group_std(66.5, 39.0, 8.6) == pytest.approx(23.65, abs=5e-3)  # 003: 23.6
    assert group_std(64.3, 52.1, 32.5) == pytest.approx(13.1, abs=0.05)  # 003: 13.0
    assert group_std(0.5, 0.5, 0.5) == 0 and group_std(0.5, None, 0.5) is None


def test_scores_by_hand():
    """Classes 0 to 3, class 2 the most frequent one; of eight images five are right, and nobody is taken for class 3."""
    test = told([(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (2, 2), (3, 2), (3, 0)], 4)
    found = recognition_scores(Oracle(4), test, [50, 40, 100, 5])
    assert found["top1"] == 5 / 8 and found["per_class"] == [2 / 3, 1, 1, 0]
    assert (found["top1_many"], found["top1_med"], found["top1_few"]) == (1, 4 / 5, 0)
    assert found["std"] == pytest.approx(math.sqrt((0.4**2 + 0.2**2 + 0.6**2) / 3))
    assert found["precision"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 2 + 0) / 4)
    assert found["recall"] == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
    assert recognition_scores(Oracle(4), test, [5, 100, 40, 50])["top1_many"] == 1  # groups are the training set's: now class 1


def test_classes_and_groups_without_test_images():
    test = told([(0, 0), (0, 1), (2, 2)], 3)
    found = recognition_scores(Oracle(3), test, [500, 50, 5], "count")
    assert found["per_class"] == [0.5, None, 1] and found["top1_med"] is None and found["std"] is None
    assert found["recall"] == 0.75 and found["precision"] == 1  # means over the two classes that are there
    with pytest.raises(ValueError, match="expected a count for each of 3 classes; got 2"):
        recognition_scores(Oracle(3), test, [1, 2])


# ---- networks and losses ---------------------------------------------------------------------------------------------


def test_resnet32_is_that_of_cifar():
    net = recognition.build(Recipe(net="resnet32", epochs=1), (3, 32, 32), 10, seed=0)
    assert sum(p.numel() for p in net.parameters()) == 464_154
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 31 and [layer.out_channels for layer in convolutions[::10]] == [16, 16, 32, 64]
    x, shapes = torch.zeros(2, 3, 32, 32), []
    for layer in net:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert [shapes[i] for i in (7, 12, 17, -1)] == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (10,)]


def test_a_shortcut_has_no_weights():
    """Every second pixel, and as many new channels of zeros before the old ones as after them."""
    block, x = recognition.Block(16, 32).eval(), torch.rand(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(block.conv2.weight)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[..., ::2, ::2]) and not out[:, :8].any() and not out[:, 24:].any()


def test_auto_networks():
    kinds = {size: type(recognition.build(Recipe(epochs=1), (3, size, size), 5, seed=0)).__name__ for size in (8, 32)}
    assert kinds == {8: "SmallNet", 32: "ResNet32"}
    small, whole = recognition.build(TINY, (1, 8, 8), 5, seed=3), Classifier(1, 8, 5)
    whole.load_state_dict(small.state_dict())
    x = some_images()[0]
    assert torch.equal(small(x), whole(x)[1])  # the classifier's network, without its features
    pytest.importorskip("torchvision")
    large = recognition.build(Recipe(epochs=1), (3, 65, 65), 7, seed=0).eval()
    assert type(large).__name__ == "ResNet" and large.layer1[0].conv2.groups == 32 and large(torch.zeros(1, 3, 65, 65)).shape == (1, 7)
    with pytest.raises(ValueError, match="resnext50 takes images of 3 channels; got 1"):
        recognition.build(Recipe(net="resnext50", epochs=1), (1, 65, 65), 7, seed=0)


def test_balanced_softmax_is_the_paper_s_loss():
    """-log n_y e^l_y / sum_j n_j e^l_j, with the counts of what the classifier is trained on."""
    images, _ = some_images(6)
    labels, counts = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([3.0, 2.0, 1.0, 0.0])
    found = {}
    for loss in ("softmax", "balanced"):
        recipe = dataclasses.replace(TINY, loss=loss, crop=False, batch_size=6)
        net = recognition.build(recipe, (1, 8, 8), 4, seed=0)
        found[loss] = recognition.Recognise("one", net, images, labels, 4, recipe, 0).loss(0, torch.Generator())[0]
        logits = net(images)
    weight = torch.ones(4), counts  # a class without images is nobody's label, and its logit is in no denominator
    for loss, n in zip(("softmax", "balanced"), weight, strict=True):
        share = n * logits.exp() / (n * logits.exp()).sum(1, keepdim=True)
        expected = -share.gather(1, labels[:, None]).log().mean()
        torch.testing.assert_close(found[loss], expected)
    found["balanced"].backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_varied_images():
    rng, x = torch.Generator().manual_seed(0), some_images(200, channels=3, size=16)[0]
    same = recognition.varied(x, rng, flip=False, crop=False)
    assert torch.equal(same, x)
    mirror = recognition.varied(x, rng, flip=True, crop=False)
    turned = (mirror == x.flip(-1)).flatten(1).all(1)
    assert ((mirror == x).flatten(1).all(1) ^ turned).all() and 60 < turned.sum() < 140
    moved, seen = recognition.varied(x, rng, flip=False, crop=True), set()
    for before, after in zip(x, moved, strict=True):
        fits = [
            (down, right) for down in range(-2, 3) for right in range(-2, 3)
            if torch.equal(after[:, max(-down, 0) : 16 - max(down, 0), max(-right, 0) : 16 - max(right, 0)],
                           before[:, max(down, 0) : 16 - max(-down, 0), max(right, 0) : 16 - max(-right, 0)])
        ]  # fmt: skip
        assert len(fits) == 1
        (down, right), = fits
        seen.add(fits[0])
        assert down <= 0 or (after[:, 16 - down :] == -1).all()
        assert right >= 0 or (after[:, :, :-right] == -1).all()
    assert len(seen) == 25  # an eighth of the side, every way


# ---- training --------------------------------------------------------------------------------------------------------


def test_digits_are_learnt():
    train, test = data.load("digits-train"), data.test_set("digits-train")
    net = train_classifier(train.images, train.labels, 10, RECIPES["digits"], seed=0, progress=False)
    assert not net.training and recognition_scores(net, test, train.counts)["top1"] > 0.95


def test_bits_are_a_function_of_the_seed_whatever_the_stage():
    images, labels = some_images()
    train = lambda **changes: weights_of(train_classifier(images, labels, 4, TINY, progress=False, **{"seed": 0, **changes}))  # noqa: E731
    before = torch.get_rng_state()
    first = train()
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is nobody's
    torch.rand(3)
    networks = [weights_of(recognition.build(TINY, (1, 8, 8), 4, seed)) for seed in (0, 0, 1)]
    assert torch.equal(networks[0], networks[1]) and not torch.equal(networks[0], networks[2])
    assert torch.equal(train(), first) and not torch.equal(train(seed=1), first) and torch.equal(train(stage="other"), first)


def test_bytes_are_images():
    images, labels = some_images()
    images = ((images + 1) * 127.5).round().to(torch.uint8)
    told = [weights_of(train_classifier(x, labels, 4, TINY, seed=0, progress=False)) for x in (images, images.float() / 127.5 - 1)]
    assert torch.equal(*told)
    net = Oracle(300)
    assert recognition.predict(net, torch.full((3, 1, 2, 2), 255, dtype=torch.uint8)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("net, size", [("small", 8), ("resnet32", 16)])
def test_a_stopped_training_goes_on_with_the_same_bits(tmp_path, monkeypatch, net, size):
    images, labels = some_images(size=size)
    recipe = dataclasses.replace(TINY, net=net)
    call = {"seed": 0, "checkpoint_every": 2, "progress": False}
    whole = train_classifier(images, labels, 4, recipe, **call)

    loss = recognition.Recognise.loss

    def cut_short(self, step, rng):
        if step == 5:
            raise KeyboardInterrupt
        return loss(self, step, rng)

    monkeypatch.setattr(recognition.Recognise, "loss", cut_short)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(images, labels, 4, recipe, folder=tmp_path, **call)
    monkeypatch.setattr(recognition.Recognise, "loss", loss)
    steps = []
    monkeypatch.setattr(recognition.Recognise, "after_step", lambda self, step: steps.append(step))
    assert torch.equal(weights_of(train_classifier(images, labels, 4, recipe, folder=tmp_path, **call)), weights_of(whole))
    assert steps == [4, 5]
    assert torch.equal(weights_of(train_classifier(images, labels, 4, recipe, folder=tmp_path, **call)), weights_of(whole))
    assert steps == [4, 5]  # a finished one is read
    assert [row["step"] for row in loop.read_log(tmp_path / "log.jsonl")] == list(range(6))


def test_a_folder_of_another_classifier_is_refused(tmp_path):
    images, labels = some_images()
    train_classifier(images, labels, 4, TINY, seed=0, folder=tmp_path, progress=False)
    others = {
        "recipe": (images, labels, 4, dataclasses.replace(TINY, lr=0.1), 0), "seed": (images, labels, 4, TINY, 1),
        "images": (-images, labels, 4, TINY, 0),
    }  # fmt: skip
    for what, (x, y, classes, recipe, seed) in others.items():
        with pytest.raises(ValueError, match=f"classifier.json is of a classifier with another value of {what}; give another folder"):
            train_classifier(x, y, classes, recipe, seed=seed, folder=tmp_path, progress=False)
    train_classifier(images, labels, 4, TINY, seed=1, folder=tmp_path, stage="second", progress=False)  # another stage has room


def test_epochs():
    images, labels = some_images(20)
    recipe = Recipe(net="small", epochs=3, batch_size=8, flip=False)
    assert recognition.Recognise("one", recognition.build(recipe, (1, 8, 8), 4, 0), images, labels, 4, recipe, 0).steps == 9


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "expected steps or epochs; got neither"), ({"steps": 3, "epochs": 3}, "expected steps or epochs; got both"),
        ({"steps": 3, "net": "vgg"}, "net must be one of auto, small, resnet32, resnext50; got 'vgg'"),
        ({"steps": 3, "loss": "focal"}, "loss must be one of softmax, balanced; got 'focal'"),
        ({"steps": 0}, "steps, epochs and batch_size must be >= 1; got 0"),
    ],
)  # fmt: skip
def test_recipes_refuse(settings, message):
    with pytest.raises(ValueError, match=f"Recipe: {message}"):
        Recipe(**settings)


def test_wrong_images():
    images, labels = some_images(8)
    for x, y, message in (
        (images[0], labels, r"images \(N, C, H, W\), float or uint8; got torch.float32 \(1, 8, 8\)"),
        (images, labels.int(), r"int64 labels of shape \(8,\); got torch.int32"),
        (images, labels + 1, r"labels in \[0, 4\); got 1 to 4"), (images, labels - 1, "got -1 to 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"train_classifier: expected .*{message}"):
            train_classifier(x, y, 4, TINY, seed=0, progress=False)
