"""The audit of the GPU kernels: its parts, and that it finds defects that were put in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.audit import __main__ as audit
from tools.audit import cuda_kernels, measured, ptx, report, sass
from tools.audit.occupancy import blocks, occupancy
from tools.build import cuda
from tools.build.common import ROOT

HERE = Path(__file__).resolve().parent


def run(*command, interpret=False, **environment):
    """A command in a process that compiles, or one that interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), **environment}
    environment["PYTHONPATH"] = str(ROOT)  # where tools is
    command = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def needs_disassembler():
    for name in ("cuobjdump", "nvdisasm"):
        try:
            sass.tool(name)
        except sass.NotCheckedError as reason:
            pytest.skip(str(reason))


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "wanted"),
    [  # by cuda_occupancy.h of CUDA 13
        pytest.param(90, 32, 16, 1, 32, id="blocks"),
        pytest.param(90, 256, 32, 0, 8, id="threads"),
        pytest.param(90, 256, 64, 0, 4, id="registers"),
        pytest.param(90, 96, 100, 0, 5, id="registers of quarters"),
        pytest.param(90, 128, 168, 0, 3, id="registers of a warp are rounded up"),
        pytest.param(90, 1024, 65, 0, 0, id="too many registers"),
        pytest.param(80, 256, 40, 49152, 3, id="shared memory, sm_80"),
        pytest.param(90, 256, 40, 49152, 4, id="shared memory, sm_90"),
        pytest.param(100, 192, 72, 33000, 4, id="threads not a power of two, sm_100"),
        pytest.param(80, 512, 32, 166912, 1, id="all shared memory, sm_80"),
        pytest.param(80, 512, 32, 166913, 0, id="more than all, sm_80"),
        pytest.param(100, 512, 32, 232448, 1, id="all shared memory, sm_100"),
    ],
)
def test_blocks_of_an_sm_are_those_of_nvidias_calculator(arch, threads, registers, shared, wanted):
    assert blocks(arch, threads, registers, shared) == wanted


def test_occupancy_is_the_part_of_an_sms_warps():
    assert occupancy(90, 256, 64, 0) == 0.5
    assert occupancy(80, 1024, 65, 0) == 0


def test_machine_code_gives_widths_and_spills():
    loads, stores, local = sass.accesses(
        """
        /*0470*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0480*/                   LDG.E.U16 R2, [R2.64] ;
        /*0490*/                   LDG.E R2, desc[UR4][R2.64+0x10] ;
        /*04a0*/             @UP0 LDG.E.64.CONSTANT R2, desc[UR4][R2.64] ;
        /*04b0*/                   LDGSTS.E.BYPASS.128 [R9], [R4.64] ;
        /*04c0*/                   LDS.128 R4, [R2] ;
        /*04d0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*04e0*/                   STL.64 [R1+0x8], R4 ;
        /*12340*/                  LDL R4, [R1] ;
        """
    )
    assert loads == {128: 2, 16: 1, 32: 1, 64: 1}
    assert stores == {128: 1}
    assert local == 2


PTX = """
.visible .entry _kernel(
    .param .u64 .ptr .global .align 1 _kernel_param_0,
    .param .u64 .ptr .global .align 1 _kernel_param_1,
    .param .u32 _kernel_param_2,
    .param .u64 .ptr .global .align 1 _kernel_param_3,
    .param .u64 _kernel_param_4
)
.reqntid 128
{
    ld.param.b64    %rd1, [_kernel_param_0];
    ld.param.b64    %rd2, [_kernel_param_1];
    ld.param.b64    %rd3, [_kernel_param_3];
    ld.param.b64    %rd9, [_kernel_param_4];
    mad.wide.s32    %rd4, %r1, 2, %rd1;
    add.s64         %rd4, %rd4, %rd9;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
    ld.global.b64   { %rd5 }, [ %rd3 + 0 ];
    add.s64         %rd6, %rd5, 64;
    ld.global.L1::evict_first.v2.b32 { %r6, %r7 }, [ %rd6 + 0 ];
    selp.b64        %rd7, %rd4, %rd2, %p2;
    @%p3 st.global.b16 [ %rd7 + 8 ], { %rs1 };
    st.shared.v4.b32 [ %r9 ], { %r2, %r3, %r4, %r5 };
}
"""


def test_ptx_gives_the_arguments_that_are_accessed():
    found = ptx.widths(PTX, {0, 1, 3})
    assert found == {
        0: ptx.Widths(loads={128}, stores={16}),  # the store goes to one of two
        1: ptx.Widths(loads=set(), stores={16}),
        3: ptx.Widths(loads={64}, stores=set()),  # the table, and what it has the address of
    }


def test_ptx_without_a_pointer_is_reported_as_unknown():
    assert ptx.widths(PTX, {0, 1})[None] == ptx.Widths(loads={64}, stores=set())


def a_kernel(**numbers):
    defaults = {
        "language": "cuda", "operation": "op", "kernel": "k", "arch": 90,
        "configuration": "float, 4", "threads": 256, "registers": 32, "shared": 0, "stack": 0,
        "spills": 0, "load": 128, "store": 128,
    }  # fmt: skip
    return measured.Measured(**{**defaults, **numbers})


def test_a_cuda_kernel_needs_one_wide_instance_for_each_type():
    narrow = a_kernel(configuration="float, 1", load=32, store=32)
    assert measured.problems([narrow, a_kernel()]) == []
    (problem,) = measured.problems([a_kernel(), a_kernel(configuration="__half, 8", store=16)])
    assert "<__half>" in problem
    assert "widest store has 16 bits" in problem


def test_the_worst_of_the_configurations_is_shown():
    (shown,) = report.worst([a_kernel(), a_kernel(registers=128), a_kernel(stack=8)])
    assert (shown.registers, shown.stack, shown.occupancy, shown.cases) == (128, 8, 0.25, 3)
    text = report.tables([a_kernel(registers=128)], [], every=False, markdown=True)
    assert text.splitlines()[0].startswith("| operation | kernel |")
    assert "| 25% |" in text.splitlines()[2]


def test_the_tables_are_kept_for_the_documentation(tmp_path):
    audit._keep(tmp_path, *report.rows([a_kernel(registers=128)], []))
    kept = json.loads((tmp_path / "gpu_audit.json").read_text(encoding="utf-8"))
    assert kept["machines"][0]["versions"]["torch"]
    head, kernel = kept["kernels"]
    assert dict(zip(head, kernel, strict=True))["occupancy"] == "25%"
    assert kept["bytes"] == [list(report._BYTES)]


@pytest.mark.usefixtures("needs_disassembler")
def test_seeded_defects_of_triton_kernels_are_found():
    done = run(str(HERE / "seeded_kernels.py"))
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    sound = next(one for one in found["kernels"] if one["operation"] == "sound")
    assert (sound["load"], sound["store"], sound["stack"], sound["spills"]) == (128, 128, 0, 0)
    about = {name: [text for text in found["problems"] if f" {name} " in text] for name in (
        "sound", "scalar_store", "spills", "reads_twice", "touches_nothing",
    )}  # fmt: skip
    assert about["sound"] == about["reads_twice"] == []
    assert "store of out: 32 bits" in about["scalar_store"][0]
    assert "bytes of local memory" in about["spills"][0]
    assert "touches no activation" in about["touches_nothing"][0]


def test_an_activation_that_is_read_twice_is_found():
    done = run(str(HERE / "seeded_kernels.py"), interpret=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sound, twice = found["sound"], found["reads_twice"]
    assert sound["read"] == sound["written"] == sound["unit"] == 2 * 16 * 32 * 32 * 4
    assert sound["problem"] is None
    assert twice["read"] == 2 * twice["unit"]
    assert "moves 3.00 S, the least is 2.00 S" in twice["problem"]


CUDA = """
template <class T, int N> struct alignas(sizeof(T) * N) Pack { T value[N]; };
namespace fastdiff::cuda { namespace {
template <class T, int N> __global__ void __launch_bounds__(128) wide(const T* x, T* y) {
  __shared__ T held[256];
  reinterpret_cast<Pack<T, N>*>(held)[threadIdx.x % 32] =
      reinterpret_cast<const Pack<T, N>*>(x)[threadIdx.x];
  __syncthreads();
  reinterpret_cast<Pack<T, N>*>(y)[threadIdx.x] =
      reinterpret_cast<Pack<T, N>*>(held)[threadIdx.x % 32 ^ 1];
}
__global__ void narrow(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void local(const float4* x, float4* y, const int* order, int n) {
  float4 held[64];
  for (int i = 0; i < n; ++i) held[order[i]] = x[i * 32 + threadIdx.x];
  for (int i = 0; i < n; ++i) y[i * 32 + threadIdx.x] = held[i];
}
}}
void start() {
  fastdiff::cuda::wide<float, 4><<<1, 128>>>(nullptr, nullptr);
  fastdiff::cuda::wide<float, 1><<<1, 128>>>(nullptr, nullptr);
  fastdiff::cuda::narrow<<<1, 32>>>(nullptr, nullptr);
  fastdiff::cuda::local<<<1, 32>>>(nullptr, nullptr, nullptr, 64);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.usefixtures("needs_disassembler")
def test_seeded_defects_of_cuda_kernels_are_found(tmp_path):
    source, made = tmp_path / "seeded.cu", tmp_path / "seeded.cu.o"
    source.write_text(CUDA)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    subprocess.run(["nvcc", *targets, "-c", source, "-o", made], check=True)
    found = cuda_kernels.measure(cuda_kernels.Unit(made, "seeded", 90))
    wide = next(one for one in found if one.configuration == "float, 4")
    assert (wide.kernel, wide.threads, wide.shared) == ("wide", 128, 1024)
    assert (wide.load, wide.store, wide.stack, wide.spills) == (128, 128, 0, 0)
    problems = measured.problems(found)
    assert len(problems) == 3
    assert "seeded local sm_90: 1024 bytes of local memory" in problems[0]
    assert all("seeded narrow sm_90" in text for text in problems[1:])


@pytest.mark.usefixtures("needs_disassembler")
def test_the_kernels_of_an_operation_pass():
    options = ["--ops", "q_sample", "--archs", "90", "--no-cuda", "--json"]
    done = run("-m", "tools.audit", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert {one["arch"] for one in found["kernels"]} == {90}
    assert {one["operation"] for one in found["traffic"]} == {"q_sample"}


def test_what_cannot_be_checked_is_said_and_is_not_a_success(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    cuda.toolkit.cache_clear()
    assert audit.main(["--no-bytes", "--ops", "q_sample"]) == 2
    said = capsys.readouterr().err
    assert "Triton kernels: not checked, TRITON_INTERPRET is set" in said
    assert "CUDA kernels: not checked, nvcc was not found (tried /nowhere/bin/nvcc)" in said
    cuda.toolkit.cache_clear()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ops", "group_norm"], "'group_norm' is none of group_norm_silu, "),
        (["--archs", "75"], "'75' is none of 80, 90, 100"),
        (["--json", "--markdown"], "not allowed with"),
    ],
)
def test_a_wrong_option_is_refused(options, said, capsys):
    with pytest.raises(SystemExit) as refused:
        audit.main(options)
    assert refused.value.code == 2
    assert said in capsys.readouterr().err
