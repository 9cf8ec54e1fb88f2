"""What the command-line tests share: a tiny model's options, and a call in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastdiff import cli

TINY = (
    "--channels", "16,32", "--attention", "none", "--batch-size", "8", "--image-size", "8",
    "--warmup", "0", "--sample-every", "0", "--threads", "1",
)  # fmt: skip


@dataclass
class Ran:
    """A finished call of the command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one JSON value that it must be."""
        return json.loads(self.out)

    @property
    def last(self) -> str:
        """The last line of standard error."""
        return self.err.strip().splitlines()[-1]


def call(*words: object) -> int:
    """Run the command line in this process and return its exit code."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as exit:  # argparse's way out
        return int(exit.code or 0)
