"""The self-check passes on every backend, and notices an operation that is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import selfcheck
from fastdiff.ops.backend import backend, current, extension

BACKENDS = ("reference",) if extension is None else ("reference", "cpu")


def failed(records: list[selfcheck.Record]) -> set[str]:
    return {record.operation for record in records if not record.ok}


@pytest.mark.parametrize("name", BACKENDS)
def test_every_operation_passes_on(name: str) -> None:
    with backend(name):
        records = selfcheck.run()
    assert failed(records) == set()
    assert {record.backend for record in records} == {name}
    assert all(0 <= record.max_error <= record.tolerance for record in records)
    assert all(record.microseconds > 0 for record in records)
    kinds = {(record.operation, record.layout, record.dtype) for record in records}
    assert len(kinds) == len(records) == 4 * len(selfcheck.CASES)
    assert {kind[1:] for kind in kinds} == {
        ("NCHW", "float32"), ("NCHW", "bfloat16"), ("NHWC", "float32"), ("NHWC", "bfloat16"),
    }  # fmt: skip


def test_no_operation_is_left_out() -> None:
    helpers = {"check_timesteps", "conv2d_pack", "new_history", "sampler_step_for"}
    operations = set(ops.__all__) - helpers
    gradients = {f"{name}_backward" for name in ("attention", "geglu", "group_norm_silu")}
    assert set(selfcheck.CASES) == operations | gradients


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "off by a little": lambda y: y + 1e-2 * y.detach().abs().max() * (y.dtype == torch.float32),
    "not finite": lambda y: y * (torch.nan if y.dtype == torch.bfloat16 else 1),
    "of another shape": lambda y: y if y.dtype == torch.float64 else y[:1],
}


@pytest.mark.parametrize("wrong", list(WRONG.values()), ids=list(WRONG))
@pytest.mark.parametrize(
    "name", ["group_norm_silu", "add_time_embedding", "q_sample", "philox_normal", "sampler_step"]
)
def test_notices_a_value(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[[Tensor], Tensor]
) -> None:
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **options: wrong(right(*args, **options)))
    assert name in failed(selfcheck.run())


@pytest.mark.parametrize("name", ["denoising_loss", "denoising_loss_from_seed"])
def test_notices_a_wrong_loss(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(ops, name)
    monkeypatch.setattr(
        ops, name, lambda x, *args: right(x, *args) * (1 + 0.01 * (x.dtype == torch.float32))
    )
    assert failed(selfcheck.run()) == {name}


@pytest.mark.parametrize("leaf", selfcheck.DIFFERENTIATED)
def test_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, leaf: str) -> None:
    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return grad * (1 if grad.dtype == torch.float64 else 1.2)

    forward = selfcheck._group_norm_silu
    monkeypatch.setattr(
        selfcheck, "_group_norm_silu", lambda v: forward({**v, leaf: Skewed.apply(v[leaf])})
    )
    assert failed(selfcheck.run()) == {"group_norm_silu_backward"}


def test_reports_what_an_operation_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.q_sample

    def raises(x0: Tensor, *args: Tensor) -> Tensor:
        if x0.dtype == torch.bfloat16:
            raise RuntimeError("no such kernel")
        return right(x0, *args)

    monkeypatch.setattr(ops, "q_sample", raises)
    records = selfcheck.run()
    assert failed(records) == {"q_sample"}
    bad = [record for record in records if not record.ok]
    assert [record.dtype for record in bad] == ["bfloat16", "bfloat16"]
    assert bad[0].reason == "RuntimeError: no such kernel"
    assert bad[0].max_error is bad[0].microseconds is None


def test_leaves_the_backend_as_it_was() -> None:
    selfcheck.run()
    assert current() == "auto"
