"""Denoisers of images, the average of their weights, and the augmentation they are told of."""

import math

import pytest
import torch
import torch.nn.functional as F

from training.augment import LABELS, ada_augment
from training.ema import Ema
from training.networks import ImageMLP, UNet, build_denoiser


def small(num_classes=5, **options):
    return UNet(3, num_classes, width=8, mult=(1, 2), blocks=1, dropout=0.0, **options)


def inputs(count=4, size=8):
    return torch.randn(count, 3, size, size), torch.tensor([1, 10, 500, 1000])[:count], torch.tensor([0, 1, 4, -1])[:count]


def awake(net):
    """With last layers that are not near 0, as after training."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def test_the_released_size():
    net = UNet(3, 0)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307  # pytorch-ddpm's 35.7 M at width 128


def released(weights, x, index, y):
    """pytorch-ddpm's forward pass with CBDM's label, for width 128, mult (1, 2), one block a level and attention at level 1, written out
    over the weights in its order. index = t - 1."""
    weights = iter(weights)

    def affine(h):
        return F.linear(h, next(weights), next(weights))

    def conv(h, stride=1):
        weight = next(weights)
        return F.conv2d(h, weight, next(weights), stride, weight.shape[-1] // 2)

    def norm(h):
        return F.group_norm(h, 32, next(weights), next(weights))

    def attend(x):
        h = norm(x)
        q, k, v = (conv(h).flatten(2) for _ in range(3))  # (B, C, HW)
        h = v @ torch.softmax(q.mT @ k / math.sqrt(q.shape[1]), -1).mT
        return x + conv(h.reshape(x.shape))

    def block(x, outputs, attention):
        h = conv(F.silu(norm(x))) + affine(F.silu(c))[:, :, None, None]
        h = conv(F.silu(norm(h)))
        h = h + (conv(x) if x.shape[1] != outputs else x)
        return attend(h) if attention else h

    width = 128
    angles = index[:, None] * torch.exp(-math.log(10000) * torch.arange(0, width, 2) / width)
    c = affine(F.silu(affine(torch.stack([angles.sin(), angles.cos()], -1).reshape(len(x), width)))) + next(weights)[y]
    a = conv(x)
    b = block(a, width, False)
    d = conv(b, stride=2)
    e = block(d, 2 * width, True)
    h = block(block(e, 2 * width, True), 2 * width, False)
    h = block(torch.cat([h, e], 1), 2 * width, True)
    h = block(torch.cat([h, d], 1), 2 * width, True)
    h = conv(F.interpolate(h, scale_factor=2))
    h = block(torch.cat([h, b], 1), width, False)
    h = block(torch.cat([h, a], 1), width, False)
    h = conv(F.silu(norm(h)))
    assert next(weights, None) is None
    return h


def test_it_is_the_released_function_of_the_released_weights():
    net, (x, t, _) = UNet(3, 5, width=128, mult=(1, 2), blocks=1).eval(), inputs()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # the layers that begin near 0 too
    y = torch.tensor([0, 1, 4, 2])
    expected = released(net.parameters(), x, t - 1, y)
    torch.testing.assert_close(net(x, t, y), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x, t + 1, y), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("net", [small, lambda **o: ImageMLP(3, 8, 5, width=32, **o)])
def test_a_label_of_minus_one_is_no_label(net):
    net, (x, t, y) = awake(net()), inputs()
    out = net(x, t, y)
    assert out.shape == x.shape
    torch.testing.assert_close(net(x, t, torch.full_like(y, -1)), net(x, t, None), rtol=0, atol=0)
    torch.testing.assert_close(out[3:], net(x, t, None)[3:])
    assert not torch.allclose(out[:3], net(x, t, None)[:3], atol=1e-4)
    assert not torch.allclose(out, net(x, t.flip(0), y), atol=1e-4)


@pytest.mark.parametrize("net", [small, lambda **o: ImageMLP(3, 8, 5, width=32, **o)])
def test_augmentation_labels_count(net):
    told, (x, t, y) = awake(net(augment_dim=9)), inputs()
    plain = told(x, t, y, torch.zeros(4, 9))
    torch.testing.assert_close(plain, told(x, t, y, None))  # zeros say: nothing was done, and so does a sampler that says nothing
    assert not torch.allclose(plain, told(x, t, y, torch.ones(4, 9)), atol=1e-4)
    with pytest.raises(ValueError, match="augment_dim=0"):
        awake(net())(x, t, y, torch.zeros(4, 9))


def test_the_net_in_other_clothes():
    net, (x, t, y) = awake(small()), inputs()
    expected = net(x, t, y)
    other = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, y)
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, y), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, y).float()
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.1)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiples of 2"):
        small()(torch.randn(1, 3, 7, 7), torch.ones(1, dtype=torch.long))
    with pytest.raises(ValueError, match="even number of pixels"):
        build_denoiser("unet", 1, 9, 10, width=8)
    with pytest.raises(ValueError, match="one of auto, unet, mlp"):
        build_denoiser("vit", 1, 8, 10, width=8)
    assert isinstance(build_denoiser("auto", 1, 8, 10, width=8), ImageMLP)
    assert build_denoiser("auto", 3, 28, 10, width=8).levels == 3
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 8\)"):
        ImageMLP(3, 8, 5)(torch.randn(1, 3, 9, 9), torch.ones(1, dtype=torch.long))


def test_ema():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema = Ema(net, 0.9999)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    ema.update(net)
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)  # constant weights stay
    with torch.no_grad():
        ema.net[0].weight.zero_()
        net[0].weight.fill_(1)
        net[1].num_batches_tracked.fill_(7)
    ema.update(net)
    torch.testing.assert_close(ema.net[0].weight, torch.full((2, 2), 1e-4))  # the first step counts like every other
    assert ema.net[1].num_batches_tracked == 7
    assert not ema.train().net.training and not any(p.requires_grad for p in ema.parameters())
    with pytest.raises(ValueError, match=r"\[0, 1\]; got 1.5"):
        Ema(net, 1.5)


# ---- augmentation ----------------------------------------------------------------------------------------------------


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_no_augmentation_is_none():
    x = torch.randn(16, 3, 8, 8)
    out, labels = ada_augment(x, rng(), p=0)
    assert torch.equal(out, x) and not labels.any() and labels.shape == (16, len(LABELS))


def test_half_are_flipped_and_say_so():
    x = torch.randn(4000, 1, 4, 4)
    out, labels = ada_augment(x, rng(), p=1e-9)
    flipped = labels[:, 0] == 1
    assert 0.46 < flipped.double().mean() < 0.54 and not labels[:, 1:].any()
    assert torch.equal(out[flipped], x[flipped].flip(3)) and torch.equal(out[~flipped], x[~flipped])


def only(number, x, p=0.12):
    """The images that the first label of `number` alone speaks of, before and after."""
    out, labels = ada_augment(x, rng(1), p)
    mine = torch.zeros(9, dtype=torch.bool)
    mine[list(number)] = True
    rows = (labels[:, list(number)] != 0).any(1) & ~(labels[:, ~mine] != 0).any(1)
    assert rows.sum() > 20
    return x[rows], out[rows], labels[rows]


def test_every_label_says_what_was_done():
    size = 32
    place = (torch.arange(size) + 0.5) / size - 0.5  # of pixel centres, in edges from the centre
    x = torch.stack([place.expand(size, size), place[:, None].expand(size, size)]).expand(4000, 2, size, size)  # (x, y) of every pixel
    inner = slice(12, 20)  # no border within reach
    before, after, _ = only([1], x)
    torch.testing.assert_close(after, before.flip(2), rtol=0, atol=1e-6)

    def maps(number):
        before, after, labels = only(number, x)
        return before[..., inner, inner], after[..., inner, inner], labels[:, :, None, None]

    before, after, labels = maps([2])  # larger by 2^label: a place shows what was nearer to the centre
    close = dict(rtol=0, atol=2e-5)
    torch.testing.assert_close(after * torch.exp2(labels[:, 2:3]), before, **close)
    before, after, labels = maps([3, 4])
    cos, sin = labels[:, 3] + 1, labels[:, 4]
    turned = torch.stack([cos * after[:, 0] - sin * after[:, 1], sin * after[:, 0] + cos * after[:, 1]], 1)
    torch.testing.assert_close(turned, before, **close)
    before, after, labels = maps([7, 8])
    near = (labels[:, 7:9].abs() < 0.3).all(1).flatten()
    torch.testing.assert_close((after + labels[:, 7:9])[near], before[near], **close)
    before, after, labels = maps([5, 6])
    length = labels[:, 5:7].square().sum(1, keepdim=True).sqrt()
    angle = torch.atan2(labels[:, 6], labels[:, 5]) / 2
    direction = torch.stack([angle.cos(), angle.sin()], 1)
    along, was = ((direction * place).sum(1, keepdim=True) for place in (after, before))
    torch.testing.assert_close(along * torch.exp2(length), was, **close)


def test_the_generator_decides():
    x = torch.randn(64, 3, 8, 8)
    first, second, third = (ada_augment(x, rng(seed), 0.5) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and not torch.equal(first[1], third[1])
    assert torch.isfinite(first[0]).all()
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\]; got 2"):
        ada_augment(x, rng(), 2)
