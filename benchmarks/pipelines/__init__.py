"""Whole calls of a diffusers pipeline, accelerated by fastdiff and by every peer, in turns.

``python -m benchmarks.pipelines --help`` describes the options; ``make bench-pipelines`` runs it.

    pipes.py   what is called: a pipeline of Stable Diffusion's shape with random weights
    peers.py   how each peer accelerates it
    worker.py  what a peer's process prepares, checks and times
    report.py  the files of figures and tables
"""
