"""Every kernel compiles for the GPUs it is made for, by NVIDIA's own compiler, within what its author planned of the machine.

No GPU is needed. What a kernel takes of registers and shared memory decides how many blocks a multiprocessor runs at a time, so more
than planned is a loss of speed that no other test without a GPU would see. python tests/nvrtc.py FILE -DNAME=VALUE prints a kernel's figures.
"""
import itertools
from dataclasses import dataclass, field

import nvrtc
import pytest

from tinyllm.kernels.cuda import attention, launch

pytestmark = [
    pytest.mark.cuda_on_cpu,
    pytest.mark.skipif(nvrtc.library_path() is None, reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc"),
]


@dataclass(frozen=True)
class Budget:
    """What the kernels of one file may take, in some of its variants.

    file : without .cu.
    kernels : by name, registers a thread at most, and bytes of static shared memory a block at most.
    macros : the values that each macro may have; every combination is compiled.
    dynamic : bytes of dynamic shared memory that a launch asks for at most, by kernel.
    Nothing may spill registers to memory.
    """
    file: str
    kernels: dict[str, tuple[int, int]]
    macros: dict[str, tuple] = field(default_factory=lambda: {"FORMAT": ("FP32", "FP16", "BF16")})
    dynamic: dict[str, int] = field(default_factory=dict)

    def variants(self) -> list[dict]:
        return [dict(zip(self.macros, values, strict=True)) for values in itertools.product(*self.macros.values())]


ATTENTION = [(format, width, documents) for format in ("BF16", "FP16") for width in attention.TILES for documents in (False, True)]      # two blocks of 128 threads a multiprocessor: 255 registers

BUDGETS = (
    Budget("activations", dict(plain_forward=(32, 0), plain_backward=(40, 0), gated_forward=(40, 0), gated_backward=(48, 0)),
           dict(ACTIVATION=("GELU_TANH", "GELU", "SILU", "RELU", "RELU2"), FORMAT=("FP32", "FP16", "BF16"))),
    Budget("adamw", {"squares": (32, 2048), "total": (32, 2048), "decide": (40, 0), "adamw": (48, 0)}),  # 5 blocks of 256 on an SM
    *(Budget("attention", {"attention_forward": (255, 0)}, {name: (value,) for name, value in attention.macros(format, width, documents).items()},
             {"attention_forward": attention.TILES[width].forward_shared(width)}) for format, width, documents in ATTENTION),
    *(Budget("attention_backward",
             {"attention_statistics": (40, 0), "attention_backward_keys": (255, 0), "attention_convert": (40, 0), "attention_backward_queries": (255, 0)},
             {name: (value,) for name, value in attention.macros(format, width, documents).items()},
             {"attention_backward_keys": attention.TILES[width].keys_shared(width),
              "attention_backward_queries": attention.TILES[width].queries_shared(width)}) for format, width, documents in ATTENTION),
    Budget("cross_entropy", {"cross_entropy": (32, 128)}, dict(FORMAT=("FP32",), WIDTH=(1, 4))),  # 2 blocks of 1024 on an SM
    Budget("cross_entropy", {"cross_entropy": (32, 128)}, dict(FORMAT=("FP16", "BF16"), WIDTH=(1, 8))),
    Budget(
        "decode",  # one text: five blocks to a processor
        {"embed": (32, 0), "normed_products": (96, 32), "active_products": (96, 32), "added_products": (96, 32)},
        {"FORMAT": ("BF16",), "WIDE": (8,), "BATCH": (1,), "HEAD_WIDTH": (64,)},
        dict.fromkeys(("normed_products", "active_products", "added_products"), 96 * 1024),
    ),
    Budget(
        "decode",  # more texts: three blocks
        {"embed": (32, 0), "normed_products": (136, 512), "active_products": (136, 512), "added_products": (136, 512)},
        {"FORMAT": ("BF16",), "WIDE": (8,), "BATCH": (4, 8), "HEAD_WIDTH": (128,)},
        dict.fromkeys(("normed_products", "active_products", "added_products"), 96 * 1024),
    ),
    Budget(
        "decode",  # fp32; and numbers that are loaded one by one
        {"embed": (32, 0), "normed_products": (128, 512), "active_products": (128, 512), "added_products": (128, 512)},
        {"FORMAT": ("FP32",), "WIDE": (1, 4), "BATCH": (8,), "HEAD_WIDTH": (64,)},
        dict.fromkeys(("normed_products", "active_products", "added_products"), 96 * 1024),
    ),
    Budget("decode_attention", {"attend": (168, 8320), "merge": (40, 0)}, {"FORMAT": ("FP16", "BF16"), "WIDE": (8,), "HEAD_WIDTH": (128,), "SHARE": (1, 4)}),
    Budget("decode_attention", {"attend": (128, 4224), "merge": (40, 0)}, {"FORMAT": ("FP32",), "WIDE": (1, 4), "HEAD_WIDTH": (64,), "SHARE": (4,)}),
    Budget("embedding", dict(sum_chunks=(48, 0), join_chunks=(32, 0))),
    Budget("norms", dict(norm_forward=(72, 0), norm_backward=(168, 12288)),  # a warp a row: three blocks of 128 threads on a multiprocessor
           dict(FORMAT=("FP16", "BF16"), WIDTH=(768, 1024), VEC=(8,), WARPS=(1,), CENTRE=(0, 1))),
    Budget("norms", dict(norm_forward=(72, 0), norm_backward=(240, 12288)), dict(WIDTH=(1024,), VEC=(4,), WARPS=(1,), CENTRE=(0, 1))),
    Budget("norms", dict(norm_forward=(72, 0), norm_backward=(240, 12288)),
           dict(FORMAT=("FP32", "BF16"), WIDTH=(1023,), VEC=(1,), WARPS=(1,), CENTRE=(1,))),
    Budget("norms", dict(norm_forward=(64, 128), norm_backward=(64, 33024)),  # a block a row, up to 1024 threads
           dict(FORMAT=("FP32", "BF16"), WIDTH=(8192,), VEC=(4,), WARPS=(32,), CENTRE=(0, 1))),
    Budget("norms", dict(norm_forward=(64, 128), norm_backward=(64, 33024)),
           dict(FORMAT=("FP32", "BF16"), WIDTH=(8191,), VEC=(1,), WARPS=(32,), CENTRE=(1,))),
    Budget("rope", dict(turn=(40, 0)), dict(FORMAT=("FP16", "BF16"), WIDTH=(64, 128), VEC=(8,), INTERLEAVED=(0, 1))),
    Budget("rope", dict(turn=(40, 0)), dict(WIDTH=(6, 64), VEC=(1,), INTERLEAVED=(0, 1))),
    Budget("sums", dict(column_parts=(40, 8192), add_parts=(32, 2048))),
)

VARIANTS = [pytest.param(budget, variant, id="-".join([budget.file, *map(str, variant.values())]))
            for budget in BUDGETS for variant in budget.variants()]
SHARED_OF_A_BLOCK = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


def test_every_file_has_a_budget():
    assert {path.stem for path in launch.FOLDER.glob("*.cu")} == {budget.file for budget in BUDGETS}


def test_sources_are_ascii():
    """CuPy writes them to a file in the encoding of the locale, which on Windows, say, lacks most of the signs in their comments."""
    assert all(launch.source(budget.file).isascii() for budget in BUDGETS)


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("budget, variant", VARIANTS)
def test_compiles_within_its_budget(budget, variant, architecture):
    uses = nvrtc.compile(launch.source(budget.file), launch.definitions(variant), architecture)
    assert set(uses) == set(budget.kernels)
    for name, use in uses.items():
        registers, shared = budget.kernels[name]
        assert use.registers <= registers and use.shared <= shared, f"{name} takes {use}"
        assert use.spills == 0, f"{name} spills: {use}"
        assert use.shared + budget.dynamic.get(name, 0) <= SHARED_OF_A_BLOCK[architecture]


def test_the_compilers_report_is_read():
    source = (launch.FOLDER / "prelude.cuh").read_text(encoding="utf-8") + """
        extern "C" __global__ void plain(float* x) { __shared__ float s[32]; x[threadIdx.x] = block_sum(x[threadIdx.x], s); }
        extern "C" __global__ void __launch_bounds__(1024, 2) crowded(const float* x, float* y) {      // 32 registers are too few for this
            float a[64];
            for (int i = 0; i < 64; i++) a[i] = x[i * 1024 + threadIdx.x];
            for (int k = 0; k < 64; k++) {
                float s = 0;
                for (int i = 0; i < 64; i++) s += a[i] * a[(i * k) % 64];
                y[k * 1024 + threadIdx.x] = s;
            }
        }"""
    uses = nvrtc.compile(source)
    assert set(uses) == {"plain", "crowded"}
    assert 0 < uses["plain"].registers <= 32 and uses["plain"].shared == 128 and uses["plain"].spills == 0
    assert uses["crowded"].spills > 0


def test_the_compilers_messages_arrive():
    with pytest.raises(nvrtc.CompileError, match='identifier "nonsense" is undefined'):
        nvrtc.compile('extern "C" __global__ void test(float* x) { x[0] = nonsense; }')
