"""Which operations there are, and what each family of them has, as the table in CONTRIBUTING.md.

``python -m tools.families`` prints the table, ``python -m tools.families --write`` puts it into
CONTRIBUTING.md. A family is a file of ``fastdiff/ops`` and its operations: variants of one
operation, as its gradient or the variant that computes noise from a seed. Everything that belongs
to a family is found under the family's name; what it has is read from the sources and from
PyTorch's registrations.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff import ops
from fastdiff.ops import gpu, reference

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"
BENCHMARKS_ON_GPU = "benchmarks/bench_gpu.py"


@dataclass(frozen=True)
class Family:
    """What there is of a family.

    Attributes:
        name: the stem of its files.
        operations: those that ``fastdiff/ops/<name>.py`` defines.
        reference: whether ``fastdiff.ops.reference`` has the operation of the family's name.
        cpu: operations that ``csrc/cpu/<name>.cpp`` registers.
        triton: operations whose launchers ``kernels/<name>.py`` has.
        cuda: operations that ``csrc/cuda/bindings/<name>.cpp`` registers.
        on_gpu: operations that Python registers for CUDA tensors as this family's.
        autograd: whether one of the operations has a gradient.
        tests: its test files for a CPU and for GPU kernels.
        benchmarks: its benchmark file, and the file with its benchmark for a GPU.
    """

    name: str
    operations: tuple[str, ...]
    reference: bool
    cpu: tuple[str, ...]
    triton: tuple[str, ...]
    cuda: tuple[str, ...]
    on_gpu: tuple[str, ...]
    autograd: bool
    tests: tuple[str, ...]
    benchmarks: tuple[str, ...]

    def missing(self) -> Iterator[str]:
        """What the family must have and has not."""
        if not self.reference:
            yield f"fastdiff/ops/reference.py has no function {self.name}"
        if not self.cpu and not self.on_gpu:
            yield "no kernel computes it, on a CPU or on a GPU"
        if self.cpu and set(self.cpu) != set(self.operations):
            yield f"csrc/cpu/{self.name}.cpp registers {self.cpu}, not {self.operations}"
        for place, found in (
            (f"kernels/{self.name}.py has", self.triton),
            (f"csrc/cuda/bindings/{self.name}.cpp registers", self.cuda),
        ):
            if set(found) != set(self.on_gpu):
                yield f"{place} {found}, not {self.on_gpu}"
        wanted = [f"tests/ops/test_{self.name}.py"]
        if self.on_gpu:
            wanted.append(f"tests/gpu/test_gpu_{self.name}.py")
        yield from (f"there is no {file}" for file in wanted if file not in self.tests)
        wanted = [f"benchmarks/bench_{self.name}.py"] if self.cpu else []
        wanted += [BENCHMARKS_ON_GPU] if self.on_gpu else []
        yield from (f"{file} does not time it" for file in wanted if file not in self.benchmarks)


def families(root: Path = ROOT) -> list[Family]:
    """Every family of the operations that ``fastdiff.ops`` offers."""
    found = []
    for file in sorted((root / "fastdiff" / "ops").glob("*.py")):
        name = file.stem
        operations = _matches(file, r'library\.define\(\s*"fastdiff::(\w+)"')
        if not set(operations) & set(ops.__all__):
            continue
        launchers = _names(root / "kernels" / f"{name}.py")
        gpu_benchmark = rf"^def bench_{name}\("
        found.append(
            Family(
                name=name,
                operations=operations,
                reference=hasattr(reference, name),
                cpu=_registered(root / "csrc" / "cpu" / f"{name}.cpp"),
                triton=tuple(one for one in operations if one in launchers),
                cuda=_registered(root / "csrc" / "cuda" / "bindings" / f"{name}.cpp"),
                on_gpu=tuple(one for one, of in gpu.operations.items() if of == name),
                autograd=any(
                    torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff::{one}", "Autograd")
                    for one in operations
                ),
                tests=_existing(root, f"tests/ops/test_{name}.py", f"tests/gpu/test_gpu_{name}.py"),
                benchmarks=(
                    *_existing(root, f"benchmarks/bench_{name}.py"),
                    *[BENCHMARKS_ON_GPU] * bool(_matches(root / BENCHMARKS_ON_GPU, gpu_benchmark)),
                ),
            )
        )
    return found


def problems(found: Iterable[Family], root: Path = ROOT) -> list[str]:
    """What families lack, and kernels and registrations that are not in a file of their family."""
    wrong = [f"{family.name}: {what}" for family in found for what in family.missing()]
    of = {one: family.name for family in found for one in family.operations}
    for folder in ("csrc/cpu", "csrc/cuda/bindings"):
        for file in sorted((root / folder).glob("*.cpp")):
            wrong += [
                f"{folder}/{file.name} registers {one}, which is of the family {of[one]}"
                for one in _registered(file)
                if of.get(one, file.stem) != file.stem
            ]
    for pattern in ("csrc/cpu/kernels/*.cpp", "csrc/cuda/*.cu"):
        wrong += [
            f"{file.relative_to(root)} is named after no family"
            for file in sorted(root.glob(pattern))
            if not any(
                file.stem == name or file.stem.startswith(f"{name}_") for name in of.values()
            )
        ]
    return wrong


def table(found: Iterable[Family]) -> str:
    """The families in Markdown: a row each, with what it has."""
    head = ("family", "variants", "reference", "CPU", "Triton", "CUDA", "autograd", "tests",
            "benchmarks")  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for family in found:
        variants = (one for one in family.operations if one != family.name)
        lines.append(
            (
                f"`{family.name}`",
                ", ".join(f"`{one.removeprefix(family.name)}`" for one in variants),
                _mark(family.reference),
                _mark(family.cpu),
                _mark(family.triton),
                _mark(family.cuda),
                _mark(family.autograd),
                ", ".join(file.split("/")[1] for file in family.tests),
                ", ".join("gpu" if "gpu" in file else "cpu" for file in family.benchmarks),
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def documented(root: Path = ROOT) -> str:
    """The table that stands in CONTRIBUTING.md."""
    return _parts(root)[1]


def write(root: Path = ROOT) -> None:
    """Put the table into CONTRIBUTING.md, in the place of the one that stands there."""
    before, _, after = _parts(root)
    text = f"{before}{BEGIN}{table(families(root))}{END}{after}"
    (root / "CONTRIBUTING.md").write_text(text, encoding="utf-8")


def _parts(root: Path) -> tuple[str, str, str]:
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    inside, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"CONTRIBUTING.md must have the lines {BEGIN.strip()} and {END.strip()}")
    return before, inside, after


def _mark(value: object) -> str:
    return "yes" if value else "-"


def _existing(root: Path, *files: str) -> tuple[str, ...]:
    return tuple(file for file in files if (root / file).is_file())


def _registered(file: Path) -> tuple[str, ...]:
    """The operations that a C++ source registers."""
    return _matches(file, r'm\.impl\(\s*"(\w+)"')


def _matches(file: Path, pattern: str) -> tuple[str, ...]:
    """What a pattern finds in a file, each once; nothing where there is no file."""
    if not file.is_file():
        return ()
    text = file.read_text(encoding="utf-8")
    return tuple(dict.fromkeys(re.findall(pattern, text, re.MULTILINE)))


def _names(file: Path) -> set[str]:
    """The functions that a Python source defines or imports; nothing where there is no file."""
    if not file.is_file():
        return set()
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in node.names)
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    elif sys.argv[1:]:
        sys.exit("usage: python -m tools.families [--write]")
    else:
        print(table(families()), end="")
