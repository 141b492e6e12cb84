"""Compiles the Cython kernels; everything else about the package is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

KERNELS = ("digest", "manifest", "window")

# Our own builds (Makefile, CI) take every warning for an error; a user's newer compiler may know more of them.
STRICT = ["-Wall", "-Werror"] if os.environ.get("WAVE_STRICT_BUILD") else []

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"wave_proxy._fast.{name}",
                [f"wave_proxy/_fast/{name}.pyx"],
                extra_compile_args=["-O3", *STRICT],
            )
            for name in KERNELS
        ],
        compiler_directives={
            "language_level": "3",
            "auto_pickle": False,
            "autotestdict": False,
            "embedsignature": False,
            "warn.maybe_uninitialized": True,
        },
    )
)
