"""The Triton kernels, one file an operation, installed as ``fastdiff.kernels``.

Each file holds the kernels of an operation and its launcher, a function with the operation's name
and the arguments of its schema (``fastdiff/ops``). Nothing here is imported without need of it.
"""

if __name__ != "fastdiff.kernels":
    raise ImportError("these are fastdiff's kernels: install fastdiff and import fastdiff.kernels")
