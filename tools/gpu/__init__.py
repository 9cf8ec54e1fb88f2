"""Everything that needs a GPU, in one command and one report: ``python -m tools.gpu --help``.

For a machine that has its own PyTorch with CUDA and perhaps no network: nothing is installed.
"""
