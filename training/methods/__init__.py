"""One file a method. What `python -m training <method>` runs is chosen by name in `__main__`, nowhere else."""

from .cbdm import CBDM
from .ccua import CCUA
from .cludi import CLUDI
from .ddpm import DDPM
from .dgd import DensityGuidance
from .diffrc import DiffRC
from .diffrop import DiffROP
from .t2h import T2H

__all__ = ["CBDM", "CCUA", "CLUDI", "DDPM", "DensityGuidance", "DiffRC", "DiffROP", "T2H"]
