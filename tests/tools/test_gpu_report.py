"""The report of the GPU stages: one that fails, hangs or cannot run ends nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.build.common import ROOT
from tools.gpu import __main__ as command
from tools.gpu import stage as stage_module
from tools.gpu import stages as stages_module
from tools.gpu.machine import Machine, machine
from tools.gpu.stage import Stage, run

HERE = Machine(found={"torch": "2"}, missing={"device": "it was lent to a friend"})


def shell(name: str, script: str, limit: float = 600, **more) -> Stage:
    return Stage(name, f"the stage {name}", ("sh", "-c", script), limit, **more)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(stage_module, "GRACE", 1.0)


def test_what_a_stage_printed_is_shown_and_kept(tmp_path) -> None:
    stage = shell("talks", "seq 0 49", shown=lambda lines: lines[-2:])
    outcome = run(stage, tmp_path, {}, 600)
    assert (outcome.status, outcome.lines) == ("passed", ["48", "49"])
    assert (tmp_path / "talks.log").read_text().splitlines() == [str(i) for i in range(50)]


def test_a_stage_that_fails_says_so_and_the_next_one_runs(tmp_path) -> None:
    todo = [shell("fails", "echo why; exit 3"), shell("works", "echo fine")]
    fails, works = command.run_all(todo, HERE, tmp_path, 600)
    assert (fails.status, fails.reason, fails.lines) == ("failed", "exit status 3", ["why"])
    assert works.status == "passed"


def test_a_stage_is_stopped_at_its_limit_with_what_it_had_started(tmp_path) -> None:
    child = tmp_path / "child"
    # Neither it nor what it has started ends at Ctrl-C.
    script = f"trap '' INT; sleep 600 & echo $! > {child}; echo begun; wait; sleep 600"
    outcome = run(shell("hangs", script, limit=600), tmp_path, {}, 4)  # less is left than its limit
    assert (outcome.status, outcome.lines) == ("out of time", ["begun"])
    assert outcome.reason == "stopped after 3 s"
    assert outcome.seconds < 60
    for _ in range(100):  # until the system has taken note of the child's end
        state = _state(int(child.read_text()))
        if state in (None, "Z"):
            return
        time.sleep(0.1)
    pytest.fail(f"the child still runs: {state}")


def _state(process: int) -> str | None:
    """The state of a process, as ps has it, or None without one."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return done.stdout.strip()[:1] or None


def test_a_stage_that_ends_when_asked_says_what_it_had(tmp_path) -> None:
    script = "trap 'echo summary; exit 2' INT; echo begun; while :; do sleep 0.1; done"
    outcome = run(shell("asked", script, limit=3), tmp_path, {}, 600)
    assert (outcome.status, outcome.lines) == ("out of time", ["begun", "summary"])


def test_what_is_missing_is_named_and_the_stage_left_out(tmp_path) -> None:
    needs = ("torch", "device")
    outcome = run(shell("needy", "exit 1", needs=needs), tmp_path, HERE.missing, 60)
    assert (outcome.status, outcome.reason) == ("left out", "no device: it was lent to a friend")
    assert not (tmp_path / "needy.log").exists()


def test_without_time_the_last_stages_are_left_out(tmp_path) -> None:
    todo = [shell("first", "sleep 600"), shell("second", "true")]
    first, second = command.run_all(todo, HERE, tmp_path, 2)
    assert first.status == "out of time"
    assert (second.status, second.reason) == ("left out", "no time was left")


def test_a_program_that_is_not_there_is_a_failure(tmp_path) -> None:
    outcome = run(Stage("absent", "", ("/no/such/program",), 600), tmp_path, {}, 600)
    assert (outcome.status, outcome.reason) == ("failed", "exit status 127")
    assert "/no/such/program" in outcome.lines[0]


def test_the_report_has_it_all(tmp_path) -> None:
    todo = [shell("works", "echo a line"), shell("needy", "true", needs=("device",))]
    command.run_all(todo, HERE, tmp_path, 600)
    page = (tmp_path / "report.md").read_text()
    assert "- torch: 2\n- no device: it was lent to a friend\n" in page
    assert "| the stage works | passed |" in page
    assert "| the stage needy | left out | 0.0 | no device: it was lent to a friend |" in page
    assert "```\na line\n```" in page
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["machine"]["missing"] == HERE.missing
    assert [one["status"] for one in facts["stages"]] == ["passed", "left out"]


@pytest.mark.parametrize(
    ("scripts", "expected"),
    [
        pytest.param(["true", "true"], 0, id="all passed"),
        pytest.param(["true", None], 2, id="one left out"),
        pytest.param(["exit 1", None], 1, id="one failed"),
    ],
)
def test_the_exit_status(monkeypatch, tmp_path, scripts, expected) -> None:
    def todo(here):
        return [
            shell(f"stage{i}", script or "", needs=() if script else ("device",))
            for i, script in enumerate(scripts)
        ]

    monkeypatch.setattr(command, "look", lambda: HERE)
    monkeypatch.setattr(command, "stages", todo)
    assert command.main(["--out", str(tmp_path)]) == expected


def test_an_unknown_stage_is_refused(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(command, "look", lambda: HERE)
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--only", "build", "lunch"])
    assert "no stage lunch: there are build, doctor, tests, kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param("sleep 60", "looking for a device took more than 1 s", id="hangs"),
        pytest.param("echo no driver >&2; kill -SEGV $$", "no driver", id="crashes"),
    ],
)
def test_a_driver_that_is_broken_is_a_missing_device(monkeypatch, tmp_path, script, reason) -> None:
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    assert reason in command.look(limit=1).missing["device"]


def test_the_stages_are_for_what_the_machine_has(monkeypatch) -> None:
    here = machine()
    assert here.found["torch"]
    assert set(here.found) & set(here.missing) == set()
    named = {name for stage in stages_module.stages(here) for name in stage.needs}
    assert named <= set(here.found) | set(here.missing)
    names = [stage.name for stage in stages_module.stages(here)]
    assert names == ["build", "doctor", "tests", "kernels", "unet", "sanitizer", "ncu"]


def test_the_files_of_the_stages_are_there() -> None:
    assert "tests/gpu" in stages_module.gpu_tests()
    assert "tests/sampling/test_capture.py" in stages_module.gpu_tests()
    for stage in stages_module.stages(Machine()):
        for part in stage.command:
            if part.endswith(".py"):
                assert (ROOT / part).is_file(), part


PROFILE = """\
==PROF== Connected to process 7
triton q_sample 4x4x64x64
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","_q_sample","gpu__time_duration.sum","us","3.5"
"0","7","_q_sample","launch__registers_per_thread","register/thread","32"
"1","7","_q_sample","gpu__time_duration.sum","us","4.5"
"""


def test_a_profile_is_a_line_for_each_kernel() -> None:
    first, second = stages_module.profile_lines(PROFILE.splitlines())
    assert first.split(maxsplit=1) == ["_q_sample", "time 3.5 us; registers 32"]
    assert second.split(maxsplit=1) == ["_q_sample", "time 4.5 us"]
    assert stages_module.profile_lines(["no permission"]) == ["no permission"]


def test_the_command_runs_where_there_is_no_device(tmp_path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu", "--out", tmp_path, "--only", "build", "tests"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert Path(tmp_path, "report.md").read_text().count("| left out |") == 2
    assert "no device: torch " in done.stdout
