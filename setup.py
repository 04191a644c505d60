"""The native library, which pyproject.toml cannot describe yet without being experimental.

It is a plain C library that ctypes loads, built as if it were an extension module so that wheels and editable
installs carry it. It is optional: without a compiler, the package installs and works without it. Set
NEOQUANT_NO_EXTENSION=1 to leave it out on purpose.
"""

import os

from setuptools import Extension, setup

ISAS = ("portable", "avx2", "avx512", "avx512vnni", "neon")
NAMES = ("feedback", "multiply", "parallel", "quantize", "step", *(f"products_{isa}" for isa in ISAS))
SOURCES = [f"neoquant/native/{name}.c" for name in NAMES]
HEADERS = [
    "cpu.h",
    "weight.h",
    "products.inc.h",
    "step.inc.h",
    *(f"simd_{isa}.h" for isa in ("portable", "avx2", "avx512", "neon")),
]

# No contraction to fused multiply-add: where a rounding decides a byte, it is bitsandbytes' rounding.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]

native = Extension(
    "neoquant.native._cpu",
    SOURCES,
    depends=[f"neoquant/native/{name}" for name in HEADERS],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    libraries=["m"],
    optional=True,
)

setup(ext_modules=[] if os.environ.get("NEOQUANT_NO_EXTENSION", "") not in ("", "0") else [native])
