"""Choosing what the operations run on."""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import itertools
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch

import fastdiff
from fastdiff import ops
from fastdiff.ops import reference

module = importlib.import_module("fastdiff.backend")  # the attribute of that name is the class
needs_extension = pytest.mark.skipif(module.extension is None, reason=str(module.cpu_missing))


@pytest.fixture(autouse=True)
def _default_backend():
    """Whatever a test sets, the next one finds the default."""
    fastdiff.backend("auto")
    yield
    fastdiff.backend("auto")


@pytest.fixture
def reference_calls(monkeypatch):
    """A list that grows with every call of the reference's sampler_step."""
    calls = []
    original = reference.sampler_step

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(reference, "sampler_step", counted)
    return calls


def step(dtype=torch.float32):
    x = torch.ones(1, 1, 2, 2, dtype=dtype)
    table = torch.ones(1, 18, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return ops.sampler_step(x, x, None, None, table, torch.tensor(0))


def test_the_setting_and_the_context_manager(reference_calls):
    assert module.current() == "auto"
    with fastdiff.backend("reference"):
        assert module.current() == "reference"
        step()
        with fastdiff.backend("auto"):
            assert module.current() == "auto"
        assert module.current() == "reference"
    assert len(reference_calls) == 1
    assert module.current() == "auto"
    fastdiff.backend("reference")
    assert module.current() == "reference"
    step()
    assert len(reference_calls) == 2


def test_an_error_inside_restores_the_setting():
    with pytest.raises(ZeroDivisionError), fastdiff.backend("reference"):
        1 / 0  # noqa: B018
    assert module.current() == "auto"


@needs_extension
@pytest.mark.parametrize("name", ["auto", "cpu"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_the_kernels_run_on_cpu_tensors(name, dtype, reference_calls):
    with fastdiff.backend(name):
        assert module.kernel_runs(torch.ones(1, dtype=dtype))
        step(dtype)
    assert not reference_calls


@needs_extension
def test_other_tensors_run_on_the_reference():
    assert not module.kernel_runs(torch.ones(1, device="meta"))
    assert not module.kernel_runs(torch.ones(1, dtype=torch.int64))
    with fastdiff.backend("reference"):
        assert not module.kernel_runs(torch.ones(1))


@needs_extension
def test_what_it_says_about_itself():
    facts = module.describe()
    assert facts["backend"] == "cpu"
    assert facts["isa"] == module.isa()
    assert facts["isa"] != "none"
    assert facts["threads"] == torch.get_num_threads()
    with fastdiff.backend("reference"):
        assert module.describe()["backend"] == "reference"


def test_an_unknown_name_changes_nothing():
    fastdiff.backend("reference")
    with pytest.raises(ValueError, match="unknown backend 'tpu', wanted one of auto, reference"):
        fastdiff.backend("tpu")
    assert module.current() == "reference"


RUN_WITHOUT = """
import importlib, sys, warnings
{block}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastdiff
    from fastdiff import ops
warned = [str(w.message) for w in caught if "fastdiff" in str(w.message)]
module = importlib.import_module("fastdiff.backend")
assert module.describe()["backend"] == "reference" and module.isa() == "none"
x = torch.ones(1, 1, 2, 2)
assert ops.q_sample(x, torch.tensor([0]), x, torch.ones(1), torch.ones(1)).sum() == 8
try:
    fastdiff.backend("cpu")
except RuntimeError as error:
    print(error)
assert module.current() == "auto"
print(warned)
"""
NOT_BUILT = "sys.modules['fastdiff._C'] = None"
OF_ANOTHER_TORCH = """
import types
sys.modules["fastdiff._C"] = types.SimpleNamespace(torch_version="1.0")
"""
NOT_LOADABLE = """
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "fastdiff._C":
            raise ImportError("undefined symbol: _ZN2at")
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        pytest.param(NOT_BUILT, "the C++ extension was not built: ", id="not built"),
        pytest.param(OF_ANOTHER_TORCH, "was built for torch 1.0, this is", id="another torch"),
        pytest.param(NOT_LOADABLE, "cannot be loaded: undefined symbol: _ZN2at", id="broken"),
    ],
)
def test_without_the_extension_it_runs_and_says_why(block, reason):
    code = RUN_WITHOUT.format(block=block)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, warned = done.stdout.splitlines()
    assert refused.startswith("backend 'cpu' cannot run here: ")
    assert reason in refused
    assert reason in warned or "FASTDIFF_CPU=0" in refused  # left out on purpose: no warning


def test_an_extension_left_out_on_purpose_is_no_reason_to_warn(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "ops" / "backend.py"))
    (tmp_path / "_C.not_built").write_text("FASTDIFF_CPU=0 forbade it\n")
    assert (
        module._why_not_built("_C", "C++")
        == "the C++ extension was not built: FASTDIFF_CPU=0 forbade it"
    )
    assert not recwarn
    (tmp_path / "_C.not_built").write_text("no C++ compiler found\n")
    with pytest.warns(UserWarning, match="not built: no C\\+\\+ compiler found; running on the"):
        module._why_not_built("_C", "C++")


def test_an_object_can_be_entered_again() -> None:
    plain = fastdiff.backend("reference")
    for _ in range(2):
        with plain:
            assert module.current() == "reference"
        assert module.current() == "auto"


def elsewhere(action, *args):
    """What action(*args) gives in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(action(*args)))
    thread.start()
    thread.join(60)
    (result,) = results
    return result


def test_a_block_is_its_threads_alone():
    with fastdiff.backend("reference"):
        assert module.current() == "reference"
        assert elsewhere(module.current) == "auto"
    fastdiff.backend("reference")
    assert elsewhere(module.current) == "reference"
    with fastdiff.backend("auto"):
        assert module.current() == "auto"
        assert elsewhere(module.current) == "reference"


def test_set_for_good_by_another_thread():
    elsewhere(fastdiff.backend, "reference")
    assert module.current() == "reference"


def test_set_for_good_inside_a_block_ends_with_it():
    with fastdiff.backend("reference"):
        fastdiff.backend("auto")
        assert module.current() == "auto"
        with fastdiff.backend("reference"):
            assert module.current() == "reference"
        assert module.current() == "auto"
    assert module.current() == "auto"
    fastdiff.backend("reference")
    with fastdiff.backend("auto"):
        fastdiff.backend("auto")
    assert module.current() == "reference"


def test_threads_that_leave_in_the_order_they_entered():
    """The process must not keep what the first one had, nor either thread what the other has."""
    names = ("reference", "auto")
    entered, left = threading.Barrier(2, timeout=60), threading.Event()
    seen: dict[str, list[str]] = {name: [] for name in names}

    def run(name):
        with fastdiff.backend(name):
            entered.wait()
            seen[name].append(module.current())
            if name == "auto":
                left.wait(60)
            seen[name].append(module.current())
        left.set()
        seen[name].append(module.current())

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {name: [name, name, "auto"] for name in names}
    assert module.current() == "auto"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("made_first", [True, False], ids=["made before", "made when entered"])
def test_blocks_left_in_any_order(order, made_first):
    names = ("reference", "auto", "reference")
    blocks = [fastdiff.backend(name) for name in names] if made_first else []
    for index, name in enumerate(names):
        if not made_first:
            blocks.append(fastdiff.backend(name))
        blocks[index].__enter__()
        assert module.current() == name
        assert elsewhere(module.current) == ("reference" if made_first and index < 2 else "auto")
    inside = [0, 1, 2]
    for index in order:
        blocks[index].__exit__(None, None, None)
        inside.remove(index)
        assert module.current() == (names[inside[-1]] if inside else "auto")
    assert elsewhere(module.current) == "auto"


def test_objects_made_together_are_withdrawn_in_any_order():
    """Made in one thread, entered in others: each takes back only what it set for good itself."""
    objects = [fastdiff.backend(name) for name in ("reference", "auto", "reference")]
    for chosen in (objects[0], objects[2], objects[1]):
        elsewhere(chosen.__enter__)
    assert module.current() == "auto"
    outer = fastdiff.backend("reference")
    fastdiff.backend("auto")  # set later, for good
    with outer:
        pass
    assert module.current() == "auto"


def test_an_object_entered_within_itself_and_in_two_threads():
    chosen = fastdiff.backend("reference")
    with chosen:
        with fastdiff.backend("auto"):
            with chosen:
                assert module.current() == "reference"
            assert module.current() == "auto"
        elsewhere(chosen.__exit__, None, None, None)  # a thread that is not inside
        assert module.current() == "reference"
    assert module.current() == "auto"


def test_many_threads_each_see_their_own():
    wrong = []

    def run(name):
        for _ in range(300):
            with fastdiff.backend(name):
                wrong.extend([name] if module.current() != name else [])

    threads = [threading.Thread(target=run, args=(name,)) for name in ("reference", "auto") * 4]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert module.current() == "auto"


def test_tasks_of_one_thread_have_their_own():
    async def task(name, wait):
        with fastdiff.backend(name):
            await asyncio.sleep(wait)
            return module.current()

    async def both():
        tasks = [asyncio.create_task(task(*case)) for case in (("reference", 0.02), ("auto", 0.04))]
        await asyncio.sleep(0.01)
        return module.current(), *[await each for each in tasks], module.current()

    assert asyncio.run(both()) == ("auto", "reference", "auto", "auto")
    with fastdiff.backend("reference"):  # and begin with that of who made them
        assert contextvars.copy_context().run(module.current) == "reference"


def _tell(queue):
    queue.put(module.current())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_keeps_the_setting():
    """As a DataLoader's workers do."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with fastdiff.backend("reference"):
        worker = context.Process(target=_tell, args=(queue,))
        worker.start()
        assert queue.get() == "reference"
        worker.join(60)


# With 60 gradients inside of one another autograd goes on in another thread, without a GPU too.
IN_ANOTHER_THREAD = """
import importlib, os, threading
import torch, fastdiff

module = importlib.import_module("fastdiff.backend")
module._AUTO_ON_CUDA = "triton"
fastdiff.backend("auto")
seen = []


class Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        seen.append((threading.get_ident(), module.on_cuda(), module.current()))
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
        return grad, None


with fastdiff.backend("reference"):
    Deep.apply(torch.ones(1, requires_grad=True), 61).sum().backward()
print(*[told for thread, *told in seen if thread != threading.get_ident()][0], flush=True)
os._exit(0)  # PyTorch may abort when such a thread ends
"""


def test_gradients_computed_by_another_thread_see_the_block():
    done = subprocess.run([sys.executable, "-c", IN_ANOTHER_THREAD], capture_output=True, text=True)
    assert done.stdout == "None reference\n", done.stderr


def test_what_needs_a_kernel_has_one_where_the_reference_is_chosen(monkeypatch):
    monkeypatch.setattr(module, "_AUTO_ON_CUDA", "cuda")
    with fastdiff.backend("reference"):
        assert module.on_cuda() is None
        assert module.kernels_on_cuda() == "cuda"


@needs_extension
def test_compiled_code_follows_the_setting_of_its_caller():
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def add(x, emb):
        return ops.add_time_embedding(x, emb)

    def inside(x, emb):
        with fastdiff.backend("reference"):
            y = ops.add_time_embedding(x, emb)
        return ops.add_time_embedding(y, emb)

    def kernels():
        return sum("fastdiff.add_time_embedding" in target for target in graphs[-1])

    torch._dynamo.reset()
    inputs = torch.ones(1, 2, 2, 2), torch.ones(1, 2)
    run = torch.compile(add, backend=keep, fullgraph=True)
    run(*inputs)
    assert kernels() == 1
    with fastdiff.backend("reference"):
        run(*inputs)
        assert kernels() == 0
        elsewhere(run, *inputs)
    run(*inputs)
    assert len(graphs) == 2  # both are known by now
    with fastdiff.backend("reference"), fastdiff.backend("auto"):
        run(*inputs)
        assert kernels() == 1
    torch.compile(inside, backend=keep, fullgraph=True)(*inputs)
    assert kernels() == 1
    assert module.current() == "auto"
