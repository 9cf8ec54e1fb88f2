"""diffusers' own tests, run with fastdiff's classes in the place of diffusers'.

    python -m tools.diffusers_tests CHECKOUT [--stock] [pytest's arguments]

CHECKOUT is a checkout of diffusers' repository, best of the version that is installed: the tests
are its own, the package under test is the installed one. Before a test is imported, the classes of
``fastdiff.diffusers`` are set on the module ``diffusers`` and wherever in it a class of the same
name is known. Tests that fail are run again with diffusers' own classes, in a process of their own,
which tells what fails without fastdiff too (for lack of a network, of a package, of a GPU).

By default these are the tests of the schedulers, of the U-Nets, and of the pipelines that
``fastdiff.accelerate`` is made for, without those marked slow. Paths among pytest's arguments
replace them. Exit status: 0 if nothing fails that passes with diffusers' own classes, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

TESTS = (
    "tests/schedulers",
    "tests/models/unets/test_models_unet_2d.py",
    "tests/models/unets/test_models_unet_2d_condition.py",
    "tests/pipelines/ddpm/test_ddpm.py",
    "tests/pipelines/ddim/test_ddim.py",
    "tests/pipelines/score_sde_ve/test_score_sde_ve.py",
    "tests/pipelines/stable_diffusion/test_stable_diffusion.py",
    "tests/pipelines/stable_diffusion/test_stable_diffusion_img2img.py",
    "tests/pipelines/stable_diffusion/test_stable_diffusion_inpaint.py",
    "tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py",
    "tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl_img2img.py",
    "tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl_inpaint.py",
    "tests/pipelines/controlnet/test_controlnet.py",
    "tests/pipelines/controlnet/test_controlnet_sdxl.py",
)
ROOT = Path(__file__).resolve().parents[1]


class Outcomes:
    """A plugin of pytest that notes how each test ended.

    Attributes:
        ended: passed, skipped or failed, by the test's identifier. What could not be imported has
            failed.
    """

    def __init__(self) -> None:
        self.ended: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a phase of a test; a failure of any phase stays."""
        if self.ended.get(report.nodeid) != "failed" and (
            report.when == "call" or report.outcome != "passed"
        ):
            self.ended[report.nodeid] = report.outcome

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note what could not be imported."""
        if report.failed:
            self.ended[report.nodeid] = "failed"


def substitute() -> list[str]:
    """Put fastdiff's classes wherever diffusers knows a class of the same name; their names."""
    import diffusers

    import fastdiff.diffusers as ours

    names = [name for name in ours.__all__ if isinstance(getattr(diffusers, name, None), type)]
    # Loads diffusers' modules too, so that none binds an original class later.
    replaced = {getattr(diffusers, name): getattr(ours, name) for name in names}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "diffusers":
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value in replaced:
                    setattr(module, name, replaced[value])
    return names


def run(checkout: Path, arguments: list[str], *, stock: bool) -> dict[str, str]:
    """Run the tests in this process; how each ended, by its identifier."""
    os.chdir(checkout)
    if stock:
        import diffusers

        print(f"diffusers' own classes, diffusers {diffusers.__version__}")
    else:
        print(f"fastdiff's classes: {', '.join(substitute())}")
    outcomes = Outcomes()
    options = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest.main([*options, "--rootdir", str(checkout), *arguments], [outcomes])
    return outcomes.ended


def again_with_stock(checkout: Path, tests: list[str], options: list[str]) -> dict[str, str]:
    """Run the tests with diffusers' own classes in another process; how each ended."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, "-m", "tools.diffusers_tests", str(checkout), "--stock"]
        subprocess.run(
            [*command, "--results", file.name, *options, *tests],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        ended: dict[str, str] = json.loads(file.read() or "{}")
    return ended


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers' repository")
    parser.add_argument("--stock", action="store_true", help="diffusers' own classes alone")
    parser.add_argument("--results", type=Path, help="also write how each test ended, as JSON")
    args, rest = parser.parse_known_args()
    checkout = args.checkout.resolve()
    if not (checkout / "tests" / "schedulers").is_dir():
        parser.error(f"{checkout} has no tests/schedulers: wanted a checkout of diffusers")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # fail at once, do not wait for a network

    paths = [
        a for a in rest if not a.startswith("-") and (checkout / a.partition("::")[0]).exists()
    ]
    options = [a for a in rest if a not in paths]
    paths = paths or [test for test in TESTS if (checkout / test).exists()]
    ended = run(checkout, [*options, *paths], stock=args.stock)
    if args.results:
        args.results.write_text(json.dumps(ended), encoding="utf-8")
    counts = {how: list(ended.values()).count(how) for how in ("passed", "failed", "skipped")}
    print("\n" + ", ".join(f"{number} {how}" for how, number in counts.items()))
    failed = [test for test, how in ended.items() if how == "failed"]
    if args.stock or not failed:
        return 1 if failed else 0
    stock = again_with_stock(checkout, failed, options)
    ours = [test for test in failed if stock.get(test) != "failed"]
    _list("failed with diffusers' own classes too", [test for test in failed if test not in ours])
    _list("failed with fastdiff's classes alone", ours)
    return 1 if ours else 0


def _list(title: str, tests: list[Any]) -> None:
    print(f"\n{len(tests)} {title}", *(f"  {test}" for test in tests), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
