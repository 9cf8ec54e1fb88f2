"""A U-Net's call through fastdiff's compiler backend and through every peer, in turns.

``python -m benchmarks.unet --help`` says how; ``make bench-unet`` runs it.

    models.py     the networks and their inputs, random but seeded
    peers.py      how each peer prepares a network for its calls; runtimes.py for those beside torch
    worker.py     the process that one peer lives in
    process.py    that process as its owner sees it
    turns.py      the order of preparing, checking and timing
    sampling.py   whole sampling loops
    breakdown.py  where a call's milliseconds go
    machine.py    what runs here
    report.py     unet.json and unet.md; tables.py what is in them
"""
