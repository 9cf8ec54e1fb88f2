"""Stored figures as rows of a table: one function a table, from a file's content to its cells.

Each function returns the head first. What the files hold is said where they are written:
``benchmarks.turns.report``, ``conftest``, ``sampler_quality``, ``emoji_quality``, ``objectives``,
``adaptive_steps`` and the audit of the GPU kernels.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

Row = list[str]
Results = dict[str, Any]

LAYOUTS = ("f32 nchw", "f32 nhwc", "bf16 nchw", "bf16 nhwc")
# Those that a table of their own shows, and conv2d, which unet.md shows in its place in a network.
NOT_SINGLE = ("conv2d", "digits", "sampling_loop", "scheduler_steps", "training_objective")
EULER = "euler-maruyama"
LAST_STEPS = 100  # of a training, whose mean loss is the loss at its end


def machines(results: Results) -> list[dict[str, Any]]:
    """What the figures were measured on, each machine, day and set of versions once."""
    taken = results.get("machines") or [record["machine"] for record in results["records"]]
    return [facts for index, facts in enumerate(taken) if facts not in taken[:index]]


def time_text(seconds: float) -> str:
    """Three or four digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


# U-Nets: unet.json.


def unet_calls(results: Results) -> list[Row]:
    """Every peer on the CIFAR-10 U-Net, by batch and dtype: milliseconds a call."""
    return by_peer(_records(results, "call", "cifar10"), 1e3)


def unet_sampling(results: Results) -> list[Row]:
    """Every peer's sampling loops with the CIFAR-10 U-Net: seconds."""
    return by_peer(_records(results, "sampling", "cifar10"), 1)


def unet_errors(results: Results) -> list[Row]:
    """First call, memory and error of every variant of a peer, CIFAR-10, batch 8, float32."""
    record = _record(results, "call", "cifar10", 8)
    table = [["", "first call, s", "memory in use, MiB", "error"]]
    for row in record["rows"]:
        if row["median"] is not None and not row["failed"]:
            figures = f"{row['first_call']:.1f}", f"{row['running_memory']:.0f}"
            table.append([row["peer"], *figures, f"{row['error']:.1e}"])
    return table


def other_networks(results: Results) -> list[Row]:
    """Every peer on the networks other than the CIFAR-10 U-Net: milliseconds a call."""
    from benchmarks.unet.models import NETWORKS

    calls = [r for r in results["records"] if r["kind"] == "call" and r["network"] != "cifar10"]
    titles = [f"{NETWORKS[r['network']].title}, batch {r['batch']}, {r['dtype']}" for r in calls]
    return [["", *titles], *by_peer(calls, 1e3)[1:]]


# The suite of bfloat16: bfloat16.json.


def bfloat16_calls(results: Results) -> list[Row]:
    """Every peer on every case: milliseconds a call, and the time over fastdiff's."""
    return _suite(results, lambda record, kind: _best(record, kind, 1e3))


def bfloat16_memory(results: Results) -> list[Row]:
    """Resident memory in MiB: while it runs, and the peak, which is that of the compilation."""
    return _suite(results, _figures("running_memory", "peak_memory", "{:.0f}"))


def bfloat16_first_calls(results: Results) -> list[Row]:
    """Seconds of the first call: with empty caches, and with those of an earlier process."""
    return _suite(results, _figures("first_call", "warm_first_call", "{:.1f}"))


def _suite(results: Results, cell: Callable[[Results, str], str]) -> list[Row]:
    """One row a kind of peer, one column a case."""
    from benchmarks.unet.models import NETWORKS

    calls = [r for r in results["records"] if r["kind"] == "call"]
    titles = [f"{NETWORKS[r['network']].title}, {r['dtype']}, batch {r['batch']}" for r in calls]
    return [["", *titles], *_by_kind(calls, cell)]


def _figures(first: str, second: str, form: str) -> Callable[[Results, str], str]:
    """A cell with two figures of the fastest variant of a kind of peer."""

    def cell(record: Results, kind: str) -> str:
        row = _fastest(record, kind)
        figures = [] if row is None else [row[first], row[second]]
        return ", ".join("-" if value is None else form.format(value) for value in figures)

    return cell


# The suite of scaling: scaling.json.


def scaling(results: Results) -> list[Row]:
    """One row a batch, size and number of threads; one column a dtype and peer: milliseconds."""
    from benchmarks.unet.peers import PEERS

    calls = [r for r in results["records"] if r["kind"] == "call"]
    axes = ("batch", "size", "threads")
    points = sorted({tuple(record[axis] for axis in axes) for record in calls})
    dtypes = dict.fromkeys(record["dtype"] for record in calls)
    peers = dict.fromkeys(row["peer"] for record in calls for row in record["rows"])
    kinds = list(dict.fromkeys(PEERS[peer].summary for peer in peers))
    at = {(*(record[axis] for axis in axes), record["dtype"]): record for record in calls}
    table = [[*axes, *(f"{kind}, {dtype}" for dtype in dtypes for kind in kinds)]]
    for point in points:
        found = [at.get((*point, dtype)) for dtype in dtypes]
        cells = [_best(record, kind, 1e3) if record else "" for record in found for kind in kinds]
        table.append([*map(str, point), *cells])
    return table


def _records(results: Results, kind: str, network: str) -> list[Results]:
    return [r for r in results["records"] if (r["kind"], r["network"]) == (kind, network)]


def _record(results: Results, kind: str, network: str, batch: int) -> Results:
    records = _records(results, kind, network)
    return next(r for r in records if (r["batch"], r["dtype"]) == (batch, "float32"))


def by_peer(records: list[Results], scale: float) -> list[Row]:
    """One row a kind of peer, the fastest of its variants; one column a record."""
    head = ["", *(f"batch {r['batch']}, {r['dtype']}" for r in records)]
    return [head, *_by_kind(records, lambda record, kind: _best(record, kind, scale))]


def _by_kind(records: list[Results], cell: Callable[[Results, str], str]) -> list[Row]:
    """A row of cells for each kind of peer that any record has."""
    from benchmarks.unet.peers import PEERS

    table = []
    kinds = [peer.summary for peer in PEERS.values()]
    for kind in dict.fromkeys(kinds):
        cells = [cell(record, kind) for record in records]
        if any(cells):
            table.append([kind + (" (best)" if kinds.count(kind) > 1 else ""), *cells])
    return table


def _fastest(record: Results, kind: str) -> Results | None:
    """The row of the fastest variant of a kind of peer; None if none was timed."""
    from benchmarks.unet.peers import PEERS

    rows = [r for r in record["rows"] if PEERS[r["peer"]].summary == kind]
    timed = [r for r in rows if r["median"] is not None and not r["failed"]]
    return min(timed, key=lambda row: row["median"], default=None)


def _best(record: Results, kind: str, scale: float) -> str:
    """The fastest variant of a kind of peer, and its time over fastdiff's."""
    from benchmarks.turns.job import OURS
    from benchmarks.unet.peers import PEERS

    best = _fastest(record, kind)
    if best is None:
        rows = [r for r in record["rows"] if PEERS[r["peer"]].summary == kind]
        return "failed" if any(r["failed"] for r in rows) else ""
    text = f"{scale * best['median']:.{1 if scale > 1 else 2}f}"
    ours = next(
        (r["median"] for r in record["rows"] if r["peer"] == OURS and not r["failed"]), None
    )
    return text if kind == PEERS[OURS].summary or not ours else (
        f"{text} ({best['median'] / ours:.2f}x)"
    )  # fmt: skip


# Training steps: training.json.


def training_steps(results: Results) -> list[Row]:
    """Every peer on every case: milliseconds a training step, and the time over fastdiff's."""
    return _training(results, "median", 1e3, "{:.1f}")


def training_memory(results: Results) -> list[Row]:
    """Resident memory in MiB while steps are taken, and the memory over fastdiff's."""
    return _training(results, "running_memory", 1, "{:.0f}")


def training_parts(results: Results) -> list[Row]:
    """Milliseconds of each part of fastdiff's step, one column a case."""
    found = [r for r in results["records"] if r["kind"] == "breakdown"]
    order: dict[str, float] = {}
    for record in found:
        for part, ms in record["parts"].items():
            order[part] = max(order.get(part, 0.0), ms / record["recorded"])
    table = [["", *map(_training_title, found)]]
    for part in sorted(order, key=lambda part: -order[part]):
        cells = (record["parts"].get(part) for record in found)
        table.append([part, *("" if ms is None else f"{ms:.1f}" for ms in cells)])
    return [*table, ["the step, recorded", *(f"{r['recorded']:.1f}" for r in found)]]


def _training(results: Results, figure: str, scale: float, form: str) -> list[Row]:
    from benchmarks.training.peers import PEERS

    titles = {name: peer.title for name, peer in PEERS.items()}
    return _cases(results, _training_title, titles, figure, scale, form)


def _training_title(record: Results) -> str:
    from benchmarks.training.tasks import TASKS

    title = TASKS[record["network"]].network.title
    return f"{title}, {record['dtype']}, batch {record['batch']}"


# Whole pipelines: pipelines.json.


def pipelines(results: Results) -> list[Row]:
    """Every peer on every case: seconds a call, and the time over fastdiff's."""
    from benchmarks.pipelines.peers import PEERS

    titles = {name: peer.title for name, peer in PEERS.items()}
    return _cases(results, _pipeline_title, titles, "median", 1, "{:.2f}")


def _pipeline_title(record: Results) -> str:
    plural = "" if record["batch"] == 1 else "s"
    return f"{record['batch']} image{plural}, {record['dtype']}"


def _cases(
    results: Results,
    title: Callable[[Results], str],
    peers: dict[str, str],
    figure: str,
    scale: float,
    form: str,
) -> list[Row]:
    """One row a title, one column a case: a figure, and its ratio to fastdiff's.

    Args:
        results: of peers in turns.
        title: of a column, from its record.
        peers: the peers' names, and their titles in the table; the fastest of one title is shown.
        figure: the key of a record's rows.
        scale: factor of the figure.
        form: of the scaled figure.
    """
    calls = [r for r in results["records"] if r["kind"] == "call"]
    table = [["", *map(title, calls)]]
    for peer in dict.fromkeys(peers.values()):
        names = [name for name in peers if peers[name] == peer]
        cells = [_cell(record, names, figure, scale, form) for record in calls]
        if any(cells):
            table.append([peer, *cells])
    return table


def _cell(record: Results, names: list[str], figure: str, scale: float, form: str) -> str:
    """The smallest figure among a peer's variants, and its ratio to fastdiff's."""
    from benchmarks.turns.job import OURS

    rows = [r for r in record["rows"] if r["peer"] in names]
    values = [r[figure] for r in rows if not r["failed"] and r[figure] is not None]
    if not values:
        return "failed" if any(r["failed"] for r in rows) else ""
    ours = next((r[figure] for r in record["rows"] if r["peer"] == OURS and not r["failed"]), None)
    text = form.format(scale * min(values))
    return text if OURS in names or not ours else f"{text} ({min(values) / ours:.2f}x)"


# The digits model trained in eager mode and compiled: learning.json.


def learning(results: Results) -> list[Row]:
    """Loss at the end and Frechet distance of samples: one row a seed, and mean and deviation."""
    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        "loss": lambda run: statistics.fmean(run["losses"][-LAST_STEPS:]),
        "Fréchet distance": lambda run: run["frechet"],
    }
    ways = dict.fromkeys(run["way"] for run in results["runs"])
    seeds = sorted({run["seed"] for run in results["runs"]})
    runs = {(run["seed"], run["way"]): run for run in results["runs"]}
    table = [["seed", *(f"{name}, {way}" for name in figures for way in ways)]]
    columns = [
        [of(runs[seed, way]) if (seed, way) in runs else None for seed in seeds]
        for of in figures.values()
        for way in ways
    ]
    for index, seed in enumerate(seeds):
        cells = (column[index] for column in columns)
        table.append([str(seed), *("" if cell is None else f"{cell:.4f}" for cell in cells)])
    summaries: dict[str, Callable[[list[float]], float]] = {
        "mean": statistics.fmean, "standard deviation": statistics.stdev,
    }  # fmt: skip
    for name, summary in summaries.items():
        made = ([cell for cell in column if cell is not None] for column in columns)
        table.append([name, *(f"{summary(one):.4f}" if len(one) > 1 else "" for one in made)])
    return table


# Operations: operations.json.


def operations(results: Results) -> list[Row]:
    """Single operations: one row a case and shape, one column a dtype and layout."""
    mine = [one for one in results["comparisons"] if one["benchmark"] not in NOT_SINGLE]
    table: dict[tuple[str, str], dict[str, str]] = {}
    for one in mine:
        part = one["part"].replace("_", " ")
        name = ", ".join(filter(None, (f"`{one['benchmark']}`", part, one["case"])))
        table.setdefault((name, one["shape"]), {})[_layout(one)] = _ours_and_ratio(one)
    head = ["operation", "shape", *LAYOUTS]
    return [head, *([*key, *(cells.get(c, "") for c in LAYOUTS)] for key, cells in table.items())]


def training_objective(results: Results) -> list[Row]:
    """Noising, target and weighted error, beside eager PyTorch and Inductor."""
    table = [["objective", "shape", "dtype", "fastdiff", "PyTorch", "Inductor"]]
    for one in _of(results, "training_objective", "objective"):
        peers = (_peer(one, name) for name in ("torch", "inductor"))
        prediction, noise = one["case"].split("-")
        name = f"{prediction}, noise {noise}"
        table.append([name, one["shape"], one["dtype"], time_text(one["ours"]), *peers])
    return table


def whole_models(results: Results) -> list[Row]:
    """Training and sampling with a whole network, beside the same on plain PyTorch."""
    table = [["", "fastdiff", "PyTorch", "Inductor"]]
    named = {("digits", "training_step"): "a training step of the digits model, 64 images",
             ("digits", "sampling"): "10 steps of DDIM with the digits model, images:",
             ("training_objective", "training_step"):
             "a training step of DDPM's CIFAR-10 U-Net, 16 images, predicting"}  # fmt: skip
    for one in results["comparisons"]:
        name = named.get((one["benchmark"], one["part"]))
        if name:
            peers = (_peer(one, peer) for peer in ("reference", "inductor"))
            table.append([f"{name} {one['case']}".strip(), time_text(one["ours"]), *peers])
    return table


def sampling_loop(results: Results) -> list[Row]:
    """What a step costs beside the model, in fastdiff's loop and in one over diffusers'."""
    table = [["sampler, steps", "fastdiff, us a step", "diffusers, us a step", "ratio",
              "dispatcher calls a step"]]  # fmt: skip
    for one in _of(results, "sampling_loop", ""):
        sampler, steps = re.fullmatch(r"(.+)-(\d+) steps", one["case"]).groups()  # type: ignore[union-attr]
        a_step = 1e6 / int(steps)
        ours, theirs = one["ours"], one["peers"]["diffusers"]
        table.append([f"`{sampler}`, {steps}", f"{ours * a_step:.1f}", f"{theirs * a_step:.0f}",
                      f"{theirs / ours:.2f}", one["notes"]["dispatcher calls"]])  # fmt: skip
    return table


def scheduler_steps(results: Results) -> list[Row]:
    """A step of each of diffusers' schedulers, ours and its own: microseconds and their ratio."""
    cells: dict[str, dict[str, list[str]]] = {}
    for one in _of(results, "scheduler_steps", ""):
        ours, theirs = (
            1e6 * seconds / int(one["notes"]["steps"])
            for seconds in (one["ours"], one["peers"]["diffusers"])
        )
        figures = [f"{ours:.1f}", f"{theirs:.0f}", f"{theirs / ours:.1f}"]
        cells.setdefault(one["case"], {})[one["dtype"]] = figures
    kinds = ("fastdiff, us", "diffusers, us", "ratio")
    head = ["step of", *(f"{dtype}: {kind}" for dtype in ("f32", "bf16") for kind in kinds)]
    none = [""] * len(kinds)
    return [head, *(
        [f"`{name}`", *figures.get("f32", none), *figures.get("bf16", none)]
        for name, figures in cells.items()
    )]  # fmt: skip


def _of(results: Results, benchmark: str, part: str) -> list[Results]:
    comparisons = results["comparisons"]
    return [one for one in comparisons if (one["benchmark"], one["part"]) == (benchmark, part)]


def _layout(one: Results) -> str:
    return f"{one['dtype'] or 'f32'} {one['layout'] or 'nchw'}"


def _ours_and_ratio(one: Results) -> str:
    """fastdiff's time, and how many times as long the first peer takes."""
    peer = next(iter(one["peers"].values()))
    return f"{time_text(one['ours'])} ({peer / one['ours']:.2f}x)"


def _peer(one: Results, name: str) -> str:
    seconds = one["peers"].get(name)
    return "" if seconds is None else f"{time_text(seconds)} ({seconds / one['ours']:.2f}x)"


# Samplers on the shipped model: sampler_quality.json.


def sampler_quality(results: Results) -> list[Row]:
    """Frechet distance of every sampler: one row a sampler, one column a number of evaluations."""
    figures = results["rows"]
    budgets = list(dict.fromkeys(row["budget"] for row in figures))
    table = [["sampler", *(f"{budget} evaluations" for budget in budgets)]]
    for name in dict.fromkeys(row["sampler"] for row in figures):
        at = {row["budget"]: f"{row['frechet']:.2f}" for row in figures if row["sampler"] == name}
        table.append([f"`{name}`", *(at.get(budget, "") for budget in budgets)])
    real = f"{figures[0]['frechet_real']:.2f}"
    model = results.get("model", "digits")
    return [*table, [f"held-out real {model}", *[real] * len(budgets)]]


def shipped_model(results: Results) -> list[Row]:
    """The shipped model by its default sampler, 50 steps of DDIM, beside real digits."""
    one = next(row for row in results["rows"] if row["sampler"] == "ddim, leading")
    figures = {
        "taken for the right digit by an independent classifier": ("accuracy", "{:.1%}"),
        "Fréchet distance to the training digits": ("frechet", "{:.2f}"),
        "distance to the nearest training digit, median": ("nearest_train_median", "{:.2f}"),
        "distance to the nearest training digit, smallest": ("nearest_train_min", "{:.2f}"),
    }
    table = [["", f"{one['samples']} generated digits", "held-out real digits"]]
    for name, (key, form) in figures.items():
        table.append([name, form.format(one[key]), form.format(one[f"{key}_real"])])
    return table


# The emoji model: emoji_quality.json.


def emoji_quality(results: Results) -> list[Row]:
    """One row a way to sample, in sets as large as the held-out set; the last row is that set."""
    columns = {
        "frechet": ("Fréchet distance", "{:.2f}"),
        "precision": ("precision", "{:.2f}"),
        "recall": ("recall", "{:.2f}"),
        "coverage": ("coverage", "{:.2f}"),
        "nearest_median": ("nearest training emoji, median", "{:.1f}"),
        "nearest_min": ("nearest, smallest", "{:.1f}"),
    }
    table = [["", *(title for title, _ in columns.values())]]
    for one in results["rows"]:
        facts = results["found"][one["command"]]
        cells = (form.format(facts[f"{key}_matched"]) for key, (_, form) in columns.items())
        table.append([one["name"], *cells])
    real = (form.format(facts[f"{key}_real"]) for key, (_, form) in columns.items())
    return [*table, ["held-out real emoji", *real]]


# Objectives on the 8x8 digits: objectives.json and guidance.json.


def objectives(results: Results) -> list[Row]:
    """One row an objective and sampler; bits where they were measured."""
    table = [["objective", "sampler", "evaluations an image", "Fréchet distance", "right class",
              "bits/dim, bound", "bits/dim, ODE"]]  # fmt: skip
    for one in results["rows"]:
        facts = results["found"][one["command"]]
        bits = (facts.get("bits_bound"), facts.get("bits_ode"))
        table.append([
            one["objective"], one["sampler"], f"{facts['evaluations']:.4g}",
            f"{facts['frechet']:.2f}", f"{facts['accuracy']:.1%}",
            *("" if value is None else f"{value:.3f}" for value in bits),
        ])  # fmt: skip
    real = f"{facts['frechet_real']:.2f}", f"{facts['accuracy_real']:.1%}"
    return [*table, ["held-out real digits", "", "", *real, "", ""]]


def guidance(results: Results) -> list[Row]:
    """Frechet distance and accuracy, one row a model and kind of guidance, one column a scale."""
    table = [["model, guidance", "sampler", *(f"scale {scale:g}" for scale in results["scales"])]]
    for one in results["rows"]:
        figures = [results["found"][command] for command in one["commands"]]
        cells = (f"{facts['frechet']:.2f}, {facts['accuracy']:.1%}" for facts in figures)
        table.append([one["name"], figures[0]["sampler"], *cells])
    return table


def few_steps(results: Results) -> list[Row]:
    """Frechet distance and share of right digits, one column a number of steps."""
    steps = ("1", "2", "4", "50")
    table = [["model", *(f"steps: {count}" for count in steps)]]
    for one in results["rows"]:
        figures = {n: results["found"][command] for n, command in one["commands"].items()}
        cells = {
            n: f"{facts['frechet']:.2f}, {facts['accuracy']:.1%}" for n, facts in figures.items()
        }
        table.append([one["name"], *(cells.get(n, "") for n in steps)])
    facts = figures["4"]
    real = f"{facts['frechet_real']:.2f}, {facts['accuracy_real']:.1%}"
    return [*table, ["held-out real digits", real, "", "", ""]]


# Adaptive steps: adaptive_steps.json.


def signals_and_videos(results: Results) -> list[Row]:
    """Milliseconds of a call by fastdiff, and by each peer in the layout that suits it best."""
    table = [["", "sample", "fastdiff", "torch.compile, Inductor (best)", "eager (best)"]]
    for row in results["figures"]:
        seconds = row["seconds"]
        ours, cells = seconds["fastdiff"], list[str]()
        for peer in ("inductor", "eager"):
            best = min(time for name, time in seconds.items() if name.startswith(peer))
            cells.append(f"{best * 1e3:.1f} ({best / ours:.2f}x)")
        shape = " x ".join(map(str, row["shape"]))
        table.append([row["network"], shape, f"{ours * 1e3:.1f}", *cells])
    return table


def adaptive_steps(results: Results) -> list[Row]:
    """The fewest evaluations at which adaptive steps come as near as Euler-Maruyama's."""
    figures = results["digits"]
    schemes = [s for s in dict.fromkeys(row["method"] for row in figures) if s != EULER]
    table = [["evaluations of Euler-Maruyama", "Fréchet distance", *map("`{}`".format, schemes)]]
    for row in (row for row in figures if row["method"] == EULER):
        spent, distance = row["evaluations"], row["frechet"]
        cells = (_evaluations(cheapest(figures, scheme, distance), spent) for scheme in schemes)
        table.append([f"{spent:.0f}", f"{distance:.2f}", *cells])
    return table


def cheapest(figures: Iterable[Results], method: str, distance: float) -> Results | None:
    """The figure of a method with the fewest evaluations of those that are at least as near."""
    good = [row for row in figures if row["method"] == method and row["frechet"] <= distance]
    return min(good, key=lambda row: row["evaluations"], default=None)


def _evaluations(best: Results | None, spent: float) -> str:
    if best is None:
        return "not reached"
    ratio = spent / best["evaluations"]
    return f"{best['evaluations']:.1f}, {best['setting']} (ratio {ratio:.2f})"


def ode_errors(results: Results) -> list[Row]:
    """Error and evaluations of each Runge-Kutta pair at each tolerance, on a known mixture."""
    adaptive = [row for row in results["mixture"] if row["setting"] < 1]  # a grid's is its steps
    pairs = list(dict.fromkeys(row["method"] for row in adaptive))
    table = [["tolerance", *map("`{}`".format, pairs)]]
    for tolerance in dict.fromkeys(row["setting"] for row in adaptive):
        at = {row["method"]: row for row in adaptive if row["setting"] == tolerance}
        cells = (f"{at[pair]['error']:.1e}, {at[pair]['evaluations']:.0f}" for pair in pairs)
        table.append([f"{tolerance:g}", *cells])
    return table


# The audit of the GPU kernels: gpu_audit.json holds the rows of both tables as they are.


def gpu_kernels(results: Results) -> list[Row]:
    """What the compilers make of each kernel."""
    return results["kernels"]


def gpu_bytes(results: Results) -> list[Row]:
    """What each operation moves."""
    return results["bytes"]
