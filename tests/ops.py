"""The ops with GPU kernels. A name added here is one that every layer without a GPU asks for: tests/simt/<op>.py with
host_entry_<op>.cpp (simt and ptx), tests/interp/test_interp_<op>.py, an entry in tests/aot/expected.py."""

OPS = ("knn_kde", "score_select", "pairwise_pcl")
