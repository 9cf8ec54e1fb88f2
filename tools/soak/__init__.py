"""A soak of training: a run is interrupted again and again, and must end as if it had not been.

    python -m tools.soak --minutes 10 --kills 50 --ranks 2 --workers 1 [--seed 0] [--out FOLDER]

A small network is trained on a folder of images, first without interruption. Then the same run is
killed by kill -9 at random moments, and now and then ended by SIGTERM, deprived of space on its
disk, or disturbed by a second process on its folder, and continued each time, until it is done;
and again from its beginning, until there were enough interruptions.

After each interruption the newest checkpoint must be whole and not older than before, and
losses.jsonl must have each step up to it once, as in the run without interruption. At the end of a
run weights, averages, optimizer state and losses must be those of the run without interruption, bit
for bit.
"""
