"""Triton kernels, one file an op. Importing this package needs Triton but neither a GPU nor a C++ compiler."""
