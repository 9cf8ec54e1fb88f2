"""A U-Net's call through fastdiff's compiler backend and through every peer, in turns.

``python -m benchmarks.unet --help`` describes the options; ``make bench-unet`` runs it.

    models.py            the networks and their inputs, random but seeded
    peers.py             how each PyTorch peer prepares a network for its calls
    runtimes.py          how ONNX Runtime and OpenVINO prepare a network
    worker.py            the program of the process in which one peer runs
    process.py           starting, asking and ending that process
    turns.py             the order of preparing, checking and timing
    sampling.py          whole sampling loops
    breakdown.py         the time of each part of a call
    breakdown_tables.py  a breakdown as tables
    report.py            unet.json and unet.md
"""
