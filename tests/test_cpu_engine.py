"""The C++ library: that it is there, says what it does, can be told, and can be done without."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from comparing import assert_same_bits, make_params, run
from conftest import LIBRARY, ROOT, needs_library

import fused_l2
from fused_l2.engines import cpu, watch


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=os.path.expanduser("~"),
    )


def test_the_library_is_built():
    """Without a compiler an install goes through, but then most tests are skipped: that must not look green."""
    if os.environ.get("FUSED_L2_CPP") == "0":
        pytest.skip("FUSED_L2_CPP=0 asks for an install without the C++ library")
    assert LIBRARY is not None, cpu.why_unavailable()


@needs_library
def test_capabilities_tell_engine_instruction_set_and_threads(threads):
    told = fused_l2.capabilities()
    assert told["cpu"].engine == f"C++ ({LIBRARY.capability})"
    assert f"{threads} thread" in told["cpu"].reason
    assert told["xpu"].engine == "plain PyTorch"
    assert [line.split()[0] for line in str(told).splitlines()] == ["cpu", "cuda", "other"]


@needs_library
def test_threads_and_tensor_accessors_of_torch_were_found():
    assert LIBRARY.has_threads
    assert LIBRARY.has_tensors
    assert isinstance(watch.make_look(), watch.NativeLook)


def test_without_the_library_steps_are_right_and_one_warning_says_why(tmp_path):
    """The installed Python files alone, as after an install without a compiler."""
    shutil.copytree(
        Path(fused_l2.__file__).parent, tmp_path / "fused_l2", ignore=shutil.ignore_patterns("*.so", "*.dylib", "*.dll")
    )
    code = """
import warnings, torch, fused_l2
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("SGD", "AdamW"):
        results = []
        for module in (fused_l2, torch.optim):
            p = torch.nn.Parameter(torch.linspace(-1, 1, 100))
            optimizer = getattr(module, name)([p], lr=0.1, weight_decay=0.1)
            for step in range(5):
                p.grad = torch.sin(torch.arange(100.0) + step)
                optimizer.step()
            results.append(p.detach())
        assert torch.equal(*results), name
ours = [str(w.message) for w in caught if "fused_l2" in str(w.message)]
print(len(ours), ours[0])
print(fused_l2.capabilities())
print(fused_l2.weight_decay.penalty([{"params": [torch.nn.Parameter(torch.ones(4))], "weight_decay": 1.0}]))
"""
    done = python(code, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 fused_l2 steps CPU tensors with plain PyTorch operations")
    assert "Install a C++17 compiler" in done.stdout
    assert "cpu            plain PyTorch" in done.stdout
    assert done.stdout.rstrip().endswith("2.0")


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "layout", lambda: "columns of another version")
    with pytest.raises(OSError, match="built from other sources"):
        cpu.Library(Path(fused_l2.__file__).parent / cpu._FILE)


def test_other_devices_take_plain_pytorch_with_one_warning():
    from fused_l2 import engines

    engines._warned.clear()
    p = torch.nn.Parameter(torch.zeros(3, device="meta"))
    p.grad = torch.zeros(3, device="meta")
    optimizer = fused_l2.SGD([p], lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="fused_l2 steps meta tensors with plain PyTorch operations"):
        optimizer.step()
    optimizer.param_groups[0]["nesterov"] = True
    optimizer.step()  # a new plan, and no second warning: warnings are errors here


@needs_library
def test_the_plain_way_of_watching_agrees(monkeypatch):
    """Where torch lacks the accessors, the Python way has to notice the same things."""
    monkeypatch.setattr(watch, "_plain_keys", lambda library: 0)
    assert type(watch.make_look()) is watch.Look
    expected, params = make_params((5, 40)), make_params((5, 40))
    run(lambda p: fused_l2.AdamW(p, lr=0.1), expected, 4)
    optimizer = run(lambda p: fused_l2.AdamW(p, lr=0.1), params, 2)
    params[0].data = params[0].data.clone()
    optimizer.state[params[1]]["exp_avg"].data = optimizer.state[params[1]]["exp_avg"].clone()
    for step in (2, 3):
        from comparing import set_grads

        set_grads(params, step)
        params[1].grad = torch.stack([params[1].grad] * 2, -1)[..., 0]
        optimizer.step()
    assert_same_bits(params, expected)


@pytest.mark.sweep
def test_fuzz_of_the_kernels_without_torch(tmp_path):
    """tests/fuzz_kernels.cpp, here without sanitizers (`make sanitize` runs it with them)."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [
        *(ROOT / "csrc" / f"{n}.cpp" for n in ("adam", "capability", "norms", "parallel", "sgd", "statistics", "steps")),
        ROOT / "tests" / "fuzz_kernels.cpp",
    ]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-w", f"-I{ROOT / 'csrc'}", "-pthread"]

    def compiled(source: Path) -> str:
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")], check=True)
        return str(tmp_path / f"{source.stem}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler, *objects, "-pthread", "-o", str(tmp_path / "fuzz")], check=True)
    done = subprocess.run([str(tmp_path / "fuzz"), "2000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2000 rounds, no difference" in done.stdout


def test_declarations_of_torchs_functions_match_its_headers(tmp_path):
    """csrc/torch_abi.h declares by hand what torch's stable C ABI declares: compile the two against each other."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    headers = Path(torch.__file__).parent / "include"
    if compiler is None or not (headers / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip("no C++ compiler, or a torch without headers")
    names = {
        "parallel_for": "torch_parallel_for", "num_threads": "torch_get_num_threads", "get_data_ptr": "aoti_torch_get_data_ptr",
        "get_storage_size": "aoti_torch_get_storage_size", "get_dim": "aoti_torch_get_dim", "get_sizes": "aoti_torch_get_sizes",
        "get_strides": "aoti_torch_get_strides", "get_dtype": "aoti_torch_get_dtype",
        "get_device_index": "aoti_torch_get_device_index", "get_storage_offset": "aoti_torch_get_storage_offset",
        "dtype_element_size": "aoti_torch_dtype_element_size", "delete_tensor_object": "aoti_torch_delete_tensor_object",
    }  # fmt: skip
    members = set((ROOT / "csrc/torch_abi.h").read_text().replace("(*", "\0").split("\0")[1:])
    assert {m.split(")")[0] for m in members if m[0].islower()} - {""} >= set(names)
    checks = "\n".join(
        f"static_assert(same<decltype(fused_l2::TorchAbi::{ours}), decltype(&{theirs})>);" for ours, theirs in names.items()
    )
    source = tmp_path / "check.cpp"
    # A tensor handle is a pointer to an opaque struct there and void* here: both are passed alike.
    source.write_text(f"""
#include <type_traits>
#include <torch/csrc/stable/c/shim.h>
#include "torch_abi.h"
template <class T> struct plain {{ using type = T; }};
template <> struct plain<AtenTensorHandle> {{ using type = void*; }};
template <class F> struct signature;
template <class R, class... A> struct signature<R (*)(A...)> {{ using type = R (*)(typename plain<A>::type...); }};
template <class A, class B>
constexpr bool same = std::is_same_v<typename signature<A>::type, typename signature<B>::type>;
{checks}
""")
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{headers}", f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_small_steps_stop_waiting_for_cores_that_are_busy(tmp_path):
    """csrc/patience.h: of steps whose second thread was waited for in vain fewer and fewer are shared out; once one was worth
    it they are again, and never does a step cost more than one wait in 16."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "patience.cpp"
    program.write_text("""
#include <cstdio>
#include "patience.h"
int main() {
  fused_l2::Patience patience;
  for (int step = 0; step < 40000; ++step) {
    const bool busy = (step >= 100 && step < 20000) || step >= 39000;
    const bool shares = patience.shares();
    if (shares) patience.learn(busy);
    std::putchar(shares ? '1' : '0');
  }
}
""")
    executable = tmp_path / "patience"
    subprocess.run([compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", str(program), "-o", str(executable)], check=True)
    shared = subprocess.run([str(executable)], check=True, capture_output=True, text=True).stdout
    assert shared[:100] == "1" * 100  # idle
    busy = [step for step in range(100, 20000) if shared[step] == "1"]
    apart = [b - a for a, b in pairwise(busy)]
    assert apart[0] == 17
    assert all(b == min(2 * (a - 1), 4096) + 1 for a, b in pairwise(apart))
    assert shared[20000:].index("1") <= 4096  # then one finds out that cores are free again
    assert shared[25000:39000] == "1" * 14000
    assert shared[39000:39018] == "1" + "0" * 16 + "1"  # what was learned is forgotten


# Two "threads" that are the caller's, as torch.get_num_threads and torch's pool would be. What is shared out is counted; each
# call works for 20 ms, and then waits as long as it is told to.
POOL = r"""
#include <chrono>
#include <cstdint>
#include <thread>
extern "C" {
int calls = 0, milliseconds = 0;
static void pause(int duration) { std::this_thread::sleep_for(std::chrono::milliseconds(duration)); }
int torch_get_num_threads(uint32_t* count) { return *count = 2, 0; }
int torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  ++calls;
  pause(20);
  for (int64_t i = begin; i < end; ++i) f(i, i + 1, context);
  pause(milliseconds);
  return 0;
}
}
"""
COUNTED = r"""
import ctypes, os, sys, torch, fused_l2
from fused_l2.engines import cpu

pool = ctypes.CDLL(sys.argv[1])
assert cpu.library()._short.fused_l2_connect(os.fsencode(sys.argv[1])) == 3
calls, milliseconds = (ctypes.c_int.in_dll(pool, name) for name in ("calls", "milliseconds"))

def parameter():
    p = torch.nn.Parameter(torch.ones(50_000))
    p.grad = torch.ones(50_000)
    return p

def shared(f):
    before = calls.value
    f()
    return calls.value - before

plain, measured = fused_l2.SGD([parameter()], lr=0.1), fused_l2.SGD([parameter()], lr=0.1, statistics=True)
plain.step(), measured.step()
tensors = [torch.ones(50_000)]
norms = lambda: cpu.library().sums_of_squares(tensors, [0])
assert shared(norms) == 1 and shared(plain.step) == 1 and shared(measured.step) == 1
milliseconds.value = 300
assert shared(norms) == 1
milliseconds.value = 0
assert [shared(norms) for _ in range(17)] == [0] * 16 + [1]
assert shared(plain.step) == 1 and shared(measured.step) == 1
milliseconds.value = 300
assert shared(measured.step) == 1
milliseconds.value = 0
assert shared(plain.step) == 0 and shared(measured.step) == 0 and shared(norms) == 1
"""


@needs_library
def test_norms_and_steps_find_out_by_themselves_whether_a_second_thread_is_worth_its_wait(tmp_path):
    """Norms that waited in vain are made by the caller, while steps, with statistics or without, are still shared out; and
    the other way round. A wait of 0.3 s stands against 20 ms of work, none against 20 ms."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if compiler is None or not torch_library.exists():
        pytest.skip("no C++ compiler, or not Linux")
    source, built = tmp_path / "pool.cpp", tmp_path / "libpool.so"
    source.write_text(POOL)
    # Linked with torch: what is not found in this library is found there.
    linked = ["-Wl,--no-as-needed", str(torch_library), f"-Wl,-rpath,{torch_library.parent}", "-Wl,--allow-shlib-undefined"]
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", str(source), *linked, "-o", str(built)], check=True)
    done = subprocess.run([sys.executable, "-c", COUNTED, str(built)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


KERNELS = r"""
#define FUSED_L2_KERNELS "multi_tensor.h"
#include "foreach_capability.h"
#include <cstdio>
#include <initializer_list>
#include <string>
using namespace fused_l2;

std::string name(float) { return "float32"; }
std::string name(double) { return "float64"; }
std::string name(BFloat16) { return "bfloat16"; }
std::string name(Float16) { return "float16"; }

#define PRINT(capability)                                                                                          \
  struct Of_##capability {                                                                                         \
    static std::string state(capability::EightBit) { return "8bit"; }                                              \
    template <class S> static std::string state(S x) { return name(x); }                                           \
    static std::string kernel(const Piece& piece) {                                                                \
      if (capability::is_staged(piece)) return "staged";                                                           \
      std::string found;                                                                                           \
      capability::with_dtypes(piece, [&](auto, auto param, auto states) {                                          \
        using W = decltype(param);                                                                                 \
        using K = typename W::Kept;                                                                                \
        const char* kept = std::is_same_v<K, Nothing>        ? "round"                                             \
                           : std::is_same_v<K, float>        ? "master"                                            \
                           : std::is_same_v<K, int16_t>      ? "remainder"                                         \
                           : std::is_same_v<K, int8_t>       ? "remainder8"                                        \
                           : std::is_same_v<K, Compensation> ? "kahan"                                             \
                                                             : "stochastic";                                       \
        found = name(typename W::Number{}) + " " + kept + " " + state(states);                                     \
        if (!capability::has_all_rules<W, decltype(states)>) found += " common";                                   \
      });                                                                                                          \
      return found;                                                                                                \
    }                                                                                                              \
  };
PRINT(baseline)
PRINT(avx2)
PRINT(avx512)

int main() {
  const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  const std::pair<const char*, int64_t> modes[] = {{"round", 0}, {"master", flag::master}, {"remainder", flag::remainder},
    {"kahan", flag::kahan}, {"stochastic", flag::stochastic}, {"remainder8", flag::remainder8}};
  for (int param = 0; param < 4; ++param)
    for (int state : {0, 1, 2, 3, 4})
      for (const auto& mode : modes)
        for (int64_t rare : {int64_t(0), int64_t(flag::amsgrad), int64_t(flag::cautious)}) {
          if (param < 2 && (mode.second || (param == 1) != (state == 1))) continue;  // there is no such step
          int64_t table[column::count] = {};
          const int64_t flags = mode.second | rare | (state == 4 ? flag::eight_bit : 0);
          Bucket bucket{rule::adam, flags, param, param, state % 4, 1, table, nullptr, nullptr, nullptr};
          const Piece piece{&bucket, table, 0, 1024, false, false};
          for (const auto& [capability, kernel] : {std::pair{"baseline", Of_baseline::kernel}, {"avx2", Of_avx2::kernel},
                                                   {"avx512", Of_avx512::kernel}})
            std::printf("%s,%s %s %s,%d,%s\n", capability, dtypes[param], mode.first, state == 4 ? "8bit" : dtypes[state],
                        rare != 0, kernel(piece).c_str());
        }
}
"""
# Parameters, what is kept of them, states: what docs/design.md says is stepped without buffers. The first with every rule.
ALL_RULES = {
    f"{param} round {state}"
    for param, state in [("float32", "float32"), ("float64", "float64"), ("bfloat16", "bfloat16"), ("float16", "float16"),
                         ("bfloat16", "float32"), ("float16", "float32")]
}  # fmt: skip
COMMON_RULES = {
    "float32 round bfloat16", "float16 master float32",
    *(f"bfloat16 {mode} float32" for mode in ("master", "remainder", "remainder8", "kahan", "stochastic")),
}  # fmt: skip
EIGHT_BIT = {"float32 round 8bit", *(f"bfloat16 {mode} 8bit" for mode in ("round", "remainder", "remainder8"))}


def test_what_is_stepped_often_has_a_kernel_of_its_own(tmp_path):
    """csrc/staged_kernels.h, is_staged: each kernel serves what its types say, and what had one stays out of the buffers."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no C++ compiler, or none for x86-64")
    program, executable = tmp_path / "kernels.cpp", tmp_path / "kernels"
    program.write_text(KERNELS)
    subprocess.run([compiler, "-std=c++17", "-w", f"-I{ROOT / 'csrc'}", str(program), "-o", str(executable)], check=True)
    lines = subprocess.run([str(executable)], check=True, capture_output=True, text=True).stdout.splitlines()
    own: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        capability, asked, rare, kernel = line.split(",")
        if kernel == "staged":
            continue
        assert kernel.removesuffix(" common") == asked, line
        assert rare == "0" or not kernel.endswith(" common"), line
        own.setdefault((capability, "rare" if rare == "1" else "common"), set()).add(asked)
    of_16_bits = {kernel for kernel in ALL_RULES if "16" in kernel}
    assert own == {
        ("baseline", "common"): ALL_RULES - of_16_bits,
        ("baseline", "rare"): ALL_RULES - of_16_bits,
        ("avx2", "common"): ALL_RULES | COMMON_RULES,
        ("avx2", "rare"): ALL_RULES,
        ("avx512", "common"): ALL_RULES | COMMON_RULES | EIGHT_BIT,
        ("avx512", "rare"): ALL_RULES,
    }
