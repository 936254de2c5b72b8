"""Training on top of ltkernels: data, networks, one loop, one file a method. `python -m training --help`."""

from .data import class_counts, long_tail_counts, split_groups

__all__ = ["class_counts", "long_tail_counts", "split_groups"]
