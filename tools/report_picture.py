"""A picture of the upper part of a run's report, for the documentation, by headless Chromium.

python -m tools.report_picture runs/digits docs/images/report.png
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from fastdiff.training.run_report import write

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 834


def photograph(page: Path, target: Path) -> None:
    """Write a picture of the upper part of an HTML page as PNG."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"this needs one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        shot = Path(profile) / "shot.png"
        words = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}",
            "--virtual-time-budget=2000", f"--screenshot={shot}", page.absolute().as_uri(),
        ]  # fmt: skip
        subprocess.run(words, check=True, capture_output=True, timeout=300)
        picture = Image.open(shot).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    """Write the report of a run, and its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("target", type=Path, help="the picture, PNG")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write([args.run], page)
        photograph(page, args.target)


if __name__ == "__main__":
    main()
