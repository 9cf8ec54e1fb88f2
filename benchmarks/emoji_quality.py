"""The emoji model by guidance, sampler and precision, beside emoji that it never saw.

    python -m benchmarks.emoji_quality --out benchmarks/results

writes emoji_quality.json, prints the table, and renders it in the documentation. The figures are
those of ``fastdiff eval`` by its command, so that anybody can repeat each. All rows have the same
seed and number of images. ``make data/emoji`` writes the real images. Existing figures are kept;
delete the file to have them made anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import rows, tables
from benchmarks.evaluations import Figures

FEW_STEPS = "--steps 10 --grid logsnr --option sigma_max=80"
WAYS = {  # the rows of the table and their options
    "DDIM, 50 steps": "",
    "DDIM, 50 steps, guidance 2": "--guidance 2",
    "DDIM, 50 steps, guidance 4": "--guidance 4",
    "DDIM, 10 steps": f"--sampler ddim {FEW_STEPS}",
    "UniPC-2, 10 steps": f"--sampler unipc-2 {FEW_STEPS}",
    "UniPC-2, 10 steps, precision strict": f"--sampler unipc-2 {FEW_STEPS} --precision strict",
    "UniPC-2, 10 steps, precision bf16": f"--sampler unipc-2 {FEW_STEPS} --precision bf16",
    "DPM++ 2M, 10 steps": f"--sampler dpmpp-2m {FEW_STEPS}",
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True, help="folder of emoji_quality.json")
    options.add_argument("--checkpoint", default="emoji", help="a model of the emoji")
    options.add_argument("--data", type=Path, default=Path("data/emoji"), help="the real images")
    options.add_argument(
        "--images", type=int, default=740, help="generated emoji for each figure, at least 10"
    )
    options.add_argument("--only", nargs="+", choices=WAYS, metavar="NAME", help="these rows alone")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figures, lines = Figures(args.out / "emoji_quality.json"), []
    for name in args.only or WAYS:
        words = (
            f"--checkpoint {args.checkpoint} --against {args.data} "
            f"--held-out {args.data}-held-out --samples {args.images} {WAYS[name]}"
        )
        lines.append({"name": name, "command": figures.of(words)})
    figures.results["rows"] = lines
    figures.save()
    print(tables.markdown(rows.emoji_quality(figures.results)))
    tables.publish(args.out)


if __name__ == "__main__":
    main()
