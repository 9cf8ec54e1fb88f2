"""Drawn U-Nets, compiled, against themselves."""

from __future__ import annotations

import copy

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from judging import LAYOUTS, assert_as_eager, compiled, settled
from random_unet import DRAWS, EMB, build, nets


@pytest.mark.slow
@hypothesis.given(
    spec=nets(),
    batch=st.integers(1, 3),
    size=st.sampled_from([(4, 4), (5, 7), (8, 6), (12, 16), (9, 8)]),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    precision=st.sampled_from(["fast", "strict"]),
    dynamic=st.sampled_from([None, None, None, True]),
)
@DRAWS
@torch.no_grad()
def test_drawn_nets(spec, batch, size, layout, dtype, precision, dynamic):
    torch.compiler.reset()
    model = build(spec).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, *size, generator=generator).to(dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    emb = torch.randn(batch, EMB, generator=generator).to(dtype)
    given = copy.deepcopy((x, emb))
    try:
        model(x, emb)
    except ValueError:  # a norm of one value
        hypothesis.reject()
    net = compiled(model, options={"precision": precision}, dynamic=dynamic)
    found = settled(net, given)
    assert_as_eager(found, model, (x, emb), precision=precision)
    assert torch.equal(given[0], x)
    assert torch.equal(given[1], emb)
