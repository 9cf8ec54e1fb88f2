"""Peers in turns, each in a process of its own: what every benchmark of whole networks shares.

    job.py      what is timed, and what a worker is asked to do
    worker.py   the program of the process in which one peer runs
    process.py  starting, asking and ending that process
    run.py      the order of preparing, checking and timing
    parts.py    where the time of a call goes
    report.py   the files of figures and tables
    options.py  the options of the command line

``benchmarks.unet`` times calls of a network with it, ``benchmarks.training`` training steps,
``benchmarks.pipelines`` whole calls of a diffusers pipeline.
"""
