"""The peers that run an exported network: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.turns.job import DTYPES, Case, Job
from benchmarks.unet.models import Network, Plain
from benchmarks.unet.prepared import Prepared

NAMES = ("x", "t", "context")  # names of the inputs


def onnxruntime(job: Job, network: Network, module: nn.Module) -> Prepared:
    """A session with all of its graph optimisations, in one pool of ``job.case.threads``."""
    import onnxruntime as ort

    dtype = DTYPES[job.case.dtype]
    given = Prepared(module, dtype).fit(network.inputs(job.case.batch))
    path = job.folder / "network.onnx"
    notes = [export(Plain(network, module.to(dtype)), given, path)]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = job.case.threads
    options.inter_op_num_threads = 1
    # Threads that spin for work after a call would slow down the next peer.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        arrays = (value.numpy() for value in inputs)
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return Prepared(call, dtype, notes=notes)


def export(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> str:
    """Write ONNX, by torch's newer exporter if onnxscript is installed; return which one ran."""
    dynamo = importlib.util.find_spec("onnxscript") is not None
    names = list(NAMES[: len(inputs)])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, inputs, path, input_names=names, output_names=["y"], dynamo=dynamo
        )
    return "torch.export" if dynamo else "traced: onnxscript is not installed"


def openvino(job: Job, network: Network, module: nn.Module) -> Prepared:
    """A model compiled for latency; inputs and outputs are float32 for any dtype of computation."""
    inputs = network.inputs(job.case.batch)
    call, notes = openvino_model(Plain(network, module), inputs, job.case)
    return Prepared(call, torch.float32, notes=notes)


def openvino_model(
    module: nn.Module, inputs: tuple[Tensor, ...], case: Case
) -> tuple[Callable[..., Tensor], list[str]]:
    """A module of one output compiled by OpenVINO for latency.

    Args:
        module: in float32.
        inputs: of the shapes that it is compiled for.
        case: its dtype is that of computation; inputs and the output stay as they are.

    Returns:
        The compiled model, whose next call overwrites its output, and remarks for the report.
    """
    import openvino as ov

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = [list(value.shape) for value in inputs]
        converted = ov.convert_model(module, example_input=inputs, input=shapes)
    wanted = {"float32": "f32", "bfloat16": "bf16"}[case.dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": case.threads,
        "INFERENCE_PRECISION_HINT": wanted,
    }
    compiled = ov.Core().compile_model(converted, "CPU", settings)
    request = compiled.create_infer_request()
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    notes = [] if precision == wanted else [f"computes in {precision}, {wanted} is not native"]

    def call(*given: Tensor) -> Tensor:
        arrays = [value.numpy() for value in given]
        outputs = request.infer(arrays, share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0])

    return call, notes
