"""The ops with GPU kernels. A name added here is one that every layer without a GPU asks for: csrc/<op>/<op>_cuda.cu (tests/aot),
tests/simt/<op>.py with host_entry_<op>.cpp (tests/simt and tests/ptx), tests/interp/test_interp_<op>.py, tests/aot/test_aot_<op>.py."""

OPS = ("knn_kde",)
