"""Several Python threads in one compiled model, several threads beneath it, and empty batches."""

from __future__ import annotations

import threading

import pytest
import torch
from judging import assert_as_eager, compiled
from models import inputs, make
from small import SmallNet, small_inputs, small_net

from fastdiff.compiler import explain

SIZES = [(1, (8, 12)), (3, (8, 12)), (2, (16, 8)), (2, (5, 7))]


def run_together(work, count=4):
    """work(0), ..., work(count - 1), each in a thread, all begun at once; errors are raised."""
    start, errors = threading.Barrier(count), []

    def run(index):
        start.wait()
        try:
            with torch.no_grad():
                work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_model_many_callers(dynamic):
    model = small_net()
    net = compiled(model, dynamic=dynamic)
    cases = [small_inputs(batch, size, seed) for seed, (batch, size) in enumerate(SIZES)]
    with torch.no_grad():
        alone = [net(*case) for case in cases]
    for found, case in zip(alone, cases, strict=True):
        assert_as_eager(found, model, case)

    def call_often(index):
        for turn in range(12):
            which = (index + turn) % len(cases)
            assert torch.equal(net(*cases[which]), alone[which])

    run_together(call_often)


def test_first_calls_at_once():
    """Weights are packed while others wait for them."""
    model = small_net()
    net, case, found = compiled(model), small_inputs(), {}
    run_together(lambda index: found.update({index: net(*case)}))
    assert len(found) == 4
    for out in found.values():
        assert_as_eager(out, model, case)


def test_calls_at_once_after_weights_changed():
    model = small_net()
    net, case = compiled(model), small_inputs()
    for seed in range(3):
        donor, found = small_net(seed=seed), {}
        for ours, theirs in zip(model.parameters(), donor.parameters(), strict=True):
            ours.data.copy_(theirs.data)
        run_together(lambda index, found=found: found.update({index: net(*case)}))
        for out in found.values():
            assert_as_eager(out, donor, case)


def test_two_models_at_once():
    models = [small_net(seed=seed) for seed in range(3)]
    nets, case, found = [compiled(model) for model in models], small_inputs(), {}

    def call_often(index):
        for _ in range(5):
            found[index] = nets[index](*case)

    run_together(call_often, 3)
    for index, model in enumerate(models):
        assert_as_eager(found[index], model, case)


def test_explanations_at_once():
    """Each tells of its own model."""
    models, found = [SmallNet(width=width).eval() for width in (16, 32, 48)], {}
    run_together(lambda index: found.update({index: explain(models[index], *small_inputs())}), 3)
    for index, model in enumerate(models):
        with torch.no_grad():
            assert found[index] == explain(model, *small_inputs())


@pytest.fixture
def _threads_put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads_put_back")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_thread_counts_agree(dtype):
    model, case = small_net().to(dtype), small_inputs(3, (20, 24), dtype=dtype)
    net, found = compiled(model), []
    for threads in (1, 2, 4, 1):
        torch.set_num_threads(threads)
        found.append(net(*case))
        assert_as_eager(found[-1], model, case)
    assert torch.equal(found[0], found[-1])


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_empty_batch(dynamic):
    model = small_net()
    net = compiled(model, dynamic=dynamic)
    for batch in (2, 0, 1):
        case = small_inputs(batch)
        assert_as_eager(net(*case), model, case)


@torch.no_grad()
def test_empty_batch_of_a_whole_model():
    model = make("plain-decoder")
    args, _ = inputs("plain-decoder", 0)
    assert_as_eager(compiled(model)(*args), model, args)
