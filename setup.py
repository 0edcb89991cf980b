"""Compiles the native kernels of a CPU; all else about the package is said in pyproject.toml.

Without a C++ compiler, or with one that fails, the install goes on without them and says so in one line.
"""

import importlib.util
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError
from setuptools.modified import newer_group

SOURCES = Path("dsb_jax/ops/native")
EXPORTS = SOURCES / "library.map"  # what is not hidden would mix with other libraries built from XLA's headers
SERVED = sys.platform == "linux" and platform.machine() == "x86_64"
# One library for every Python from 3.12 on: it uses nothing of Python's. Free-threaded ones have no such name for it.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
# After those that Python was built with, one of which -fstrict-overflow undoes. The sources choose the instructions;
# the warnings are of GCC 12 for its own headers.
WARNINGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fstrict-overflow", *WARNINGS]


class OptionalBuild(build_ext):
    """Compiles the sources side by side, against the headers of XLA that jaxlib brings."""

    def run(self) -> None:
        inplace = self.inplace
        try:
            super().run()
        except Exception as error:  # whatever a compiler, or the want of one, may do
            self.inplace = inplace
            Path(self.get_ext_fullpath(self.extensions[0].name)).unlink(missing_ok=True)  # of older sources
            if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
                wheel.root_is_pure = True
            failed = isinstance(error, (CompileError, LinkError))
            reason = f"{self.compiler.compiler_so_cxx[0]} failed, as shown above" if failed else error
            print(
                f"warning: dsb_jax is installed without its native CPU kernels, so slower on a CPU: {reason}; "
                "install a C++17 compiler (g++ or clang++, or name one by the variable CXX), then dsb_jax again",
                file=sys.stderr,
            )

    def build_extension(self, ext: Extension) -> None:
        built = Path(self.get_ext_fullpath(ext.name))
        here = SOURCES / built.name
        if self.editable_mode and not newer_group([*ext.sources, *ext.depends, "setup.py"], here):
            self.mkpath(str(built.parent))
            self.copy_file(str(here), str(built))  # from where it is copied back
            return
        if not (jaxlib := importlib.util.find_spec("jaxlib")):
            raise ModuleNotFoundError("no jaxlib, which brings XLA's headers (pip install jaxlib)")
        ext.extra_compile_args += ["-isystem", f"{jaxlib.submodule_search_locations[0]}/include"]
        name = self.compiler.compiler_so_cxx[0]
        if not shutil.which(name):
            raise FileNotFoundError(f"no C++ compiler {name}")
        compile_all = self.compiler.compile
        with ThreadPoolExecutor() as pool:
            self.compiler.compile = lambda sources, **options: [
                file for one in pool.map(lambda source: compile_all([source], **options), sources) for file in one
            ]
            super().build_extension(ext)


native = Extension(
    "dsb_jax.ops.native.library",
    sources=sorted(map(str, SOURCES.glob("*.cc"))),
    depends=[*sorted(map(str, SOURCES.glob("*.h"))), str(EXPORTS)],
    language="c++",
    extra_compile_args=FLAGS,
    extra_link_args=[f"-Wl,--version-script={EXPORTS}"],
    py_limited_api=ABI3,
)
setup(
    ext_modules=[native] if SERVED else [],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp312"}} if SERVED and ABI3 else {},
)
