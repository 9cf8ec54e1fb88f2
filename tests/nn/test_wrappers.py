"""Networks under torch's wrappers, and the names of their parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastdiff.nn import UNet2DModel
from fastdiff.nn.wrappers import plain_name, plain_state, unwrapped

WRAPPERS = {
    "none": lambda model: model,
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "nested": lambda model: torch.compile(nn.DataParallel(torch.compile(model))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_network_and_its_names_come_back(wrap):
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    names = list(network.state_dict())
    wrapped = wrap(network)
    assert type(unwrapped(wrapped)) is nn.Sequential
    assert list(plain_state(wrapped)) == names


def test_what_is_no_wrapper_is_left_alone():
    def function(x):
        return x

    assert unwrapped(function) is function
    holder = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert unwrapped(holder) is holder
    assert plain_name("module.weight") == "module.weight"


def test_a_part_that_is_compiled_keeps_its_name(tiny_unet, tmp_path):
    model = tiny_unet()
    names = set(model.state_dict())
    model.mid_block.resnets[0] = torch.compile(model.mid_block.resnets[0])
    assert set(plain_state(model)) == names
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path).state_dict()
    assert set(loaded) == names
    assert torch.equal(loaded["conv_in.weight"], model.conv_in.weight)
