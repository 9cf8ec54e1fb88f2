"""The coefficient table that represents a sampler.

One row is one evaluation of the model and the step that follows, which ``ops.sampler_step``
computes. With x the current images, m the model's output, v its variance channels if it has them,
z standard normal noise and history a few kept tensors, a row computes

    m  = m_u + guidance * (m_c - m_u)               with classifier-free guidance (arXiv:2207.12598)
    m *= 1 - rescale + rescale * std(m_c) / std(m)  with guidance (arXiv:2305.08891, eq. 15, 16)
    x0 = x0_x * x + x0_m * m
    x0 = clamp(x0, clip_min, clip_max)              if quantile is 0
    x0 = clamp(x0, -s, s) / s                       otherwise (arXiv:2205.11487, sec. 2.3), with
         s = clamp(that quantile of |x0| over the image, 1, clip_max)
    x' = out_x * x + out_x0 * x0 + out_m * m + sum_j h_j * history[j]
         + noise * exp((logvar + logvar_v * v) / 2) * z
    history[slot] = keep_x * x + keep_x0 * x0 + keep_m * m + keep_noise * z     if slot >= 0

The names in COLUMNS and h_j stand for the row's values. History is read before it is written, and a
slot with h_j = 0 is not read. The table is float64; its copy on the device is rounded once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.common.per_device import PerDevice
from fastdiff.ops.sampler_step import COLUMNS as COLUMNS
from fastdiff.ops.sampler_step import MAX_HISTORY as MAX_HISTORY

FORMAT = "fastdiff sampler table"


class OnDevice(NamedTuple):
    """A table's tensors on a device, for a sampling loop.

    Attributes:
        values: the coefficients [R, len(COLUMNS) + K], float32 or float64.
        timesteps: the model's times [R], int64 if all are whole numbers, else of the values' dtype.
        numbers: the row numbers 0..R-1, each an int64 tensor of one element.
    """

    values: Tensor
    timesteps: Tensor
    numbers: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Table:
    """A sampler as data: everything that a sampling loop needs to know.

    Attributes:
        name: the sampler's name.
        values: coefficients, float64 [R, len(COLUMNS) + K], K the history's depth.
        timesteps: the model's time in each row, float64 [R].
        steps: the step that each row belongs to, int64 [R], from 0, increasing by 0 or 1.
        levels: (alpha, sigma) of x = alpha x0 + sigma eps before each row and after the last,
            float64 [R + 1, 2].
        learned_variance: the model's output has twice the channels, the second half v.

    Raises:
        ValueError: the shapes do not fit, or a slot lies outside the history.
    """

    name: str
    values: Tensor
    timesteps: Tensor
    steps: Tensor
    levels: Tensor
    learned_variance: bool = False

    def __post_init__(self) -> None:
        rows, width = self.values.shape if self.values.ndim == 2 else (0, 0)
        depth = width - len(COLUMNS)
        if rows == 0 or not 0 <= depth <= MAX_HISTORY:
            raise ValueError(
                f"values must have shape [R, {len(COLUMNS)} + K] with R >= 1 and K in "
                f"0..{MAX_HISTORY}, got {tuple(self.values.shape)}"
            )
        shapes = {"timesteps": (rows,), "steps": (rows,), "levels": (rows + 1, 2)}
        for name, shape in shapes.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise ValueError(f"{name} must have shape {shape} for {rows} rows, got {got}")
        slots = self.column("slot")
        if not bool(((slots >= -1) & (slots < depth) & (slots == slots.round())).all()):
            raise ValueError(f"slot must be a whole number from -1 to {depth - 1} in every row")
        rises = self.steps.diff()
        if self.steps[0] != 0 or not bool(((rises == 0) | (rises == 1)).all()):
            raise ValueError("steps must begin at 0 and rise by 1 or not at all")

    @property
    def rows(self) -> int:
        """R, the number of rows, which is also the number of model evaluations."""
        return self.values.shape[0]

    @cached_property
    def evaluations(self) -> tuple[int, ...]:
        """The number of model evaluations in each step."""
        return tuple(torch.bincount(self.steps).tolist())

    @cached_property
    def num_steps(self) -> int:
        """S, the number of steps."""
        return int(self.steps[-1]) + 1

    @property
    def depth(self) -> int:
        """K, the number of tensors in the history."""
        return self.values.shape[1] - len(COLUMNS)

    @cached_property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial x, for images of standard deviation 1."""
        alpha, sigma = self.levels[0].tolist()
        return round((alpha**2 + sigma**2) ** 0.5, 12)  # 1, not 1 - 1e-16, where alpha^2 = 1 - s^2

    @cached_property
    def noisy(self) -> list[bool]:
        """For each row, whether it uses noise."""
        return ((self.column("noise") != 0) | (self.column("keep_noise") != 0)).tolist()

    @cached_property
    def ends_step(self) -> list[bool]:
        """For each row, whether it is the last of its step."""
        steps = self.steps.tolist()
        return [step != after for step, after in zip(steps, [*steps[1:], None], strict=True)]

    def on(self, device: torch.device, dtype: torch.dtype) -> OnDevice:
        """The table's tensors on a device, cached.

        Args:
            device: where the loop runs.
            dtype: float32 or float64.
        """
        key = (device, dtype)
        if key not in self._copies:
            whole = bool((self.timesteps == self.timesteps.round()).all())
            self._copies[key] = OnDevice(
                values=self.values.to(device, dtype, copy=True),
                timesteps=self.timesteps.to(device, torch.int64 if whole else dtype),
                numbers=torch.arange(self.rows, device=device).unbind(),
            )
        return self._copies[key]

    @cached_property
    def _copies(self) -> PerDevice[tuple[torch.device, torch.dtype], OnDevice]:
        return PerDevice()

    @property
    def needs_noise(self) -> bool:
        """Whether any row uses noise."""
        return any(self.noisy)

    def column(self, name: str) -> Tensor:
        """The column called ``name`` in COLUMNS, float64 [R]."""
        return self.values[:, COLUMNS.index(name)]

    def __str__(self) -> str:
        names = _names(self.depth)
        used = [j for j, name in enumerate(names) if not self._is_idle(name, self.values[:, j])]
        head = f"{'step':>4} {'t':>9} " + " ".join(f"{names[j]:>11}" for j in used)
        lines = [
            f"{self.name}: {self.num_steps} steps, {self.rows} evaluations, "
            f"history of {self.depth}",
            head,
        ]
        for step, t, row in zip(
            self.steps.tolist(), self.timesteps.tolist(), self.values.tolist(), strict=True
        ):
            lines.append(f"{step:>4} {t:>9.6g} " + " ".join(f"{row[j]:>11.5g}" for j in used))
        return "\n".join(lines)

    @staticmethod
    def _is_idle(name: str, column: Tensor) -> bool:
        """Whether a column has no effect in any row, so that it need not be printed."""
        idle = {"guidance": 1.0, "clip_min": -math.inf, "clip_max": math.inf, "slot": -1.0}
        return bool((column == idle.get(name, 0.0)).all())

    def to_json(self) -> str:
        """The table as JSON; infinities are the strings "inf" and "-inf"."""
        fields = {
            "format": FORMAT,
            "name": self.name,
            "learned_variance": self.learned_variance,
            "columns": _names(self.depth),
            "steps": self.steps.tolist(),
            "timesteps": self.timesteps.tolist(),
            "levels": self.levels.tolist(),
            "values": [[_encode(value) for value in row] for row in self.values.tolist()],
        }
        return json.dumps(fields, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Read the text of :meth:`to_json`.

        Raises:
            ValueError: not JSON, not a sampler table, or a table with other columns.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f'this is not a sampler table: wanted "format": "{FORMAT}"')
        try:
            depth = len(fields["columns"]) - len(COLUMNS)
            if fields["columns"] != _names(depth):
                raise ValueError(
                    f"columns must be {', '.join(COLUMNS)}, h_0, ..., got {fields['columns']}"
                )
            return cls(
                name=str(fields["name"]),
                values=_tensor([[float(value) for value in row] for row in fields["values"]]),
                timesteps=_tensor(fields["timesteps"]),
                steps=torch.tensor(fields["steps"], dtype=torch.int64, device="cpu"),
                levels=_tensor(fields["levels"]),
                learned_variance=bool(fields["learned_variance"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the sampler table is damaged: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the table to a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read a file of :meth:`save`; raises the errors of :meth:`from_json`, and OSError."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _names(depth: int) -> list[str]:
    """The names of all columns of a table with ``depth`` history tensors."""
    return [*COLUMNS, *(f"h_{j}" for j in range(depth))]


def _encode(value: float) -> Any:
    return value if math.isfinite(value) else str(value)


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
