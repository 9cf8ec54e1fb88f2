"""Compile a U-Net with fastdiff's backend; compare its output and its time with plain PyTorch.

python examples/compile_unet.py --channels 64 --size 32 --batch 2 --explain
"""

import argparse
import time
from collections.abc import Callable

import torch

import fastdiff
from fastdiff.training import make_unet


def fastest(call: Callable[[], object], calls: int) -> float:
    """Milliseconds of the fastest of some calls."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--channels", type=int, default=32, help="a multiple of 32")
    options.add_argument("--size", type=int, default=32, help="height and width of the images")
    options.add_argument("--batch", type=int, default=2, help="images")
    options.add_argument(
        "--calls", type=int, default=10, help="of each, of which the fastest counts"
    )
    options.add_argument("--explain", action="store_true", help="say what became of each layer")
    args = options.parse_args()

    torch.manual_seed(0)
    widths = (args.channels, 2 * args.channels)
    unet = make_unet(args.size, 3, widths=widths, attention=(1,)).eval()
    compiled = torch.compile(unet, backend="fastdiff")
    x = torch.randn(args.batch, 3, args.size, args.size)
    t = torch.randint(1000, (args.batch,))
    with torch.no_grad(), fastdiff.backend("reference"):
        expected = unet(x, t)
        plain = fastest(lambda: unet(x, t), args.calls)
    with torch.no_grad():
        for _ in range(3):  # compiles, measures algorithms, records the sequence of operations
            result = compiled(x, t)
        ours = fastest(lambda: compiled(x, t), args.calls)

    explanation = str(fastdiff.compiler.explain(unet, x, t))
    print(explanation if args.explain else explanation.splitlines()[-1].strip())
    error = (result - expected).abs().max() / expected.abs().max()
    print(f"largest difference {error:.1e} of the largest output")
    print(f"plain PyTorch {plain:.1f} ms, compiled {ours:.1f} ms, ratio {plain / ours:.2f}")


if __name__ == "__main__":
    main()
