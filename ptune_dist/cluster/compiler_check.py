"""Whether this node can build and load a C extension, as Triton does before it runs its first kernel on a GPU.

Triton compiles its launcher with the node's C compiler and Python's headers. Without them a job would fail only after
the base has been loaded. Nothing of torch or Triton is loaded here.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NAME = "ptune_compiler_check"
SOURCE = f"""
#include <Python.h>
static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{NAME}", NULL, -1, NULL}};
PyMODINIT_FUNC PyInit_{NAME}(void) {{ return PyModule_Create(&module); }}
"""
SECONDS_TO_COMPILE = 120


def find_compiler_problem() -> str:
    """What is missing on this node, and what to install; "" if nothing is."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton chooses
    if not compiler:
        return "Triton needs a C compiler, and there is no gcc or clang: install gcc, or set CC"
    try:
        with tempfile.TemporaryDirectory(prefix="ptune-") as folder:
            return build_and_load(compiler, Path(folder))
    except OSError as error:
        return f"Triton needs a folder for temporary files: {error}: set TMPDIR to a folder that can be written"


def build_and_load(compiler: str, folder: Path) -> str:
    """The problem, "" if there is none. Raises OSError if the folder cannot be written."""
    source = folder / f"{NAME}.c"
    source.write_text(SOURCE)
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = find_headers()
    command = [compiler, str(source), "-O3", "-shared", "-fPIC", "-Wno-psabi", "-o", str(library), f"-I{headers}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_COMPILE)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return f"Triton needs a C compiler, and {compiler} cannot be run: install gcc, or set CC to another compiler"
    except subprocess.TimeoutExpired:
        return f"Triton needs a C compiler, and {compiler} takes more than {SECONDS_TO_COMPILE} s for one line"
    if done.returncode:
        return describe_compile_error(compiler, headers, done.stderr)
    try:
        spec = importlib.util.spec_from_file_location(NAME, library)
        assert spec is not None, "the suffix is that of an extension"
        importlib.util.module_from_spec(spec)
    except ImportError as error:
        text = f"a C extension that {compiler} built cannot be loaded: {first_line(str(error))}"
        return f"{text}: if {folder.parent} is mounted noexec, set TMPDIR to another folder"
    return ""


def find_headers() -> str:
    """The folder of Python.h. Debian's own scheme would name one below /usr/local."""
    scheme = sysconfig.get_default_scheme()
    return sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]


def describe_compile_error(compiler: str, headers: str, printed: str) -> str:
    if "Python.h" in printed:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"Triton needs Python's headers, and there is no {headers}/Python.h: install python{version}-dev (Debian, "
            f"Ubuntu) or python{version}-devel (RHEL, Rocky)"
        )
    errors = [line for line in printed.splitlines() if "error" in line]
    detail = first_line("\n".join(errors) or printed) or "it printed nothing"
    return f"Triton needs a C compiler, and {compiler} fails: {detail}: install gcc and libc's headers, or set CC"


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
