"""The workshop: how the extensions are built, and what examines the GPU kernels without a GPU.

Imported from the repository's root alone; none of it is installed with fastdiff.
"""
