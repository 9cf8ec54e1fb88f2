"""The benchmark of training steps: its gate, its division of a step, its tables; and learning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import learning, rows, tables
from benchmarks.training.breakdown import part_of
from benchmarks.training.gradients import WHOLE, check, errors, gradients
from benchmarks.training.peers import EAGER, PEERS
from benchmarks.training.report import Report
from benchmarks.training.run import Run
from benchmarks.training.step import FusedStep, PlainStep
from benchmarks.training.tasks import TASKS
from benchmarks.turns.job import OURS, Case
from benchmarks.turns.run import Settings

HERE = {"cpu": "a", "isa": ["avx2"], "kernels": "AVX2", "cores": 2, "threads": 2,
        "native_bfloat16": False, "date": "2026-01-01", "versions": {}}  # fmt: skip
EXACT = {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.tensor([1e-9])}


def off(**changes: torch.Tensor) -> dict[str, float]:
    return errors(EXACT | changes, EXACT)


def test_the_error_of_a_tensor_is_relative_to_its_norm():
    found = off(weight=torch.tensor([[3.0, 4.5]]))
    assert found["weight"] == pytest.approx(0.1)
    assert found["bias"] == 0.0
    assert found[WHOLE] == pytest.approx(0.1)


def test_a_gradient_that_is_zero_but_for_rounding_may_be_another_rounding():
    assert off(bias=torch.tensor([-1e-9]))["bias"] < 1e-6


@pytest.mark.parametrize(
    "wrong", [{"weight": torch.zeros(1, 2)}, {"weight": torch.full((1, 2), math.nan)},
              {"bias": torch.tensor([1.0])}], ids=["zero", "nan", "bias"]
)  # fmt: skip
def test_a_peer_with_a_wrong_gradient_is_refused(wrong):
    eager = off(weight=torch.tensor([[3.0, 4.04]]))
    assert check(eager, eager) == eager[WHOLE]
    with pytest.raises(ArithmeticError, match=f"wrong gradient: {next(iter(wrong))}"):
        check(off(**wrong), eager)


def test_gradients_of_other_shapes_are_refused():
    with pytest.raises(ArithmeticError, match="other names or shapes"):
        off(bias=torch.zeros(2))


def test_a_weight_without_gradient_is_refused():
    case = Case("tiny", 1, "float32", 1)
    step = PEERS[EAGER].step(case, TASKS["tiny"].module())
    step.module.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    batch = TASKS["tiny"].draw(TASKS["tiny"].images(), 1)
    with pytest.raises(ArithmeticError, match="1 weights have no gradient, as unused"):
        gradients(step, batch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_takes_the_step_that_the_peers_take(dtype):
    """Loss, gradients, and which of the weights and averages move."""
    task, case = TASKS["tiny-digits"], Case("tiny-digits", 4, dtype, 1)
    batch = task.draw(task.images(), 4, torch.Generator().manual_seed(0))
    ours, eager = (PEERS[name].step(case, task.module()) for name in (OURS, EAGER))
    bound = {"float32": 1e-4, "bfloat16": 5e-2}[dtype]
    assert ours.loss(batch).item() == pytest.approx(eager.loss(batch).item(), rel=bound)
    exact = gradients(eager, batch)
    assert errors(gradients(ours, batch), exact)[WHOLE] < bound
    for step, averages in ((ours, ours.trainer.averages.first), (eager, eager.averages)):
        weights = list(step.module.parameters())
        before = [p.detach().clone() for p in weights]
        step()
        assert not any(map(torch.equal, before, weights))
        # A thousandth of a small step may be rounded away, but not in all tensors.
        assert not all(map(torch.equal, before, averages))


def test_our_optimizer_takes_the_plain_step():
    task, case = TASKS["tiny-digits"], Case("tiny-digits", 2, "float32", 1)
    steps = []
    for make in (FusedStep, PlainStep):
        module = task.module()
        steps.append(make(task, case.batch, module, module))
    batch = task.draw(task.images(), case.batch)
    for step in steps:
        (1e3 * step.loss(batch)).backward()  # enough to be clipped
        step.update()
    torch.testing.assert_close(*(step.parameters for step in steps))
    torch.testing.assert_close(*(step.averages for step in steps))


@pytest.mark.parametrize(
    ("name", "phase", "part"),
    [
        ("fastdiff::conv2d", "forward", "forward, convolutions and linear layers"),
        ("fastdiff::conv2d", "backward", "backward, data gradients"),
        ("fastdiff::conv2d_weight_gradient", "backward", "backward, weight gradients"),
        ("fastdiff::conv2d_pack", "backward", "packing of weights"),
        ("fastdiff::group_norm_silu_backward", "backward", "backward, norms"),
        ("aten::mm", "backward", "backward, linear layers"),
        ("aten::mm", "optimizer", "optimizer"),
        ("aten::add_", "backward", None),
    ],
)
def test_a_part_is_an_operation_in_a_phase(name, phase, part):
    assert part_of(name, phase) == part


def row(peer: str, median: float | None, memory: float | None) -> dict[str, Any]:
    failed = "wrong gradient" if median is None else None
    return {"peer": peer, "median": median, "failed": failed, "running_memory": memory}


def test_tables_have_ratios_to_our_time_and_memory():
    case = {"network": "cifar10", "batch": 16, "dtype": "float32", "machine": HERE}
    peers = [row(OURS, 1.0, 500.0), row("inductor channels_last", None, None),
             row(EAGER, 2.5, 1000.0)]  # fmt: skip
    parts = {"recorded": 100.0, "parts": {"rest": 40.0, "optimizer": 60.0}}
    results = {
        "records": [case | {"kind": "call", "rows": peers}, case | {"kind": "breakdown"} | parts]
    }
    title = "DDPM CIFAR-10 U-Net, float32, batch 16"
    eager, inductor = PEERS[EAGER].title, PEERS["inductor channels_last"].title
    assert rows.training_steps(results) == [
        ["", title], ["fastdiff", "1000.0"], [inductor, "failed"], [eager, "2500.0 (2.50x)"],
    ]  # fmt: skip
    assert rows.training_memory(results)[-1] == [eager, "1000 (2.00x)"]
    assert rows.training_parts(results) == [
        ["", title], ["optimizer", "60.0"], ["rest", "40.0"], ["the step, recorded", "100.0"],
    ]  # fmt: skip


def test_a_case_is_checked_timed_and_broken_down(tmp_path):
    """A whole run of one peer, in processes of its own, and its report."""
    settings = Settings(
        rounds=1, limit=600, keep_heap=True, warm=False, breakdown=EAGER, folder=tmp_path
    )
    report = Report(tmp_path)
    Run(Case("tiny", 1, "float32", 1), [EAGER], settings, report.put).run()
    kinds = {record["kind"]: record for record in report.records}
    call, breakdown = kinds["call"], kinds["breakdown"]
    (made,) = call["rows"]
    assert call["finished"]
    assert made["failed"] is None
    assert made["median"] > 0
    assert 0 < made["error"] < 1e-5
    assert made["running_memory"] > 0
    assert sum(breakdown["parts"].values()) == pytest.approx(breakdown["recorded"])
    wanted = {"backward, PyTorch's convolutions", "optimizer", "running average", "data"}
    assert wanted <= set(breakdown["parts"])
    assert "Where the time of eager channels_last goes" in report.markdown.read_text("utf-8")


def test_learning_compares_runs_of_a_seed(tmp_path):
    runs = [
        {"seed": seed, "way": way, "losses": [1.0] * 50 + [loss] * learning_steps,
         "frechet": 2.0 + seed, "frechet_real": 1.5}
        for learning_steps in [rows.LAST_STEPS]
        for seed in (0, 1)
        for way, loss in (("eager", 0.25), ("fastdiff", 0.5))
    ]  # fmt: skip
    table = rows.learning({"runs": runs})
    assert table[0][1:] == ["loss, eager", "loss, fastdiff", "Fréchet distance, eager",
                            "Fréchet distance, fastdiff"]  # fmt: skip
    assert table[1] == ["0", "0.2500", "0.5000", "2.0000", "2.0000"]
    assert table[3] == ["mean", "0.2500", "0.5000", "2.5000", "2.5000"]
    assert table[4] == ["standard deviation", "0.0000", "0.0000", "0.7071", "0.7071"]
    pytest.importorskip("matplotlib")
    learning.draw({"runs": runs}, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 10_000


def test_smoothed_losses_are_means_of_the_steps_before():
    steps, means = learning.smoothed([float(n) for n in range(learning.WINDOW + 1)])
    assert steps.tolist() == [learning.WINDOW, learning.WINDOW + 1]
    assert means == pytest.approx([(learning.WINDOW - 1) / 2, (learning.WINDOW + 1) / 2])
    assert learning.smoothed([3.0, 5.0])[1] == pytest.approx([4.0])


def test_runs_of_a_seed_begin_alike_and_are_measured():
    eager, ours = (learning.trained(way, 3, 2, 100, 8) for way in learning.WAYS)
    assert ours["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    assert eager["losses"][0] != eager["losses"][1]
    assert ours["frechet"] == pytest.approx(eager["frechet"], rel=1e-2)


@pytest.mark.parametrize("name", ["training", "training-memory", "training-parts", "learning"])
def test_tables_without_figures_say_so(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "Not measured yet: `make " in tables.TABLES[name].text()
