"""A U-Net's call through fastdiff's compiler backend and through every peer, in turns.

``python -m benchmarks.unet --help`` describes the options; ``make bench-unet``, ``make
bench-bf16`` and ``make scaling`` run it.

    models.py            the networks and their inputs, random but seeded
    prepared.py          a network that a peer has prepared
    peers.py             how each PyTorch peer prepares a network for its calls
    runtimes.py          how ONNX Runtime and OpenVINO prepare a network
    worker.py            what a peer's process prepares, checks and times
    run.py               in turns, sampling loops, and networks one at a time
    suites.py            sets of cases that one command measures
    scaling.py           time against batch, size and threads: the suite, its table and its picture
    sampling.py          whole sampling loops
    breakdown.py         the time of each part of a call
    breakdown_tables.py  a breakdown as tables
    report.py            the files of figures and tables
"""
