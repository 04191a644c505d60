"""The native library, which pyproject.toml cannot describe yet without being experimental.

It is a plain C library that ctypes loads, built as if it were an extension module so that wheels and editable
installs carry it; it calls nothing of Python, so one wheel serves every version. It is optional: without a compiler,
the package installs and works without it. Set NEOQUANT_NO_EXTENSION=1 to leave it out on purpose.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ISAS = ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "neon")
NAMES = (
    "gptq",
    "likeliest",
    "multiply",
    "parallel",
    "pool",
    "quantize",
    "step",
    "trellis",
    *(f"products_{isa}" for isa in ISAS),
)
SOURCES = [f"neoquant/native/{name}.c" for name in NAMES]
HEADERS = sorted(path.name for path in Path("neoquant/native").glob("*.h"))

# No contraction to fused multiply-add: where a rounding decides a byte, it is bitsandbytes' rounding. Nobody catches
# floating-point exceptions: lest they were raised otherwise, compilers would leave a choice between two numbers out of
# vectors where there are no masks, as with AVX2. Python's own flags ask for a debugger's tables, which are nine tenths
# of the library.
FLAGS = ["-O3", "-g0", "-std=gnu11", "-ffp-contract=off", "-fno-trapping-math", "-fvisibility=hidden", "-pthread"]


class BuildNative(build_ext):
    """Compiles the files side by side, and not at all where an earlier editable install left an up-to-date library."""

    def build_extension(self, ext):
        built, target = Path(*ext.name.split(".")), Path(self.get_ext_fullpath(ext.name))
        existing = built.with_name(target.name)
        inputs = [Path("setup.py"), *map(Path, ext.sources), *map(Path, ext.depends)]
        if existing.exists() and existing.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
            if not target.exists() or not target.samefile(existing):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(existing, target)
            return
        compile_all = self.compiler.compile

        def compile_side_by_side(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [o for objects in pool.map(lambda one: compile_all([one], **options), sources) for o in objects]

        def compile_for_any_assembler(sources, macros=None, **options):
            try:
                return compile_side_by_side(sources, macros=macros, **options)
            except CompileError:
                macros = [*(macros or []), ("NQ_OLD_ASSEMBLER", None)]
                return compile_side_by_side(sources, macros=macros, **options)

        self.compiler.compile = compile_for_any_assembler
        super().build_extension(ext)


native = Extension(
    "neoquant.native._cpu",
    SOURCES,
    depends=[f"neoquant/native/{name}" for name in HEADERS],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    libraries=["m"],
    py_limited_api=True,
    optional=True,
)

skipped = os.environ.get("NEOQUANT_NO_EXTENSION", "") not in ("", "0")
setup(
    ext_modules=[] if skipped else [native],
    cmdclass={"build_ext": BuildNative},
    options={} if skipped else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
