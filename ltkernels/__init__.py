"""ltkernels: density and score kernels for learning on long-tailed data with diffusion models."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ._library import build_info
from .backends import backend
from .bank import Bank
from .knn_kde import KDE, Neighbors, knn, knn_bandwidth, knn_kde_grad
from .pairwise_pcl import pairwise_sqdist, pcl_loss
from .score_select import ScoreSelection, denoising_target, p_sel, posterior_mean, score_select

try:
    __version__ = version("ltkernels")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+checkout"

_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "csrc").is_dir():
    __path__.append(str(_checkout))  # ltkernels.training lies beside ltkernels/ there, in it once installed

__all__ = [
    "KDE", "Bank", "Neighbors", "ScoreSelection", "backend", "build_info", "denoising_target", "knn", "knn_bandwidth", "knn_kde_grad",
    "p_sel", "pairwise_sqdist", "pcl_loss", "posterior_mean", "score_select",
]  # fmt: skip
