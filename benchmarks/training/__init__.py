"""Whole training steps through fastdiff and through every peer, in turns.

``python -m benchmarks.training --help`` describes the options; ``make bench-train`` runs it.

    tasks.py      what is trained: network, images, prediction
    step.py       a training step, in plain PyTorch and through ``fastdiff.training``
    peers.py      how each peer takes the step
    gradients.py  how far gradients are from those of float64
    worker.py     what a peer's process prepares, checks and times
    run.py        the order of a run
    breakdown.py  the parts of a step
    report.py     the files of figures and tables
"""
