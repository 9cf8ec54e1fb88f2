"""Precision and recall, density and coverage: what two sets of features cover of each other."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3  # of precision and recall, as in their paper and in torch-fidelity
DENSITY_NEIGHBOURS = 5  # of density and coverage, as in their paper
_ENTRIES = 2**24  # of a matrix of distances that is held at once


class Manifold:
    """A set of features with a ball around each, which reaches to its k-th nearest neighbour.

    The balls together estimate where the images of the set lie (Kynkaanniemi et al. 2019,
    arXiv:1904.06991, equation 1). Memory grows with the number of features, not with its square.

    Args:
        features: [N, D], N at least 6: more than ``DENSITY_NEIGHBOURS``.
    """

    def __init__(self, features: np.ndarray) -> None:
        if features.ndim != 2 or len(features) <= DENSITY_NEIGHBOURS:
            raise ValueError(
                f"features must be [N, D] with N > {DENSITY_NEIGHBOURS}, got {features.shape}"
            )
        self.points = torch.from_numpy(features)

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def radii(self) -> Tensor:
        """Distance of each point to its third and to its fifth nearest neighbour, [N, 2]."""
        nearest = [
            # The nearest point of all is the point itself.
            torch.cdist(part, self.points).topk(DENSITY_NEIGHBOURS + 1, largest=False).values
            for part in self.points.split(_rows(len(self)))
        ]
        return torch.cat(nearest)[:, [NEIGHBOURS, DENSITY_NEIGHBOURS]]

    def coverage_of(self, generated: Manifold) -> dict[str, float]:
        """How a generated set covers this set of real features, and this set covers it.

        Returns:
            ``precision``: share of the generated in a ball (k = 3) of a real feature.
            ``recall``: share of the real in a ball (k = 3) of a generated feature. Both are
            equation 2 of Kynkaanniemi et al. 2019, arXiv:1904.06991.
            ``density``: balls (k = 5) of real features that a generated feature lies in, on
            average, divided by k.
            ``coverage``: share of the real whose ball (k = 5) holds a generated feature. Both are
            equations 4 and 5 of Naeem et al. 2020, arXiv:2002.09797.
        """
        small, large = self.radii.unbind(1)
        precise, dense = 0, 0
        recalled = torch.zeros(len(self), dtype=torch.bool, device="cpu")
        covered = torch.zeros_like(recalled)
        rows = _rows(len(self))
        for part, reach in zip(
            generated.points.split(rows), generated.radii[:, 0].split(rows), strict=True
        ):
            distances = torch.cdist(part, self.points)  # [generated, real]
            precise += int((distances <= small).any(1).sum())
            recalled |= (distances <= reach[:, None]).any(0)
            inside = distances < large
            dense += int(inside.sum())
            covered |= inside.any(0)
        return {
            "precision": precise / len(generated),
            "recall": float(recalled.double().mean()),
            "density": dense / (len(generated) * DENSITY_NEIGHBOURS),
            "coverage": float(covered.double().mean()),
        }


def _rows(columns: int) -> int:
    return max(1, _ENTRIES // columns)
