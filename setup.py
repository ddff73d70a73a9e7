"""Builds csrc/ into fused_l2/libfused_l2.so: a plain shared library, compiled without torch or Python headers.

FUSED_L2_CPP=require makes a missing or failing compiler an error (for wheels and CI), FUSED_L2_CPP=0 builds without the
library. Otherwise a failing compiler leaves an install that works, on plain PyTorch operations.
"""

import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import _StaticPth, editable_wheel

MODE = os.environ.get("FUSED_L2_CPP", "auto")
if MODE not in ("auto", "require", "0"):
    raise SystemExit(f"FUSED_L2_CPP={MODE!r}: expected 'auto', 'require' or '0'")

LIBRARY = {"win32": "fused_l2.dll", "darwin": "libfused_l2.dylib"}.get(sys.platform, "libfused_l2.so")
# -ffp-contract=off: an fma is where the formula says so, nowhere else. -fno-math-errno, -fno-trapping-math: sqrt and
# division vectorise. Never -march=native: instruction sets are chosen per function, at import.
GNU_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for uninitialized.
GNU_FLAGS += ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]


# Built in, so that a library beside newer sources is refused.
SOURCES = runpy.run_path(str(Path(__file__).parent / "fused_l2" / "_sources.py"))["fingerprint"](Path("csrc"))


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit_ function: this is no Python module

    def build_extension(self, ext: Extension) -> None:
        gnu = self.compiler.compiler_type != "msvc"
        ext.extra_compile_args = GNU_FLAGS if gnu else MSVC_FLAGS
        ext.extra_link_args = ["-Wl,-s"] if sys.platform == "linux" else []
        compile_all = self.compiler.compile

        def compile_in_parallel(sources: list[str], *args: object, **kwargs: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [o for one in pool.map(lambda s: compile_all([s], *args, **kwargs), sources) for o in one]

        self.compiler.compile = compile_in_parallel
        super().build_extension(ext)


class LinkedPackage(editable_wheel):
    """``pip install -e .`` puts a folder on the path that has a link to the package, and nothing else.

    setuptools makes an import hook where a package lies elsewhere, as kernels/ does, and type checkers follow none. The
    checkout on the path would have its ``kernels`` taken for the distribution of that name. The package finds kernels/ beside
    itself (fused_l2/_sources.py).
    """

    def _select_strategy(self, name: str, tag: str, build_lib: object) -> object:
        link = Path(".editable", "fused_l2").absolute()
        try:
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path("fused_l2").absolute(), target_is_directory=True)
        except OSError:  # Windows may not allow links
            return super()._select_strategy(name, tag, build_lib)
        return _StaticPth(self.distribution, name, [link.parent])


class PlatformWheel(bdist_wheel):
    """One wheel per platform, for every Python: the library is loaded with ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


library = Extension(
    "fused_l2.libfused_l2",
    sources=sorted(str(p) for p in Path("csrc").glob("*.cpp")),
    depends=sorted(str(p) for p in Path("csrc").glob("*.h")),
    language="c++",
    define_macros=[("FUSED_L2_SOURCES", str(SOURCES))],
    libraries=["dl"] if sys.platform == "linux" else [],
    optional=MODE != "require",
)
setup(
    ext_modules=[] if MODE == "0" else [library],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel, "editable_wheel": LinkedPackage},
)
