"""One file a method. What `python -m training <method>` runs is chosen by name in `__main__`, nowhere else."""

from .cludi import CLUDI
from .dgd import DensityGuidance

__all__ = ["CLUDI", "DensityGuidance"]
