"""DGD: closed forms of the guidance, the losses, and a short run."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import ltkernels
from training.__main__ import main
from training.clustering import SoftClusters, soft_kmeans
from training.config import DGDConfig
from training.diffusion import Diffusion, sample
from training.loop import train
from training.methods.dgd import DensityGuidance, Joint, LatentDiffusion, cluster, generate
from training.networks import LatentSpace
from training.run import build_modules
from training.views import augment, contrast, info_nce


def lone_centre(rho=0.0, **options):
    centre = torch.zeros(1, 1)
    return DensityGuidance(ltkernels.Bank(centre), torch.tensor(1.0), rho, torch.ones(1, 1), k=1, **options)


# ---- the density field -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho, expected", [(0.0, 1.0), (0.1, 0.858463)])
def test_gradient_at_unit_distance_from_one_centre(rho, expected):
    assert float(lone_centre(rho).grad(torch.ones(1, 1))) == pytest.approx(expected, abs=1e-6)


def test_gradient_is_that_of_minus_log_p_plus_rho_and_full_at_k_equal_n():
    points, z = torch.randn(40, 3), torch.randn(7, 3, requires_grad=True)
    h, rho = 0.8, 0.05
    p = torch.exp(-torch.cdist(z, points).square() / (2 * h**2)).mean(1)
    (expected,) = torch.autograd.grad(-torch.log(p + rho).sum(), z)
    field = DensityGuidance.fit(points, k=39, bandwidth=h, rho=rho)
    full = dataclasses.replace(field, k=40).grad(z.detach())
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-5)


def test_gradient_vanishes_at_the_neighbours_mean():
    field = DensityGuidance.fit(torch.tensor([[-1.0], [1.0], [9.0]]), k=2, bandwidth=1.0, rho=0.1)
    assert float(field.grad(torch.zeros(1, 1))) == 0


def test_far_away_rho_silences_the_guidance_and_without_rho_it_grows():
    z = torch.full((1, 1), 30.0)
    assert float(lone_centre(rho=0.1).grad(z)) == pytest.approx(0, abs=1e-12)
    assert float(lone_centre(rho=0.0).grad(z)) == pytest.approx(30)


def test_right_of_a_lone_centre_is_pushed_to_the_right():
    field = lone_centre(rho=0.01, at="zt")
    z = torch.tensor([[0.5], [-0.5], [0.0]])
    shift = field.shift(z, z, 0.1, z, 1.0)
    assert float(shift[0]) > 0 > float(shift[1]) and float(shift[2]) == 0


def test_cached_gradients_leave_the_latent_itself_out():
    points = torch.cat([torch.rand(30, 2) - 0.5, torch.tensor([[6.0, 0.0]])])
    field = DensityGuidance.fit(points, k=8, bandwidth=1.0, rho=0.0)
    assert float(field.cached[-1, 0]) > 5.4  # away from the crowd, which ends at .5, as far as it is
    with_itself = field.grad(points)[-1]
    assert float(with_itself.norm()) < 0.1 * float(field.cached[-1].norm())


def test_gradients_can_be_looked_up():
    points = torch.randn(50, 4)
    field = DensityGuidance.fit(points, k=8, query="nearest")
    assert torch.equal(field.grad(points + 1e-4), field.cached)
    rows = torch.tensor([4, 4, 7])
    assert torch.equal(dataclasses.replace(field, query="index").grad(torch.zeros(3, 4), rows), field.cached[rows])
    with pytest.raises(ValueError, match="query='index' needs rows"):
        dataclasses.replace(field, query="index").grad(torch.zeros(3, 4))


def test_rho_follows_the_quantile_and_the_kernels_norm_cancels():
    points = torch.randn(200, 3)
    own = ltkernels.knn_kde_grad(points, points, 16, bandwidth=0.7, self_index=True).density
    peak = DensityGuidance.fit(points, k=16, bandwidth=0.7, rho_quantile=0.25)
    assert peak.rho == pytest.approx(float(own.quantile(0.25)))
    density = DensityGuidance.fit(points, k=16, bandwidth=0.7, rho_quantile=0.25, kernel_norm="density")
    torch.testing.assert_close(peak.grad(points), density.grad(points), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spread, density", [(0.01, "(inf|nan)"), (1.0, "0.0")])
def test_a_kernel_norm_that_leaves_float32_is_an_error(spread, density):
    with pytest.raises(
        ValueError, match=f"rho must be > 0 and finite; the 0.05 quantile of the density is {density} with kernel_norm='density'"
    ):
        DensityGuidance.fit(spread * torch.randn(40, 300), k=8, kernel_norm="density")


# ---- the shift -------------------------------------------------------------------------------------------------------


def test_scale_is_the_ratio_of_shift_and_noise_at_a_typical_latent():
    points = torch.randn(300, 6)
    field = DensityGuidance.fit(points, k=16, scale=0.1, at="zt", query="index", max_shift=100.0)
    for var in (1e-4, 0.3):
        shift = field.shift(points, points, var, points, 1.0, rows=torch.arange(300))
        assert float(shift.square().sum(1).mean().sqrt()) == pytest.approx(0.1 * math.sqrt(6 * var), rel=1e-4)


def test_absolute_strength_is_a11_and_the_schedule_multiplies_it():
    z = torch.tensor([[0.7]])
    field = lone_centre(rho=0.1, eta0=30.0, at="zt", max_shift=1e6)
    gradient = float(field.grad(z))
    assert float(field.shift(z, z, 0.02, z, 1.0)) == pytest.approx(30 * 0.02 * gradient)
    for schedule, half in (("linear", 0.5), ("cosine", 0.5), ("const", 1.0)):
        timed = dataclasses.replace(field, schedule=schedule)
        assert float(timed.shift(z, z, 0.02, z, 0.5)) == pytest.approx(half * 30 * 0.02 * gradient)
    assert float(dataclasses.replace(field, power=2.0).shift(z, z, 0.02, z, 0.5)) == pytest.approx(0.25 * 30 * 0.02 * gradient)


def test_the_shift_is_capped_in_every_row():
    field = lone_centre(rho=0.0, eta0=1e6, at="zt", max_shift=0.5)
    z = torch.tensor([[0.1], [50.0]])
    torch.testing.assert_close(field.shift(z, z, 0.04, z, 1.0), torch.full((2, 1), 0.5 * 0.2))


@pytest.mark.parametrize("at", ["zt", "mu", "x0hat"])
def test_the_gradient_is_taken_where_asked(at):
    places = {"zt": torch.tensor([[0.5]]), "mu": torch.tensor([[-0.4]]), "x0hat": torch.tensor([[1.5]])}
    field = lone_centre(rho=0.1, eta0=1.0, at=at, max_shift=1e6)
    shift = field.shift(places["zt"], places["mu"], 1.0, places["x0hat"], 1.0)
    assert torch.equal(shift, field.grad(places[at]))


def test_no_strength_is_the_plain_sampler_bit_for_bit():
    config = DGDConfig(sample_steps=10, k=16)
    real = torch.randn(80, 4)
    net = build_modules(real, dataclasses.replace(config, encoder="identity"))["denoiser"]
    draw = lambda field: generate(net, real, field, 20, config, torch.Generator().manual_seed(1))  # noqa: E731
    plain = draw(None)
    assert torch.equal(draw(DensityGuidance.fit(real, k=16, eta0=0.0)), plain)
    assert torch.equal(draw(DensityGuidance.fit(real, k=16, scale=0.0)), plain)
    assert not torch.equal(draw(DensityGuidance.fit(real, k=16)), plain)


def test_guidance_in_a_foreign_loop_raises_the_tails_share():
    """Two Gaussians 10 : 1 in the plane with their exact noise prediction, and a sampler that knows nothing of this package."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 4.0], [0.0, -4.0]])
    label = (torch.rand(440, generator=rng) < 1 / 11).long()
    real = centres[label] + torch.randn(440, 2, generator=rng)
    guidance = DensityGuidance.fit(real, k=32, scale=0.2)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()

    def epsilon(z, abar):
        means = abar.sqrt() * centres
        weight = torch.softmax(torch.log(torch.tensor([10.0, 1.0])) - torch.cdist(z, means).square() / 2, 1)
        return (1 - abar).sqrt() * (z - weight @ means)

    def tail_share(guided):
        rng = torch.Generator().manual_seed(1)
        z = torch.randn(1000, 2, generator=rng)
        for t in range(999, 0, -40):
            abar, before = alpha_bar[t], alpha_bar[max(t - 40, 0)]
            eps = epsilon(z, abar)
            x0 = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
            var = float((1 - before) / (1 - abar) * (1 - abar / before))
            mu = before.sqrt() * x0 + (1 - before - var).clamp(min=0).sqrt() * eps
            if guided:
                mu = mu + guidance.shift(z, mu, var, x0, t / 1000)
            z = mu + math.sqrt(var) * torch.randn(z.shape, generator=rng)
        return float((z[:, 1] < 0).float().mean())

    plain, guided = tail_share(False), tail_share(True)
    assert plain == pytest.approx(1 / 11, abs=0.04)
    assert guided > 1.2 * plain


# ---- clustering and losses -------------------------------------------------------------------------------------------


def test_clusters_of_separated_points_and_their_confidence():
    rng = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    label = torch.arange(90) % 3
    z = centres[label] + 0.5 * torch.randn(90, 2, generator=rng)
    clusters = soft_kmeans(z, 3, rng)
    found = clusters.labels(z, 0.95)
    assert (found >= 0).all() and len({(int(a), int(b)) for a, b in zip(label, found, strict=True)}) == 3
    middle = clusters.centres.mean(0, keepdim=True)
    assert int(dataclasses.replace(clusters, temperature=torch.tensor(1e3)).labels(middle, 0.95)) == -1


def test_a_weightless_point_moves_no_cluster():
    rng = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    z, far = torch.randn(50, 2), torch.full((10, 2), 30.0)
    config = DGDConfig(gen_weight=0.0)
    union = cluster(z, far, 3, config, rng())
    assert float(union.centres.abs().max()) < 10
    assert float(cluster(z, far, 3, DGDConfig(gen_weight=1.0), rng()).centres.abs().max()) > 20
    assert float(cluster(z, far, 3, DGDConfig(cluster_on="real", gen_weight=1.0), rng()).centres.abs().max()) < 10


@pytest.mark.parametrize("clusters", [1, 5, 12])
def test_clusters_of_coinciding_points(clusters):
    z = torch.zeros(12, 3)
    found = soft_kmeans(z, clusters, torch.Generator().manual_seed(0), kind="gmm")
    assert torch.isfinite(found.posterior(z)).all()


def test_more_clusters_than_points_is_an_error():
    with pytest.raises(ValueError, match=r"clusters: must be in \[1, N\]; got 4 with N=3 points"):
        soft_kmeans(torch.zeros(3, 2), 4, torch.Generator())


def test_mixture_prior_prefers_the_larger_cluster():
    centres = torch.tensor([[-1.0], [1.0]])
    clusters = SoftClusters(centres, torch.tensor([0.9, 0.1]).log(), torch.tensor(1.0))
    torch.testing.assert_close(clusters.posterior(torch.zeros(1, 1)), torch.tensor([[0.9, 0.1]]))


def test_infonce_closed_forms():
    same = torch.ones(4, 2)
    positive = torch.zeros(4, 4, dtype=torch.bool)
    positive[torch.arange(4), (torch.arange(4) + 2) % 4] = True
    assert float(info_nce(same, same, positive, 0.5)) == pytest.approx(math.log(3))
    apart = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])  # positives coincide, negatives are opposite
    assert float(info_nce(apart, apart, positive, 0.5)) == pytest.approx(math.log(1 + 2 * math.exp(-4)))
    assert float(info_nce(same, same, torch.zeros_like(positive), 0.5)) == 0  # nobody has a positive


def test_labels_make_positives_and_generated_latents_can_be_among_them():
    encoder, head = torch.nn.Identity(), torch.nn.Identity()
    x = torch.cat([torch.eye(4), torch.eye(4)])
    call = lambda **more: float(contrast(encoder, head, x, torch.Generator().manual_seed(0), 0.5, **more))  # noqa: E731
    twins = torch.arange(4).repeat(2)
    assert call(label=twins) != call()
    assert call(label=torch.full((8,), -1)) == call()
    near = call(label=twins, extra=torch.eye(4), extra_label=torch.arange(4))
    wrong = call(label=twins, extra=torch.eye(4), extra_label=torch.arange(4).flip(0))
    assert near < wrong


def test_views_are_functions_of_their_generator():
    for x in (torch.rand(5, 1, 8, 8), torch.rand(5, 3, 32, 32), torch.randn(5, 7)):
        views = [augment(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert views[0].shape == x.shape and torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_latent_norms():
    x = torch.randn(500, 6) @ (torch.eye(6) + 0.3 * torch.rand(6, 6)) + 3
    l2 = LatentSpace(torch.nn.Identity(), "l2", x[:1])
    torch.testing.assert_close(l2(x).square().mean(1), torch.ones(500))
    white = LatentSpace(torch.nn.Identity(), "whiten", x[:1])
    white.fit(x)
    torch.testing.assert_close(torch.cov(white(x).T), torch.eye(6), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(LatentSpace(torch.nn.Identity(), "none", x[:1])(x), x)


# ---- the stages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def blobs():
    rng = torch.Generator().manual_seed(0)
    label = torch.arange(120) % 3
    return 3 * torch.eye(3, 6)[label] + 0.3 * torch.randn(120, 6, generator=rng), label


def small(**more):
    settings = {
        "encoder": "mlp",
        "latent_dim": 4,
        "k": 16,
        "batch_size": 40,
        "sample_steps": 10,
        "gen_per_refresh": 32,
        "denoiser_width": 64,
    }
    return DGDConfig(**{**settings, "refresh_every": 2, "gen_every": 4, "progress": False, **more})


def test_short_overfit(blobs, tmp_path):
    x, label = blobs
    config = small(encoder="identity", latent_norm="whiten", diffusion_epochs=80, joint_epochs=4)
    modules = build_modules(x, config)
    train(LatentDiffusion(x, modules, config), tmp_path, seed=0, progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-30:]) < 0.6 * np.mean(losses[:5])
    stage = Joint(x, modules, config, 3)
    train(stage, tmp_path, seed=0, progress=False)
    found = stage.cache["real_label"]
    assert all((found[label == c] == found[label == c].mode().values).float().mean() > 0.9 for c in range(3))


@pytest.mark.parametrize("change", [{"tau": 0.999999, "cluster_temperature": 1e6}, {"cluster_on": "real"}, {"clustering": "gmm"},
                                    {"density_query": "index", "density_at": "zt"}, {"density_query": "nearest", "density_at": "mu"},
                                    {"encoder_learns_from": "infonce"}, {"latent_norm": "whiten"}, {"eta0": 0.0}, {"rho": 0.0},
                                    {"kde_kernel_norm": "density"}, {"bandwidth": "scott"}, {"bandwidth": "1.5"}])  # fmt: skip
def test_every_switch_of_the_joint_stage_stays_finite(blobs, tmp_path, change):
    x, _ = blobs
    config = small(joint_epochs=2, **change)
    stage = Joint(x, build_modules(x, config), config, 3)
    train(stage, tmp_path, seed=0, progress=False)
    assert all(torch.isfinite(p).all() for module in stage.modules.values() for p in module.parameters())
    if "tau" in change:
        assert (stage.cache["real_label"] == -1).all() and (stage.cache["generated_label"] == -1).all()


def test_the_paper_lets_both_losses_reach_the_encoder(blobs):
    x, _ = blobs

    def gradient(source):
        config = small(lam=0.0, encoder_learns_from=source)
        stage = Joint(x, build_modules(x, config), config, 3)
        stage.loss(0, torch.Generator().manual_seed(0))[0].backward()
        return sum(float(p.grad.abs().sum()) for p in stage.modules["latent"].parameters())

    assert gradient("both") > 0 and gradient("infonce") == 0


def test_without_guidance_the_two_runs_that_are_compared_are_one(blobs, tmp_path):
    x, _ = blobs
    ends = []
    for name in ("joint", "joint-eta0"):
        config = small(eta0=0.0, joint_epochs=3)
        stage = Joint(x, build_modules(x, config), config, 3, name)
        train(stage, tmp_path / name, seed=config.seed, progress=False)
        ends.append(torch.cat([p.detach().flatten() for module in stage.modules.values() for p in module.parameters()]))
    assert torch.equal(*ends)


def test_a_run_leaves_everything_it_promises(blobs, tmp_path, capsys):
    x, label = blobs
    np.savez(tmp_path / "blobs.npz", features=x.numpy(), labels=label.numpy())
    options = "--no-progress --latent-norm whiten --holdout 0.2 --diffusion-epochs 40 --joint-epochs 4 --k 16 --sample-steps 10 --seed 3"
    out = tmp_path / "run"
    assert main(["dgd", "--dataset", f"features:{tmp_path}/blobs.npz", "--out", str(out), *options.split()]) == 0
    report = json.loads((out / "metrics.json").read_text())
    scores = {"acc", "nmi", "ari", "acc_head", "acc_med", "acc_tail"}
    assert scores <= set(report) and report["acc"] > 0.95 and report["n"] == 96 and report["holdout"]["n"] == 24
    assert {"kmeans", "spectral", "eta0=0"} == set(report["baselines"])
    assert all(scores == set(row) for row in report["baselines"].values())
    guided, unguided = (report["guidance"]["after_diffusion"][name]["log_density"] for name in ("guided", "unguided"))
    assert guided < unguided
    promised = {"config.json", "log.jsonl", "metrics.json", "card.md", "latents.png", "density.png", "losses.png"}
    assert promised <= {path.name for path in out.iterdir()}
    table = capsys.readouterr().out
    assert all(name in table for name in ("DGD", "kmeans", "eta0=0", "acc_tail"))


def test_public_schedule_is_what_the_sampler_uses():
    config = DGDConfig()
    diffusion = Diffusion(config.timesteps, config.beta_start, config.beta_end)
    z = sample(diffusion, lambda z, t: torch.zeros_like(z), torch.ones(2, 1), 4, torch.Generator().manual_seed(0))
    assert torch.isfinite(z).all()
