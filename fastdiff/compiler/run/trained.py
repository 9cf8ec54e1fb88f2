"""The function that a fused convolution's node calls in a graph with gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.compiler.choose import gradients
from fastdiff.compiler.run.forms import Forms
from fastdiff.ops.conv2d_spec import ConvSpec
from fastdiff.ops.norm_conv2d import NormConv2d, norm_conv2d


class TrainedConvolution:
    """A convolution or a linear layer with prologue, epilogue and gradients.

    Its algorithms are chosen by the sizes alone: the same seed then trains the same weights in
    every process and after every interruption.

    Args:
        spec: what it computes.
        x_form: number of dimensions and channel dimension of its input.
        y_form: number of dimensions and channel dimension of its result and its residual.
        num_groups: groups of its norm; 0 for no norm.
        eps: of the norm.
        strict: whether it computes by direct arithmetic alone.

    Attributes:
        plans: for each size of the input so far, the names of the algorithms.
        last_weight: None: nothing stays packed, since a step of training changes every weight.
    """

    __name__ = "norm_conv2d"
    __qualname__ = "norm_conv2d"
    last_weight = None

    def __init__(
        self,
        spec: ConvSpec,
        x_form: tuple[int, int],
        y_form: tuple[int, int],
        *,
        num_groups: int,
        eps: float,
        strict: bool,
    ) -> None:
        self.spec, self.forms = spec, Forms(x_form, y_form)
        self.num_groups, self.eps, self.strict = num_groups, eps, strict
        self.plans: dict[tuple[Any, ...], str] = {}
        self._calls: dict[tuple[Any, ...], NormConv2d] = {}

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        residual: Tensor | None = None,
        scale: float = 1.0,
        **operands: Any,
    ) -> Any:
        """The result, or a pair of it and its statistics; operands as of ``norm_conv2d``."""
        x, residual, shape = self.forms.enter(x, residual)
        call = self._call(x, scale)
        y, of_y = norm_conv2d(call, x, weight, residual=residual, **operands)
        y = self.forms.leave(y, shape)
        return (y, of_y) if self.spec.statistics else y

    def _call(self, x: Tensor, scale: float) -> NormConv2d:
        key = (x.shape, x.dtype, scale)
        call = self._calls.get(key)
        if call is None:
            chosen = gradients.choose(self.spec, (x.shape[0], *x.shape[2:]), x.dtype, self.strict)
            call = NormConv2d(self.spec, self.num_groups, self.eps, scale, chosen)
            self._calls[key] = call
            self.plans[key[:2]] = f"{chosen.result}, {chosen.of_input}, {chosen.of_weight}"
        return call
