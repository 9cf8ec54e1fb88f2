"""Checks the GPU kernels without a GPU: ``python -m tools.audit --help``.

Compiles every kernel for the architectures that matter, reads the machine code, and counts the
bytes that the kernels move.
"""
