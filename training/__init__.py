"""Training on top of ltkernels: data, networks, one loop, one file a method. `python -m training --help`."""
