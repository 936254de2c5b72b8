"""Settings: frozen dataclasses that tyro turns into options, each value with its provenance and its limits.

A field is declared with where its default comes from: `paper` (stated there), `code` (read in the papers' public code), `ours` (the paper
is silent or contradicts itself). Where paper and code disagree, both values stand beside the default: `paper(25.0, code=49.0)`. config.json
records value and provenance of every field; a value that a preset changed is whose it is, values given on the command line are `user`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

PROVENANCE = ("paper", "code", "ours")
BANDWIDTHS = ("knn-median", "scott")  # rules of ltkernels.knn_bandwidth
REFORWARD = 16  # the largest batch of 002's Algorithm 1, which makes batch size^2 forwards
RUN = "RUN"  # --finetune of presets that go on from another run, which has to be given
TABLE5_ORDER = "7,2,6,4,5,3,9,0,1,8"  # of CIFAR-10: horse, bird, frog, deer, dog, cat, truck, airplane, automobile, ship
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": (">=", lambda value, limit: value >= limit),
    "gt": (">", lambda value, limit: value > limit),
    "lt": ("<", lambda value, limit: value < limit),
}


def _setting(provenance: str, default: Any, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={provenance: default, **metadata, "provenance": provenance})


def paper(default: Any, **more: Any) -> Any:
    """`more`: limits (ge, gt, lt), code=value where the released code has another one, tables=(values of rows of the paper's tables)."""
    return _setting("paper", default, **more)


def code(default: Any, **more: Any) -> Any:
    return _setting("code", default, **more)


def ours(default: Any, **more: Any) -> Any:
    return _setting("ours", default, **more)


def runtime(default: Any, **limits: Any) -> Any:
    """A field that says how to run, not what: it is no part of a run's identity."""
    return _setting("ours", default, runtime=True, **limits)


@dataclass(frozen=True)
class RunConfig:
    """What the run of any method has."""

    dataset: str = ours("digits-lt")  # digits-lt, cifar10-lt, cifar100-lt, folder[-lt]:PATH or features[-lt]:FILE.npz
    imbalance_ratio: float = paper(10.0, ge=1)  # head : tail of the -lt data sets (Table 5 has IR = 10)
    profile: Literal["exp", "step", "uniform"] = code("exp")  # shape of the long tail
    indices: str | None = ours(None)  # file with the rows to use, instead of choosing them
    image_size: int = ours(32, ge=1)  # side of the images of a folder
    holdout: float = ours(0.0, ge=0, lt=1)  # share of every class that is kept from training and clustered at the end
    seed: int = ours(0, ge=0)  # of weights, batches, views, noise and the choice of rows
    root: str = runtime("data")  # folder with downloaded data sets
    out: str | None = runtime(None)  # run folder; default: runs/METHOD-DATASET-SEED
    device: Literal["cpu", "cuda"] = runtime("cpu")
    resume: bool = runtime(False, once=True)  # go on with the run in --out
    overwrite: bool = runtime(False, once=True)  # delete the run in --out and start again
    progress: bool = runtime(True)  # progress bars
    checkpoint_every: int = runtime(200, ge=1)  # steps between checkpoints; an interrupt writes one in any case

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class DGDConfig(RunConfig):
    """DGD: density-gradient guided diffusion for long-tailed clustering (supplement 000).

    Defaults follow the paper where it speaks; G1 to G14 are the points where it does not, see training/docs/dgd.md.
    """

    # Latent space (G10).
    encoder: Literal["auto", "cnn", "resnet18", "mlp", "identity"] = ours("auto")
    """auto: cnn up to 16 pixels, resnet18 above, identity for features (nothing to train: stage 1 falls away)"""
    latent_dim: int = ours(32, ge=1)  # d; features keep their own width with the identity encoder
    latent_norm: Literal["l2", "whiten", "none"] = ours("whiten")
    """whiten: equal spread in every direction, which the isotropic kernel (A.3) and the unit noise presume; l2: norm sqrt(d)"""

    # The three stages (appendix C).
    encoder_epochs: int = paper(50, ge=0)  # stage 1: InfoNCE on two views
    diffusion_epochs: int = paper(100, ge=0)  # stage 2: denoising on the frozen encoder's latents
    joint_epochs: int = paper(200, ge=0)  # stage 3: both networks
    refresh_every: int = paper(20, ge=1)  # epochs of stage 3 between refreshes of the density field
    batch_size: int = ours(128, ge=2)
    lr: float = ours(1e-3, gt=0)  # of Adam, falling to zero along a cosine in every stage
    joint_lr: float = ours(2e-4, gt=0)  # of the encoder in stage 3: slow, so that denoiser and density field can follow

    # Latent diffusion.
    timesteps: int = code(1000, ge=1)  # T
    beta_start: float = code(1e-4, gt=0, lt=1)
    beta_end: float = code(0.02, gt=0, lt=1)
    sample_steps: int = ours(25, ge=1)  # reverse steps of one generation, respaced DDPM (G11)
    clip_x0: bool = ours(True)  # predicted clean latents stay in the box of the real ones
    denoiser_width: int = ours(256, ge=1)
    noise_draws: int = ours(2, ge=1)  # noise levels drawn for each latent of a batch

    # Density field.
    k: int = paper(64, ge=1)  # neighbours of the kNN-KDE (A.13)
    bandwidth: str = ours("knn-median")  # knn-median, scott or a number (G5)
    kde_kernel_norm: Literal["peak", "density"] = ours("peak")  # density over- or underflows in many dimensions (G3)
    rho: float | None = ours(None, ge=0)  # rho of A.4, absolute; when given it replaces --rho-quantile (G4)
    rho_quantile: float = ours(0.05, ge=0, lt=1)  # rho: this quantile of the real latents' leave-one-out density (G4)

    # Guidance.
    guidance_scale: float = ours(0.05, ge=0)  # c: norm of shift / noise of a step at t = T and a typical latent (G14); 0: off
    eta0: float | None = ours(None, ge=0)  # eta_0 of A.6, absolute; when given it replaces --guidance-scale; 0: off
    eta_schedule: Literal["linear", "cosine", "const"] = ours("linear")  # eta_t / eta_0 over t / T: strong early (G8)
    eta_power: float = ours(1.0, gt=0)  # p of (t / T)^p in the linear schedule (G8)
    max_shift: float = ours(1.0, gt=0)  # cap of shift / noise in every row (G8)
    density_at: Literal["zt", "mu", "x0hat"] = ours("x0hat")  # where grad U is taken: A.11, A.10, the clean scale (G7)
    density_query: Literal["recompute", "index", "nearest"] = ours("recompute")  # how grad U is looked up (G6)

    # Joint stage.
    lam: float = ours(1.0, ge=0)  # lambda of L_DM + lambda L_InfoNCE (G10)
    tau: float = ours(0.95, ge=0, lt=1)  # pseudo-labels need P_max > tau (G10)
    infonce_temperature: float = ours(0.5, gt=0)  # (G10)
    head_dim: int = ours(64, ge=1)  # width of the projection head that InfoNCE sees (SimCLR)
    encoder_learns_from: Literal["both", "infonce"] = paper("both")  # losses that reach the encoder in stage 3 (Alg. 1)
    gen_every: int = ours(30, ge=1)  # steps between reverse samplings; 1 is Alg. 1 to the letter (G11)
    gen_per_refresh: int = ours(256, ge=1)  # latents generated each time (G11)
    clusters: int | None = ours(None, ge=1)  # default: as many as classes
    clustering: Literal["kmeans", "gmm"] = ours("kmeans")  # soft k-means, or a spherical mixture's posterior (G10)
    cluster_temperature: float = ours(2.0, gt=0)
    """T of P = softmax(-dist^2 / (2 T s^2)), s^2 the clusters' variance per dimension; 1 is the spherical mixture's posterior"""
    cluster_on: Literal["real", "union"] = paper("union")  # Alg. 1 clusters real and generated latents together (G14)
    gen_weight: float = ours(0.1, ge=0)
    """weight in clustering of a generated latent, where a real one has 1: with more they form clusters of their own (G14)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bandwidth not in BANDWIDTHS:
            positive_number("bandwidth", self.bandwidth, "knn-median, scott or a number > 0")
        if self.sample_steps > self.timesteps:
            raise ValueError(f"config: sample_steps must be <= timesteps={self.timesteps}; got {self.sample_steps}")
        if self.beta_start > self.beta_end:
            raise ValueError(f"config: beta_start must be <= beta_end={self.beta_end}; got {self.beta_start}")

    @property
    def guided(self) -> bool:
        return (self.guidance_scale if self.eta0 is None else self.eta0) > 0


@dataclass(frozen=True)
class CLUDIConfig(RunConfig):
    """CLUDI: clustering via self-supervised diffusion (004).

    The defaults train well on digits within minutes; --preset cludi-paper and cludi-code hold what the paper and its released code say.
    L1 to L14 are the points where the two disagree, see training/docs/cludi.md.
    """

    # Features: what every method of the table clusters.
    features: Literal["encoder", "pixels"] = ours("encoder")
    """of images: latents of DGD's encoder after its stage 1, or the pixels; feature files are taken as they are"""
    feature_norm: Literal["standard-l2", "standard", "l2", "none"] = ours("standard-l2", paper="none", code="l2")
    """of a feature vector: mean 0 and variance 1 per coordinate, norm sqrt(n) (the released code has 1; noise is scaled alike), or both"""
    feature_width: int | None = ours(None, ge=1)  # refuse a feature file of another width
    encoder_epochs: int = ours(50, ge=0)  # of DGD's stage 1
    latent_dim: int = ours(32, ge=1)  # width of the encoder's latents
    clusters: int | None = ours(None, ge=2)  # K; default: as many as classes

    # Diffusion of assignment embeddings.
    embedding_dim: int | None = paper(None, code=64, ge=2)  # d; default: 32 below 100 clusters, else 64
    timesteps: int = paper(1000, ge=1)  # T
    sqrt_mode: Literal["paper", "betas"] = code("betas", paper="paper")  # Eq. 12 as printed, or through clipped betas (L1)
    noise_scale_f2: float = ours(100.0, paper=25.0, gt=0)  # F^2 of Eq. 6, 7, 15, a variance (L3)
    noise_std: float | None = paper(None, code=49.0, gt=0)  # F; when given it replaces --noise-scale-f2 (L3)
    replicas: int = ours(2, paper=4, code=8, ge=1)  # B: assignments of each row in a step of training
    teacher_steps: int = ours(4, paper=25, ge=1)  # S
    clip_z0: bool = paper(False, code=True)  # the teacher's predicted z_0 is clamped to +-1 (L10)

    # The network.
    width: int = ours(96, code=384, ge=2)  # of the features' part; the assignment has half of it
    depth: int = ours(3, code=5, ge=1)  # layers on both parts together
    dropout: float = code(0.15, ge=0, lt=1)  # on the features' part, student only
    self_conditioning: float = code(0.5, ge=0)  # probability that the student sees its own first guess; 0: never, teacher included

    # The student's view.
    augment: Literal["gaussian", "direction"] = paper("gaussian", code="direction")
    """noise of a variance per coordinate, or of a length (in units of the features' root mean square norm)"""
    aug_noise_min: float = paper(0.1, code=0.2, ge=0)  # variance or length, uniform from here
    aug_noise_max: float = paper(0.3, code=1.0, ge=0)  # to here
    aug_drop_min: float = paper(0.2, code=0.05, ge=0, lt=1)  # share of coordinates set to zero, uniform from here
    aug_drop_max: float = paper(0.2, code=0.1, ge=0, lt=1)  # to here

    # Losses.
    lam: float = paper(50.0, ge=0)  # lambda of l_dif + lambda l_cls
    tau: float = code(0.1, gt=0)  # temperature of p(k | z) and of Eq. 23
    tau_col: float = code(0.05, gt=0)  # temperature of Eq. 21
    snr_weight: Literal["min_x0", "min_v", "paper_max", "none"] = code("min_x0", paper="paper_max")
    """w of a replica: min(SNR, gamma), the same / (SNR + 1), Eq. 26 as printed, 1 (L4)"""
    snr_gamma: float = paper(5.0, gt=0)
    snr_over_std: bool = paper(False, code=True)  # the weights are divided by F
    teacher_logits: Literal["paper", "direct"] = code("direct", paper="paper")  # L z_0 of Eq. 14, or L of the denoised embedding (L5)
    dif_target: Literal["raw", "reembed"] = code("reembed", paper="raw")  # what l_dif compares with z_0: Eq. 18, or Eq. 13 of it (L6)
    dif_reduce: Literal["mean", "sum"] = code("mean", paper="sum")  # of l_dif over the d coordinates (L6)
    embed_trainable: bool = code(False, paper=True)  # E learns (L7)
    teacher_grad: Literal["none", "head", "full"] = paper("head", code="full")
    """where gradients enter the teacher: nowhere, L and E only, through all S steps (L8)"""
    cls_pairs: Literal["matched", "all"] = code("all", paper="matched")  # replicas that l_cls compares (L9)
    cls_norm: Literal["joint", "per_replica"] = paper("joint", code="per_replica")  # rows that Eq. 21 and 23 run over (L9)
    class_prior: str = paper("uniform")  # p(k): uniform, empirical (the classes' shares), or K numbers with commas (L14)

    # Optimisation: AdamW(.9, .98).
    steps: int | None = ours(160, code=None, ge=1)  # of training; none: as many as --epochs make
    epochs: int = code(200, ge=0)
    restarts: int = ours(12, code=1, ge=1)
    """networks that learn one after another; the one of the lowest class loss, which takes no label, answers (k-means has 10 inits)"""
    batch_size: int = code(256, ge=2)
    lr: float = ours(1e-3, code=1e-4, gt=0)
    min_lr: float = code(1e-6, ge=0)  # at the end of the cosine
    warmup_epochs: float = code(1.0, ge=0)
    weight_decay: float = code(0.01, ge=0)
    clip: float = code(4.0, gt=0)  # of the gradient's norm, for every parameter by itself

    # Evaluation, after the last step only (L13), with the trained weights (L12).
    eval_steps: int = ours(4, paper=100, code=50, ge=1)  # reverse steps
    eval_samples: int = ours(16, code=64, ge=1)  # assignments averaged
    avg: Literal["probs", "logits"] = paper("probs", code="logits")  # what is averaged (L11)

    # The comparisons.
    baselines: bool = runtime(True)  # train and score the other methods on the same features
    baseline_steps: int = ours(500, ge=1)  # of the Self-Classifier, SCAN, CC and TEMI heads and, at least, of DGD's diffusion
    neighbours: int = ours(20, ge=1)  # mined for SCAN and TEMI

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_steps", "eval_steps"):
            if getattr(self, name) > self.timesteps:
                raise ValueError(f"config: {name} must be <= timesteps={self.timesteps}; got {getattr(self, name)}")
        for low, high in (("aug_noise_min", "aug_noise_max"), ("aug_drop_min", "aug_drop_max")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"config: {low} must be <= {high}={getattr(self, high)}; got {getattr(self, low)}")
        if self.self_conditioning > 1:
            raise ValueError(f"config: self_conditioning must be <= 1; got {self.self_conditioning}")
        if self.class_prior not in ("uniform", "empirical"):
            for part in self.class_prior.split(","):
                positive_number("class_prior", part, "uniform, empirical or numbers > 0 separated by commas")

    @property
    def std(self) -> float:
        """F."""
        return math.sqrt(self.noise_scale_f2) if self.noise_std is None else self.noise_std


@dataclass(frozen=True)
class ImageConfig(RunConfig):
    """Image diffusion on a long tail: what DDPM, CBDM, T2H, DiffROP and CCUA share (001, section 4; the code bases OC_LT and CBDM).

    The defaults train well on digits within minutes; the presets hold the rows of the paper's tables. D1 to D13 are the points where
    paper and code disagree, see training/docs/t2h.md.
    """

    dataset: str = ours("digits-lt", paper="cifar10-lt", tables=("cifar100-lt", "tiny-imagenet-lt", "imagenet-lt"))
    """digits-lt, cifar10-lt, cifar100-lt, tiny-imagenet-lt, each also without -lt, imagenet-lt or folder[-lt]:PATH"""
    imbalance_ratio: float = ours(20.0, paper=100.0, tables=(1000.0,), ge=1)
    """head : tail of the -lt data sets; --imb-factor .05 is --imbalance-ratio 20"""
    class_order: str | None = ours(None, tables=(TABLE5_ORDER,))
    """classes from head to tail: numbers with commas, reversed, or seed:N; default: as numbered (Table 5 has another one)"""

    image_size: int = ours(32, ge=1)  # side of the images of a folder, of TinyImageNet and of ImageNet-LT
    holdout: float = ours(0.0, ge=0, lt=1)  # share of every class that is kept from training

    # Diffusion.
    timesteps: int = paper(1000, ge=1)  # T
    beta_start: float = paper(1e-4, gt=0, lt=1)
    beta_end: float = paper(0.02, gt=0, lt=1)
    prediction: Literal["epsilon", "v", "x0"] = paper("epsilon")  # what the network's output is

    # Network.
    conditional: bool = paper(True, tables=(False,))  # the network is told the label
    network: Literal["auto", "unet", "mlp"] = ours("auto", code="unet")  # auto: mlp for images up to 8x8, unet above
    width: int | None = ours(None, code=128, ge=2)  # default: 128 for unet, 256 for mlp
    dropout: float = ours(0.0, code=0.1, ge=0, lt=1)
    flip: Literal["auto", "yes", "no"] = ours("auto", code="yes")  # every second image mirrored; auto: but not digits, which have a side
    augment: Literal["none", "ada", "diffaug"] = code("none", tables=("diffaug",))
    """ada: 9 kinds of geometric augmentation, whose parameters the network is told; diffaug: colour, translation, cutout (002, Table 1)"""
    augment_p: float = code(0.12, gt=0)  # probability of each kind of ada

    # Optimisation: Adam.
    steps: int = ours(5000, paper=300_000, code=200_000, tables=(100_000, 400_000), ge=1)
    """the paper follows CBDM, whose code makes 300000; OC_LT evaluates its checkpoint of 200000 (D8)"""
    batch_size: int = code(128, paper=64, ge=1)  # of all ranks together (D8)
    lr: float = ours(1e-3, code=2e-4, gt=0)  # constant after the warm-up
    warmup: int = ours(200, code=5000, ge=0)  # steps in which the learning rate rises
    ema_decay: float = ours(0.999, code=0.9999, ge=0, lt=1)
    clip: float = code(1.0, gt=0)  # of the gradient's norm
    batch_resample: Literal["none", "balanced", "sqrt"] = paper("none", tables=("balanced", "sqrt"))
    """rows of a batch: every row once an epoch; class uniform, then row uniform; classes by the square root of their size (D3)"""
    loss_weight: Literal["none", "inverse"] = paper("none", tables=("inverse",))
    """inverse: a row's squared error counts 1 / (its class's share), with mean 1 over the training set (002, Table 4)"""
    cfg_drop: float = code(0.1, ge=0)  # share of labels that the network is not told (classifier-free guidance)
    cfg_drop_mode: Literal["sample", "batch"] = ours("sample", code="batch")  # drop the labels of single rows, or of whole batches
    finetune: str | None = ours(None)  # run folder whose averaged weights this run starts from (Table 8)
    amp: Literal["none", "bf16"] = code("none")  # autocast of the network
    channels_last: bool = ours(False)
    compile: bool = ours(False)  # torch.compile of the network
    grid_every: int = ours(0, ge=0)  # steps between pictures of samples from one fixed noise; 0: none

    # Samples, from the averaged weights.
    samples: int = ours(2000, paper=50_000, tables=(10_000, 20_000), ge=1)
    sample_labels: Literal["equal", "uniform"] = paper("equal", code="uniform")  # as many of each class, or drawn
    sampler: Literal["ddim", "ddpm"] = paper("ddim")
    sample_steps: int = paper(100, ge=1)
    omega: float = ours(0.5, paper=1.5)  # w of (1 + w) eps(x, y) - w eps(x)
    clip_x0: bool = ours(True, code=False)  # predicted images stay in [-1, 1]; the released clip has no effect
    variance: Literal["fixedlarge", "fixedsmall"] = code("fixedlarge")  # of the sampler ddpm
    ddim_quirk: bool = ours(False, code=True)  # the released DDIM's steps, whose last one does nothing
    sample_batch: int = ours(500, ge=1)  # images sampled at a time, from one stream of noise

    # Evaluation of the samples.
    evaluate: bool = runtime(True)  # python -m training evaluate RUN does it later
    split_rule: Literal["tercile", "count"] = ours("tercile")  # which classes are many, med and few (R15)
    split_ref: Literal["balanced", "lt"] = ours("balanced")  # images that groups and classes are compared with: all, the training set (R14)
    inception: str | None = runtime(None)  # file of Inception's weights, for torch-fidelity; default: see training/README.md
    cache: str = runtime("runs/cache")  # folder for feature networks and the references' features

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_steps > self.timesteps:
            raise ValueError(f"config: sample_steps must be <= timesteps={self.timesteps}; got {self.sample_steps}")
        if self.beta_start > self.beta_end:
            raise ValueError(f"config: beta_start must be <= beta_end={self.beta_end}; got {self.beta_start}")
        if self.cfg_drop > 1:
            raise ValueError(f"config: cfg_drop must be <= 1; got {self.cfg_drop}")
        if self.ddim_quirk and self.sampler != "ddim":
            raise ValueError(f"config: ddim_quirk is about the sampler ddim; got {self.sampler}")


@dataclass(frozen=True)
class DDPMConfig(ImageConfig):
    """DDPM: plain denoising diffusion, the base of CBDM and T2H.

    The defaults train well on digits within minutes; the presets hold the rows of the tables of 001.
    """

    omega: float = ours(0.5, paper=1.5, code=0.8)  # w of (1 + w) eps(x, y) - w eps(x); code: CBDM's, for DDPM


@dataclass(frozen=True)
class CBDMConfig(ImageConfig):
    """CBDM: class-balancing diffusion (Qin et al., 2023; 001, appendix D): the noise predicted for one label is drawn to that for another.

    The defaults train well on digits within minutes; the presets hold the rows of the tables of 001.
    """

    omega: float = ours(0.5, paper=1.5, code=1.6)  # w of (1 + w) eps(x, y) - w eps(x); code: CBDM's, 2 after fine-tuning
    cb_tau: float = code(1.0, ge=0)  # tau of tau t / T (D12)
    cb_sampling: Literal["auto", "train", "uniform", "sqrt"] = code("auto")
    """the other label: by the training set's frequencies, uniform, by their square roots; auto: train, but uniform with --finetune"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditional:
            raise ValueError("config: CBDM compares labels, so it needs conditional; got --no-conditional")

    @property
    def other_labels(self) -> str:
        return self.cb_sampling if self.cb_sampling != "auto" else "train" if self.finetune is None else "uniform"


@dataclass(frozen=True)
class T2HConfig(ImageConfig):
    """T2H: long-tailed diffusion with oriented calibration (001): the target of a noisy tail image may be a head image, chosen by p_sel.

    The defaults train well on digits within minutes; the presets hold the rows of the paper's tables.
    """

    batch_resample: Literal["none", "balanced", "sqrt"] = paper("balanced", code="none")
    """rows of a batch: every row once an epoch; class uniform, then row uniform; classes by the square root of their size (D3)"""
    transfer_mode: Literal["t2h", "h2t", "full"] = paper("t2h", tables=("h2t", "full"))
    """whose image may become the target: one of a class at least as frequent, at most as frequent, any (D4)"""
    transfer_estimator: Literal["sample", "mean"] = paper("sample")  # Eq. 8, or the mean over all that may be chosen (Eq. 6)
    transfer_beta: float | None = ours(None)  # beta of Eq. 7, which replaces the gate: 1 is close to t2h, -1 to h2t, 0 is full (D7)
    transfer_cut_time: int | None = ours(None, ge=1)  # rows with t below this only are transferred; default: all (D6)
    uncond_transfer_mode: Literal["same", "none", "t2h", "h2t", "full"] = code("same")  # of rows whose label was dropped (D5)
    reference: Literal["batch", "gather", "bank"] = code("batch")
    """the images to choose from: a rank's own rows, the whole batch of all ranks, the whole data set"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uncond_transfer_mode != "same" and not self.conditional:
            raise ValueError("config: uncond_transfer_mode is about dropped labels; a run without labels takes --transfer-mode")
        if self.transfer_beta is not None and self.uncond_transfer_mode not in ("same", "none"):
            expected = "transfer_beta replaces every gate, so uncond_transfer_mode must be same or none"
            raise ValueError(f"config: {expected}; got {self.uncond_transfer_mode}")
        if self.reference == "bank" and self.augment != "none":
            raise ValueError(f"config: reference bank holds images as they are, so it needs augment none; got {self.augment}")


@dataclass(frozen=True)
class DiffROPConfig(CBDMConfig):
    """DiffROP: overlap optimisation (002): denoised means of different classes at one time are pushed apart, on top of DDPM or CBDM.

    The defaults train well on digits within minutes; the presets hold the rows of the tables of 002, which says "paper" here. R1 to R15 are
    the points where it is silent or contradicts itself, see training/docs/diffrop.md.
    """

    base: Literal["ddpm", "cbdm"] = paper("ddpm", tables=("cbdm",))  # the loss that the term comes to
    dataset: str = ours("digits-lt", paper="cifar100-lt", tables=("cifar10-lt",))
    steps: int = ours(5000, code=300_000, ge=1)  # code: CBDM's, "strictly adhered to"
    batch_size: int = ours(128, code=64, ge=1)  # of all ranks together
    lr: float = ours(1e-3, paper=2e-4, gt=0)  # constant after the warm-up
    warmup: int = ours(200, paper=5000, ge=0)  # steps in which the learning rate rises
    samples: int = ours(2000, paper=50_000, tables=(10_000,), ge=1)
    sample_labels: Literal["equal", "uniform"] = ours("equal")  # as many of each class, or drawn
    sampler: Literal["ddim", "ddpm"] = ours("ddim")
    sample_steps: int = ours(100, ge=1)
    ddim_quirk: bool = ours(False)
    omega: float = ours(0.5, code=0.8, tables=(1.6,))  # w of (1 + w) eps(x, y) - w eps(x); code: CBDM's; 002's is the best of each model

    # The pairs.
    pcl_t: Literal["group", "batch", "reforward"] = ours("group", tables=("reforward",))
    """whose times are equal: of every few rows, of all; or a row's partners are noised to its time, batch size^2 forwards (Alg. 1; R1)"""
    pcl_group_size: int = ours(2, ge=2)  # rows that share a time with --pcl-t group; the times of groups are uniform (R1)
    pcl_noise: Literal["independent", "shared"] = paper("independent", tables=("shared",))  # in Alg. 1; in Eq. 12 a pair's is one (R2)

    # The term.
    pcl_form: Literal["exponential", "reciprocal", "hinge", "negative_l2"] = paper(
        "exponential", tables=("reciprocal", "negative_l2", "hinge")
    )
    """phi(d): exp(-d), 1 / (1 + d), max(0, margin - d), -d (R10)"""
    pcl_margin: float | None = ours(None, gt=0)  # of the form hinge, in units of the distance
    pcl_distance: Literal["mean", "sum", "kl"] = ours("mean", tables=("sum", "kl"))
    """d: |mu_i - mu_j|^2 as mean or sum over the pixels, or sum / 2 sigma_t^2; with sum, exp(-d) is 0 in float32 for images (R3, R4)"""
    pcl_space: Literal["mu", "x0", "eps"] = paper("mu")  # what is pushed apart: the denoised mean, the predicted image or noise (R5)
    pcl_tau0: float = ours(10.0, ge=0)  # tau(0): the term's gradient is some hundredths of the other's (R5)
    pcl_tau_schedule: Literal["const", "exp", "linear"] = paper("exp", tables=("const",))  # of tau(t), which decreases (R6)
    pcl_tau_temp: float = ours(0.3, gt=0)  # kappa of tau(t) = tau0 exp(-t / (kappa T)), the schedule exp (R6)
    pcl_stopgrad: Literal["none", "partner"] = ours("none")  # partner: a pair's gradient reaches its first row only (R9)
    pcl_reduce: Literal["mean", "sum"] = ours("mean", tables=("sum",))  # over the pairs (R8)
    pcl_ratio_every: int = ours(0, ge=0)
    """steps between measurements of |gradient of the term| / |gradient of the squared error|, a backward pass each; 0: none (R5)"""

    def __post_init__(self) -> None:
        if not self.conditional:
            raise ValueError("config: DiffROP compares classes, so it needs conditional; got --no-conditional")
        super().__post_init__()
        if (self.pcl_margin is None) == (self.pcl_form == "hinge"):
            fact = f"{self.pcl_margin} with {self.pcl_form}"
            raise ValueError(f"config: pcl_margin is required for pcl_form hinge and for no other; got {fact}")
        if self.pcl_distance == "kl" and self.pcl_space != "mu":
            raise ValueError(f"config: pcl_distance kl is between Gaussians around mu, so it needs pcl_space mu; got {self.pcl_space}")
        if self.pcl_t == "reforward" and self.batch_size > REFORWARD:
            expected = f"pcl_t reforward makes batch_size^2 forwards, so it needs batch_size <= {REFORWARD}"
            raise ValueError(f"config: {expected}; got {self.batch_size}")
        fields = type(self).__dataclass_fields__
        for names, place, unused in (
            (("cb_tau", "cb_sampling"), "base cbdm", self.base != "cbdm"),
            (("pcl_group_size",), "pcl_t group", self.pcl_t != "group"),
            (("pcl_tau_temp",), "pcl_tau_schedule exp", self.pcl_tau_schedule != "exp"),
        ):
            for name in names:
                if unused and getattr(self, name) != fields[name].default:
                    raise ValueError(f"config: {name} is about {place}; got {name}={getattr(self, name)} without it")


@dataclass(frozen=True)
class CCUAConfig(ImageConfig):
    """CCUA: contrastive conditional-unconditional alignment (Chen et al., 2025), which says "code" here.

    The defaults train well on digits within minutes; --batch-resample is the resampling that the paper adds.
    """

    omega: float = ours(0.5, code=1.5)  # w of (1 + w) eps(x, y) - w eps(x)
    ccua_alpha: float = code(1.0, ge=0)  # weight of InfoNCE between the images predicted without a label
    ccua_gamma: float = code(1.0, ge=0)  # weight of the distance between the outputs with and without a label
    ccua_temperature: float = code(0.1, gt=0)  # of InfoNCE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditional:
            raise ValueError("config: CCUA compares outputs with and without labels, so it needs conditional; got --no-conditional")


@dataclass(frozen=True)
class AnalyticConfig(ImageConfig):
    """The ideal denoiser of the training set, through the samplers of the networks. Nothing is trained: settings of training do nothing."""

    omega: float = ours(0.0)  # w of (1 + w) eps(x, y) - w eps(x)
    class_mix: float = ours(0.0, ge=0)  # how much an image of another class counts, where one of the class itself counts 1


@dataclass(frozen=True)
class DiffRCConfig(RunConfig):
    """DiffRC: long-tailed recognition with images that a diffusion model makes of the medium and tail classes (003), in five stages.

    The defaults train well on digits within minutes; --preset diffrc-paper is what the paper states, table1-* and table2-* are what we
    would run for its tables; where the paper is silent, both have our budget. C1 to C10 are the points where it is silent or wrong, see
    training/docs/diffrc.md.
    """

    dataset: str = ours("digits-train-lt", paper="cifar10-lt", tables=("cifar100-lt", "imagenet-lt"))
    """one with a test set: digits-train-lt, cifar10-lt, cifar100-lt, tiny-imagenet-lt, also without -lt, imagenet-lt, folder:PATH/train"""
    imbalance_ratio: float = ours(20.0, paper=100.0, tables=(50.0, 10.0), ge=1)
    """head : tail of the -lt data sets; --imb-factor .05 is --imbalance-ratio 20"""
    split_rule: Literal["tercile", "count"] = ours("tercile")  # which classes are many, med and few
    head_classes: int | None = ours(None, ge=1)  # H, the most frequent classes, which the source model learns; default: the many classes
    stages: str | None = runtime(None, once=True)
    """what to do now: 4, 4,5 or 1-3; what is there of them with other settings is made again. Default: all that is missing"""
    source: str | None = runtime(None, once=True)
    """run folder whose source model this run takes, and whatever else was made there with the same settings"""

    # Diffusion, of both models.
    timesteps: int = paper(1000, ge=1)  # T
    beta_start: float = paper(1e-4, gt=0, lt=1)
    beta_end: float = paper(0.02, gt=0, lt=1)
    network: Literal["auto", "unet", "mlp"] = ours("auto", paper="unet")  # auto: mlp for images up to 8x8, unet above
    width: int | None = ours(None, ge=2)  # default: 128 for unet, 256 for mlp
    dropout: float = ours(0.0, ge=0, lt=1)
    flip: Literal["auto", "yes", "no"] = ours("auto")  # every second image mirrored; auto: but not digits, which have a side
    batch_size: int = ours(64, ge=1)
    lr: float = ours(1e-3, gt=0)  # constant after the warm-up
    warmup: int = ours(100, ge=0)  # steps in which the learning rate rises
    ema_decay: float = ours(0.995, ge=0, lt=1)  # of the averaged weights, which the target model starts from and which are sampled
    clip: float = ours(1.0, gt=0)  # of the gradient's norm

    # Stage 1, the source model, and stage 2, the target model.
    source_steps: int = ours(2000, ge=1)
    target_steps: int = ours(1000, ge=1)
    group_size: int = ours(8, ge=1)  # images of one class in a batch of stage 2, as many as the class has (C3)
    group_classes: Literal["balanced", "sqrt", "none"] = ours("balanced")
    """how often a class has a group: as often as any other, by the square root of its size, by its size (C3)"""
    lam: float = paper(0.5, tables=(0.1, 0.3, 0.7, 0.9), ge=0)  # lambda of L_base + lambda L_pair; 0: without L_pair
    pair_gamma: float = paper(0.1, ge=0, lt=1)  # gamma of 1 / (1 + gamma^N_k), which is 1 for every class but the smallest (C1)
    pair_weight: Literal["paper", "effective", "none"] = paper("paper")  # that factor, 1 - gamma^N_k, or 1 (C1)
    pair_kl: Literal["tar_sou", "sou_tar"] = paper("tar_sou")  # KL(target, source), or the other way round (C2)
    pair_t: Literal["group", "sample"] = ours("group")  # one time for the images that are compared, or one each (C3)
    pair_reduce: Literal["mean", "sum"] = ours("mean", paper="sum")
    """of L_pair over the rows; L_base is a mean over the pixels, a sum in Eq. 3, so the sum of Eq. 9 is divided by their number (C3)"""

    # Stage 3, the encoder and its prototypes.
    encoder_steps: int = ours(1000, ge=1)
    encoder_lr: float = ours(1e-3, gt=0)  # falls to zero along a cosine
    encoder_dim: int = ours(64, ge=1)  # of f(x_t, t)
    proto_momentum: float = ours(0.99, paper=0.999, ge=0, lt=1)  # m: with .999 a tail class's prototype is as old as the training is short
    tau: float = paper(0.07, gt=0)  # temperature of L_PC
    pc_prior: Literal["train", "uniform"] = paper("train")  # pi of L_PC (C8)

    # Stage 4, images of the medium and tail classes.
    sample_steps: int = ours(100, paper=250, ge=1)
    s: float = ours(0.6, paper=0.2, tables=(0.4, 0.6, 0.8, 1.0), ge=0)  # strength of the guidance; 0: without L_PC
    guidance_sign: Literal["descend", "paper"] = ours("descend", paper="paper")  # of the gradient of L_PC; the printed + leads away (C5)
    grad_norm: Literal["rms", "l2", "none"] = ours("rms", paper="l2")  # length of the gradient: sqrt(D), 1, as it is (C7)
    clip_x0: bool = ours(True)  # predicted images stay in [-1, 1]
    fill: Literal["max", "ratio", "fixed"] = ours("max")  # images for class k: N_1 - N_k, --fill-ratio x N_k, --fill-count
    fill_ratio: float = ours(1.0, ge=0)
    fill_count: int = ours(100, ge=0)
    label_by: Literal["auto", "guidance", "classifier"] = ours("auto")
    """label of an image: the class it was led to, or what a balanced softmax on the real images says; auto: the latter if s is 0 (C9)"""
    filter_conf: float = ours(0.0, ge=0, lt=1)  # keep images whose label has this probability for that classifier; 0: keep all (C9)
    fill_tries: float = ours(4.0, ge=1)  # images drawn at most, over those that are to be kept
    sample_batch: int = ours(500, ge=1)  # images sampled at a time, from one stream of noise

    # Stage 5, the classifier.
    recipe: Literal["auto", "digits", "cifar", "imagenet-lt", "imagenet-lt-200"] = ours("auto")  # auto: by the data set
    classifier_steps: int | None = ours(None, ge=1)  # default: the recipe's
    classifier_loss: Literal["softmax", "balanced"] = paper("softmax")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_steps > self.timesteps:
            raise ValueError(f"config: sample_steps must be <= timesteps={self.timesteps}; got {self.sample_steps}")
        if self.beta_start > self.beta_end:
            raise ValueError(f"config: beta_start must be <= beta_end={self.beta_end}; got {self.beta_start}")
        if self.lam > 0 and self.group_size < 3:
            raise ValueError(f"config: group_size must be >= 3, or lam 0: L_pair compares an image with two others; got {self.group_size}")
        if self.s == 0 and self.label_by == "guidance":
            raise ValueError("config: label_by guidance needs s > 0: nothing leads an image to a class; got s=0")


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_fields(config: RunConfig) -> None:
    """Types, choices and limits as declared; tyro checks the first two for the command line, this does it for every caller."""
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if not _fits(value, hints[item.name]):
            raise TypeError(f"config: {item.name} must be {_spelled(hints[item.name])}; got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config: {item.name} must be finite; got {value!r}")
        for limit, (sign, holds) in _LIMITS.items():
            if value is not None and limit in item.metadata and not holds(value, item.metadata[limit]):
                raise ValueError(f"config: {item.name} must be {sign} {item.metadata[limit]}; got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _spelled(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return getattr(hint, "__name__", None) or str(hint)


def positive_number(name: str, text: str, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"config: {name} must be {expected}; got {text!r}")
    return value


# ---- config.json -----------------------------------------------------------------------------------------------------


def identity(config: RunConfig) -> dict[str, Any]:
    """The fields that make a run what it is."""
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(config) if "runtime" not in item.metadata}


def resolved(config: RunConfig, preset: RunConfig) -> dict[str, dict[str, Any]]:
    """Every field as {"value", "provenance"}: as declared; where the preset differs, whose value that is; `user` from the command line."""
    out = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        provenance = item.metadata["provenance"]
        if value != item.default:
            sources = [source for source in PROVENANCE if source in item.metadata and item.metadata[source] == value]
            sources += ["paper"] * (value in item.metadata.get("tables", ()))
            provenance = (sources or ["ours"])[0] if value == getattr(preset, item.name) else "user"
        out[item.name] = {"value": value, "provenance": provenance}
    return out


def read(path: Path, kind: type[RunConfig]) -> RunConfig:
    """The config of a run folder's config.json, but for --resume and --overwrite, which speak of one call only."""
    once = [item.name for item in dataclasses.fields(kind) if "once" in item.metadata]
    try:
        settings = json.loads(path.read_text())["settings"]
        values = {name: entry["value"] for name, entry in settings.items() if name not in once}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config: {path} is not the config.json of a run: {error!r}") from error
    return from_mapping(values, kind, where=str(path))


def from_mapping(values: Mapping[str, Any], kind: type[RunConfig], where: str = "settings") -> RunConfig:
    """A config from plain values; an unknown key is an error, a missing one takes its default."""
    known = [item.name for item in dataclasses.fields(kind)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"config: {where} may hold {', '.join(known)}; got the unknown key {', '.join(unknown)}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} (in {where})") from error


def run_folder(config: RunConfig, method: str) -> Path:
    """--out, or runs/<method>-<dataset>-<seed> with the data set's path reduced to its last part."""
    if config.out is not None:
        return Path(config.out)
    return Path("runs") / f"{method}-{short_name(config.dataset)}-{config.seed}"


def short_name(dataset: str) -> str:
    """The name of a data set as a part of a file's name."""
    kind, _, path = dataset.partition(":")
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{kind}-{Path(path).stem}" if path else kind)


def differences(config: RunConfig, other: RunConfig) -> list[str]:
    """`name: this != that` for every field of the runs' identities that differs."""
    mine, theirs = identity(config), identity(other)
    return [f"{name}: {mine[name]!r} != {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]


# ---- presets ---------------------------------------------------------------------------------------------------------


def as_in(source: Literal["paper", "code"], kind: type[RunConfig]) -> RunConfig:
    """The preset that takes every value from `source`, from the other one where `source` is silent, and ours where both are."""
    order = (source, "code" if source == "paper" else "paper")
    known = {item.name: [item.metadata[name] for name in order if name in item.metadata] for item in dataclasses.fields(kind)}
    return kind(**{name: values[0] for name, values in known.items() if values})


DGD_PRESETS = {
    "default": DGDConfig(),
    "short": DGDConfig(encoder_epochs=10, diffusion_epochs=40, joint_epochs=6, refresh_every=3, gen_every=12),
}
CLUDI_PRESETS = {
    "default": CLUDIConfig(),
    "short": CLUDIConfig(encoder_epochs=8, steps=60, restarts=2, eval_samples=4, baseline_steps=60),
    "cludi-paper": as_in("paper", CLUDIConfig),
    "cludi-code": as_in("code", CLUDIConfig),
}

DIFFRC_GPU = {  # what we would spend on the tables of 003, which names no budget
    "batch_size": 128, "lr": 2e-4, "warmup": 5000, "ema_decay": 0.9999, "dropout": 0.1, "source_steps": 200_000, "target_steps": 50_000,
    "encoder_steps": 50_000, "encoder_lr": 3e-4, "encoder_dim": 128, "proto_momentum": 0.999, "sample_steps": 250, "checkpoint_every": 5000,
}  # fmt: skip
SILENT_003 = [item.name for item in dataclasses.fields(DiffRCConfig) if item.name in DIFFRC_GPU and "paper" not in item.metadata]
DIFFRC_PRESETS = {
    "default": DiffRCConfig(),
    "short": DiffRCConfig(
        source_steps=300, target_steps=150, encoder_steps=200, warmup=30, ema_decay=0.97, sample_steps=20, classifier_steps=60
    ),
    "diffrc-paper": dataclasses.replace(as_in("paper", DiffRCConfig), **{name: DIFFRC_GPU[name] for name in SILENT_003}),
    **{
        f"table1-{name}-{ratio}": DiffRCConfig(dataset=f"{name}-lt", imbalance_ratio=float(ratio), **DIFFRC_GPU)
        for name in ("cifar10", "cifar100") for ratio in (100, 50, 10)
    },
    "table2-imagenet": DiffRCConfig(dataset="imagenet-lt", image_size=64, split_rule="count", **DIFFRC_GPU),
}  # fmt: skip

DATASETS_001 = {  # of Tables 2, 3, 7 of 001, with the number of generated images
    "table2-cifar10": {"dataset": "cifar10-lt"},
    "table2-cifar10-1000": {"dataset": "cifar10-lt", "imbalance_ratio": 1000.0},
    "table2-cifar100": {"dataset": "cifar100-lt"},
    "table3-tiny-imagenet": {"dataset": "tiny-imagenet-lt", "image_size": 64, "samples": 10_000},
    "table5-cifar10": {"dataset": "cifar10-lt", "class_order": TABLE5_ORDER},
    "table7-imagenet": {"dataset": "imagenet-lt", "image_size": 64, "samples": 20_000},
}
ROWS_001 = {  # of Table 1, and the plain models that Table 8 starts from, whose figures are those of rows A and G (D9)
    "ddpm": {
        "table1-a": {"conditional": False},
        "table1-b": {"conditional": False, "batch_resample": "balanced"},
        "table1-f": {},
        "table1-g": {"batch_resample": "balanced"},
        **{f"table8-plain-uncond-{n}k": {"conditional": False, "steps": n * 1000} for n in (100, 200, 300, 400)},
        **{f"table8-plain-cond-{n}k": {"batch_resample": "balanced", "steps": n * 1000} for n in (100, 200, 300, 400)},
    },
    "cbdm": {},
    "t2h": {
        "table1-c": {"conditional": False, "transfer_mode": "full"},
        "table1-d": {"conditional": False},
        "table1-e": {"conditional": False, "transfer_mode": "h2t"},
        "table1-h": {"transfer_mode": "h2t"},
        "table1-i": {"transfer_mode": "full"},
        "table1-j": {},
        "table8-uncond": {"conditional": False, "transfer_mode": "h2t", "finetune": RUN},
        "table8-cond": {"finetune": RUN},
    },
}
CIFAR_002 = {"cifar10": {"dataset": "cifar10-lt"}, "cifar100": {"dataset": "cifar100-lt"}}
FORMS_002 = {"negative-l2": "negative_l2", "exponential": "exponential", "reciprocal": "reciprocal"}
ROWS_002 = {  # of Tables 1 to 5; guidance is tuned for every model there, so w is that of CBDM's code. Table 3 has Table 1's samples
    "ddpm": {
        **{f"002-table1-{name}": {**data, "omega": 0.8} for name, data in CIFAR_002.items()},
        "002-table1-cifar100-diffaug": {"dataset": "cifar100-lt", "augment": "diffaug", "omega": 0.8},
        "002-table1-cifar100-rs": {"dataset": "cifar100-lt", "batch_resample": "balanced", "omega": 0.8},
        "002-table1-cifar100-sqrt-rs": {"dataset": "cifar100-lt", "batch_resample": "sqrt", "omega": 0.8},
        **{f"002-table2-{name}": {**data, "omega": 0.8, "samples": 10_000} for name, data in CIFAR_002.items()},
        "002-table4-reweighting": {"dataset": "cifar10-lt", "loss_weight": "inverse", "omega": 0.8},
    },
    "cbdm": {
        **{f"002-table1-{name}": {**data, "omega": 1.6} for name, data in CIFAR_002.items()},
        **{f"002-table2-{name}": {**data, "omega": 1.6, "samples": 10_000} for name, data in CIFAR_002.items()},
    },
    "diffrop": {
        **{
            f"{table}-{name}-{base}": {**data, **size, "base": base, "omega": omega}
            for table, size in (("table1", {}), ("table2", {"samples": 10_000}))
            for name, data in CIFAR_002.items()
            for base, omega in (("ddpm", 0.8), ("cbdm", 1.6))
        },
        **{
            f"table5-{name}-{word}": {**data, "pcl_form": form, "omega": 0.8}
            for name, data in CIFAR_002.items()
            for word, form in FORMS_002.items()
        },
        **{f"figure4-{name}-const": {**data, "pcl_tau_schedule": "const", "omega": 0.8} for name, data in CIFAR_002.items()},
        "algorithm1": {  # but for one update a batch; both terms are sums there, and L_DM is a mean over batch and pixels here (R8)
            "dataset": "cifar100-lt", "batch_size": REFORWARD, "omega": 0.8, "pcl_tau0": 10.0 / (REFORWARD * 3 * 32 * 32),
            "pcl_form": "reciprocal", "pcl_t": "reforward", "pcl_distance": "sum", "pcl_reduce": "sum",
        },  # fmt: skip
    },
}


def image_presets(method: str, kind: type[ImageConfig]) -> dict[str, ImageConfig]:
    """Of the tables: what the paper states, the released code where it is silent; batches and steps of OC_LT's README, the budget that
    can be checked. 300k holds the other reading, CBDM's budget (D8); code what the released code does."""
    stated, released = (dataclasses.replace(as_in(source, kind), checkpoint_every=5000) for source in ("paper", "code"))
    readme = dataclasses.replace(stated, batch_size=128, steps=200_000)
    rows = {name: dataclasses.replace(readme, **row) for name, row in {**ROWS_001[method], **DATASETS_001}.items()}
    return {**small_presets(kind), "300k": stated, "code": released, **rows}


def small_presets(kind: type[ImageConfig]) -> dict[str, ImageConfig]:
    return {"default": kind(), "short": kind(steps=800, warmup=50, ema_decay=0.98, samples=200, sample_steps=25)}


def presets_002(method: str, kind: type[ImageConfig]) -> dict[str, ImageConfig]:
    """What 002 states, CBDM's code where it is silent, and ours where Algorithm 1 is not feasible (R1, R3, R8). 002 names neither budget
    nor sampler: of ddpm and cbdm "paper" is 001 in these presets, too, and the values are those of diffrop's."""
    stated = dataclasses.replace(as_in("paper", kind), checkpoint_every=5000, ddim_quirk=False)
    return {name: dataclasses.replace(stated, **row) for name, row in ROWS_002[method].items()}


IMAGE_CONFIGS = {
    "ddpm": DDPMConfig, "cbdm": CBDMConfig, "t2h": T2HConfig, "diffrop": DiffROPConfig, "ccua": CCUAConfig, "analytic": AnalyticConfig,
}  # fmt: skip
IMAGE_PRESETS = {
    "ddpm": {**image_presets("ddpm", DDPMConfig), **presets_002("ddpm", DDPMConfig)},
    "cbdm": {**image_presets("cbdm", CBDMConfig), **presets_002("cbdm", CBDMConfig)},
    "t2h": image_presets("t2h", T2HConfig),
    "diffrop": {**small_presets(DiffROPConfig), **presets_002("diffrop", DiffROPConfig)},
    "ccua": small_presets(CCUAConfig),
    "analytic": {"default": AnalyticConfig(), "short": AnalyticConfig(samples=200, sample_steps=25)},
}
PRESETS: dict[str, dict[str, RunConfig]] = {"dgd": DGD_PRESETS, "cludi": CLUDI_PRESETS, **IMAGE_PRESETS, "diffrc": DIFFRC_PRESETS}
