"""Tables that a scheduler keeps for as long as the tensors they were made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class KeptTables:
    """A mixin of schedulers whose coefficients are made once for a schedule."""

    # Whether coefficients are made as diffusers makes them, in the dtype of the images.
    strict_compat: bool = True

    def _kept(
        self, name: tuple[Any, ...], sources: tuple[Tensor, ...], make: Callable[[], Any]
    ) -> Any:
        """``make()``, made again when a source is another tensor or was written to."""
        tables: dict[Any, Any] = self.__dict__.setdefault("_noise_tables", {})
        kept = tables.get(name)
        if kept is not None:
            for source, known, then in zip(sources, *kept[:2], strict=True):
                if source is not known or version(source) != then:
                    break
            else:
                return kept[2]
        value = make()
        tables[name] = sources, [version(source) for source in sources], value
        return value


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None for an inference tensor, which does not count it."""
    return None if tensor.is_inference() else tensor._version
