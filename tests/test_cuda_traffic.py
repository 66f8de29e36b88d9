"""Does the emulator count sectors and bank conflicts as a GPU has them? Cases whose counts are known."""
import fake_cupy
import numpy as np
import pytest
from cuda_on_cpu import traffic

from tinyllm.kernels.cuda import launch

pytestmark = pytest.mark.cuda_on_cpu

PRELUDE = (launch.FOLDER / "prelude.cuh").read_text(encoding="utf-8")


def lines(body, *, block=32, grid=1, parameters="const float* x, float* y"):
    """The traffic of a kernel with this body, on arrays that begin at a sector's border. Lines by (memory, what)."""
    source = f'{PRELUDE}extern "C" __global__ void test({parameters}) {{ const int i = threadIdx.x; {body} }}'
    function = fake_cupy.RawModule(code=source).get_function("test")
    moved = traffic(lambda: function((grid,), (block,), (fake_cupy.zeros(4096, np.float32), fake_cupy.zeros(4096, np.float32))))
    return {(line.memory, line.what): (line.requests, line.units, line.ideal) for line in moved.lines}, moved


@pytest.mark.parametrize("index, units, read", [
    ("i", 4, 128), ("31 - i", 4, 128), ("0", 1, 32), ("i + 1", 5, 160), ("2 * i", 8, 256), ("8 * i", 32, 1024)])
def test_sectors_of_global_memory(index, units, read):
    found, moved = lines(f"y[i] = x[{index}];")
    assert found["global", "read"] == (1, units, 1 if index == "0" else 4)
    assert found["global", "write"] == (1, 4, 4)
    assert (moved.read, moved.written) == (read, 128)
    assert moved.beyond_ideal("global") == units - (1 if index == "0" else 4)


def test_a_warp_is_a_request_each_time():
    found, moved = lines("for (int k = 0; k < 3; k++) y[k * 128 + i + blockIdx.x * 64] = x[i];", block=64, grid=2)
    assert found["global", "read"] == (12, 48, 48) and found["global", "write"] == (12, 48, 48)
    assert (moved.read, moved.written) == (256, 3 * 512)      # the same 64 numbers, read again and again


@pytest.mark.parametrize("index, passes", [("i", 1), ("2 * i", 2), ("33 * i", 1), ("32 * i", 32), ("4 * i", 4)])
def test_banks_of_shared_memory(index, passes):
    found, moved = lines(f"__shared__ float tile[1100]; tile[{index}] = 1; __syncwarp(); y[i] = tile[{index}];")
    assert found["shared", "write"] == found["shared", "read"] == (1, passes, 1)
    assert moved.beyond_ideal("shared") == 2 * (passes - 1)


@pytest.mark.parametrize("index", ["0", "i / 2", "32 * (i / 16) + i % 16"])
def test_lanes_that_want_the_same_word_get_it_together(index):
    found, _ = lines(f"__shared__ float tile[64]; tile[i] = tile[i + 32] = 1; __syncwarp(); y[i] = tile[{index}];")
    assert found["shared", "read"] == (1, 2 if "32" in index else 1, 1)


def test_vectors_go_in_quarters_of_a_warp():
    found, _ = lines("__shared__ __align__(16) float tile[4096]; *(float4*)(tile + 4 * i) = *(const float4*)(x + 4 * i);")
    assert found["global", "read"] == (1, 16, 16) and found["shared", "write"] == (1, 4, 4)
    found, _ = lines("__shared__ __align__(16) float tile[4096]; *(float4*)(tile + 32 * i) = *(const float4*)(x + 4 * i);")
    assert found["shared", "write"] == (1, 32, 4)      # eight lanes of a quarter meet in the same four banks


@pytest.mark.parametrize("pitch, passes", [(64, 32), (72, 4)])
def test_matrices_of_padded_rows_have_no_conflicts(pitch, passes):
    found, moved = lines(f"""__shared__ __align__(16) half_number tile[32 * {pitch}];
        copy_async16(tile + {pitch} * i, x + 4 * i, true); copy_commit(); copy_wait<0>(); __syncwarp();
        unsigned r[4]; load_matrix_x4(r, tile + {pitch} * i); y[i] = r[0] + r[1] + r[2] + r[3];""")
    assert found["shared", "ldmatrix"] == (1, passes, 4) and found["shared", "asynchronous copy"] == (1, passes, 4)
    assert found["global", "read"] == (1, 16, 16)
    assert "ldmatrix" in str(moved) and "read 512 bytes, written 128 bytes" in str(moved)


def test_an_atomic_operation_counts_once():
    found, moved = lines("atomicAdd(y + 2 * i, x[i]);")
    assert found["global", "atomic"] == (1, 8, 4)
    assert (moved.read, moved.written) == (128 + 256, 256)


def test_a_line_that_was_multiplied_is_one_line():
    _, moved = lines("if (x[i] != 7) y[i] = x[i]; else y[i] = 2 * x[i] + y[i + 32];")
    assert len({(line.where, line.what) for line in moved.lines}) == len(moved.lines)


def test_vectors_are_read_and_written_whole():
    found, _ = lines("""const float4 a = *(const float4*)(x + 4 * i);
        Vec b; for (int k = 0; k < VEC; k++) b.at[k] = 2 * a.x + k; *(Vec*)(y + 4 * i) = b;""")
    assert found["global", "read"] == found["global", "write"] == (1, 16, 16)


def test_without_asking_nothing_is_counted():
    function = fake_cupy.RawModule(code=PRELUDE + 'extern "C" __global__ void test(float* y) { y[threadIdx.x] = 1; }').get_function("test")
    y = fake_cupy.zeros(32, np.float32)
    function((1,), (32,), (y,))
    once = traffic(lambda: function((1,), (32,), (y,)))
    assert once.written == 128 and [line.requests for line in once.lines] == [1]
