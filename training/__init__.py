"""Training on top of ltkernels: data, networks, one loop, one file a method. `python -m training --help`."""

__all__ = ["class_counts", "long_tail_counts", "split_groups"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import data  # not before it is asked for: `cite` and `--help` need no torch

    return getattr(data, name)
