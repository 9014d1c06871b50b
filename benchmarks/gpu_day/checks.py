"""Are the kernels right on the device: the tests of prefill, and compute-sanitizer over small problems."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from numbaflash.cuda.tools import find_tool

from .parts import Row

_ROOT = Path(__file__).parents[2]
_TESTS = [f"tests/cuda/test_{name}.py" for name in ("flash_v2", "flash_v2_laws", "flash_v1", "standard")]


def kernel_tests(emulated: bool) -> Iterator[Row]:
    """Run the tests that compare kernels with the float64 oracle; they choose a GPU where there is one."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not exhaustive",
        *_TESTS,
    ]
    # Other versions of packages may warn of other things; that is not what is tested here.
    command += ["-o", "filterwarnings=default"]
    if emulated:
        command += ["-k", "flash_v2 and maximum_that_grows_late"]
    elif find_spec("xdist"):
        command += ["-n", str(max(1, (os.cpu_count() or 1) // 2))]  # for the builds: they take most of the time
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        status = subprocess.run([*command, f"--junitxml={report}"], cwd=_ROOT, check=False).returncode
        if not report.exists():
            raise RuntimeError(f"pytest ended with status {status} and no report")
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    yield {"what": "all", **count, "seconds": float(suite.get("time", 0))}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.iter(kind):
                yield {"what": f"{case.get('classname')}::{case.get('name')}", "said": found.get("message", "")[:300]}


def sanitize(emulated: bool) -> Iterator[Row]:
    """Run small problems under memcheck and racecheck; on the emulator, whose checks are always on, as they are."""
    program = [sys.executable, "-m", f"{__package__}.small"]
    if emulated:
        done = subprocess.run([*program, "emulated"], cwd=_ROOT, capture_output=True, text=True, check=True)
        yield {"tool": "none, on the emulator", "problems": done.stdout.count("off by"), "found": 0}
        return
    tool = find_tool("compute-sanitizer")
    if tool is None:
        raise RuntimeError("compute-sanitizer is not there")
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *program, "cuda"]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        yield {
            "tool": check,
            "problems": done.stdout.count("off by"),
            "found": "nothing" if done.returncode == 0 else f"exit status {done.returncode}",
            "said": summary_of(done.stdout),
        }


def summary_of(printed: str) -> str:
    """Return compute-sanitizer's last word, or the end of what was printed where it said none."""
    said = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", printed)
    return said[-1] if said else printed[-300:]
