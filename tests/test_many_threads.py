"""Several threads at once, with a model each or one for all: as if each were alone."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import fastdiff
from fastdiff import losses, samplers, schedules


@pytest.fixture(autouse=True)
def _switch_often(one_thread):
    """Threads take turns after 10 us, not 5 ms, and leave PyTorch's own out of it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def at_once(*calls):
    """What each call gives, all of them begun at the same time in threads of their own."""
    begin, results = threading.Barrier(len(calls), timeout=60), {}

    def run(index):
        begin.wait()
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[index] for index in range(len(calls))]


@pytest.mark.parametrize("name", ["ddim", "ddpm", "plms", "dpmpp-2m"])
def test_sampling(name, tiny_unet):
    one, other = tiny_unet(), tiny_unet(widths=(8, 8))

    def sampled(model, seed, sampler):
        return fastdiff.sample(model, sampler, (2, 1, 8, 8), seed=[seed, seed + 1], progress=False)

    def made():
        return samplers.make(name, schedules.cosine(100), 4)

    cases = [(one, 1), (other, 5), (one, 9)]
    expected = [sampled(*case, made()) for case in cases]
    sampler = made()  # whose tables the threads are the first to ask for
    found = at_once(*[lambda case=case: sampled(*case, sampler) for case in cases])
    for image, wanted in zip(found, expected, strict=True):
        assert torch.equal(image, wanted)


def test_training(tiny_unet):
    one, other = tiny_unet(), tiny_unet(widths=(8, 8))
    t = torch.tensor([1, 99])

    def gradients(model, seed, schedule):
        x0, noise = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        loss = losses.simple_loss(schedule, model, x0, t, noise, kind="v").mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    cases = [(one, 1), (other, 5), (one, 9)]
    expected = [gradients(*case, schedules.cosine(100)) for case in cases]
    schedule = schedules.cosine(100)
    found = at_once(*[lambda case=case: gradients(*case, schedule) for case in cases])
    for got, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, got, wanted))


def test_each_thread_on_its_backend(tiny_unet):
    model, x = tiny_unet(), torch.randn(2, 1, 8, 8)

    def computed(name):
        with fastdiff.backend(name), torch.no_grad():
            return [model(x, step) for step in range(5)]

    names = ("reference", "auto", "reference")
    expected = [computed(name) for name in names]
    found = at_once(*[lambda name=name: computed(name) for name in names])
    for images, wanted in zip(found, expected, strict=True):
        assert all(map(torch.equal, images, wanted))
