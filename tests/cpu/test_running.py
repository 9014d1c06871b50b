"""Threads, forks, interrupts, and kernels that are compiled once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from numbaflash.cpu import pool
from numbaflash.cpu import solve as entry
from numbaflash.cpu.standby import BOX_BYTES

from .inputs import qkv, solve


def test_many_threads_may_call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "thread_count", lambda: 4)
    problems = [qkv(1, tokens, 2000, (4, 2), (64, 64)) for tokens in (1, 300, 4, 90)]
    expected = [solve(*arrays, causal=True)[0] for arrays in problems]
    with ThreadPoolExecutor(8) as callers:
        results = [callers.submit(solve, *problems[i % 4], causal=True) for i in range(80)]
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result.result()[0], expected[i % 4])


def test_calls_that_follow_each_other_at_once_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "thread_count", lambda: 3)
    arrays = qkv(2, 1, 1500, (4, 2), (64, 64))
    expected = solve(*arrays)[0]
    for _ in range(300):  # helpers wake up for the first ones, and stand by for the others
        np.testing.assert_array_equal(solve(*arrays)[0], expected)


def helpers() -> list[threading.Thread]:
    """Those that there are; other threads of the project, which come and go, have names with words in them."""
    return [thread for thread in threading.enumerate() if re.fullmatch(r"numbaflash-\d+", thread.name)]


def test_helpers_are_started_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "thread_count", lambda: 3)
    before = len(helpers())
    for _ in range(20):
        solve(*qkv(1, 300, 2000, (4, 2), (64, 64)))
    assert len(helpers()) == max(before, 2)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be kept off a CPU here")
def test_helpers_leave_the_callers_cpu_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "thread_count", lambda: 3)
    cpus = os.sched_getaffinity(0)
    for cpu in (*cpus, *cpus):
        monkeypatch.setattr(pool, "_current_cpu", lambda cpu=cpu: cpu)
        solve(*qkv(1, 300, 2000, (4, 2), (64, 64)))
        assert helpers()
        for helper in helpers():
            assert os.sched_getaffinity(helper.native_id) == (cpus - {cpu} or cpus)
    assert os.sched_getaffinity(0) == cpus


def test_a_small_problem_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool._Helpers, "run", lambda *_: pytest.fail("woke up a helper"))
    solve(*qkv(1, 1, 300, (9, 3), (64, 64)))
    solve(*qkv(1, 10, 20, (9, 3), (64, 64)))


def test_a_forked_child_computes() -> None:
    code = """
import os, warnings
import numpy as np
from numbaflash.cpu import pool, solve as entry
from numbaflash import cpu, problem
entry.thread_count = lambda: 3
warnings.simplefilter("ignore")  # Python 3.12 warns of any fork with threads
q = k = v = np.ones((1, 300, 4, 64), np.float32)
described = problem.describe(q, k, v)
cpu.attention(described, q, k, v, "v2")
pid = os.fork()
out, _ = cpu.attention(described, q, k, v, "v2")
assert (out == 1).all()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
    print("both")
os._exit(0)
""".replace('print("both")', 'os.write(1, b"both")')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "both"


def test_the_interpreter_exits_while_daemon_threads_compute() -> None:
    code = """
import threading
import numpy as np
import numbaflash

q = np.ones((1, 2000, 4, 64), np.float32)
computing = threading.Event()

def compute():
    while True:
        numbaflash.attention(q, q, q)
        computing.set()

for _ in range(3):
    threading.Thread(target=compute, daemon=True).start()
computing.wait()
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stderr) == (0, "")


def test_nobody_is_at_work_for_a_call_that_a_signal_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class EndedError(Exception):
        """What the handler raises, wherever the call is."""

    def end(*_: object) -> None:
        raise EndedError

    monkeypatch.setattr(entry, "thread_count", lambda: 3)
    arrays = qkv(1, 1, 4000, (4, 4), (64, 64))
    expected = solve(*arrays)[0]
    ended = 0
    before = signal.signal(signal.SIGALRM, end)
    try:
        for i in range(1500):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + i % 150))
                    np.testing.assert_array_equal(solve(*arrays)[0], expected)
                finally:
                    boxes = pool._helpers._boxes.view(np.int64).reshape(-1, BOX_BYTES // 8)
                    assert set(boxes[:, 0].tolist()) <= {0, 1}  # asleep, or standing by
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except EndedError:
                ended += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended > 100
    np.testing.assert_array_equal(solve(*arrays)[0], expected)


def test_where_there_are_no_threads_to_be_had_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "thread_count", lambda: 2)
    arrays = qkv(1, 1, 4000, (4, 4), (64, 64))
    expected = solve(*arrays)[0]
    monkeypatch.setattr(pool, "_helpers", pool._Helpers())
    with monkeypatch.context() as exhausted:

        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        exhausted.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            np.testing.assert_array_equal(solve(*arrays)[0], expected)
    assert pool._helpers._jobs.empty()
    assert not pool._helpers._threads


def test_a_helper_without_memory_leaves_the_work_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        def of(self, nbytes: int) -> int:
            if threading.current_thread() is not threading.main_thread():
                raise MemoryError
            return scratch.of(nbytes)

        address = nbytes = 0

    monkeypatch.setattr(entry, "thread_count", lambda: 2)
    arrays = qkv(1, 1, 4000, (4, 4), (64, 64))
    expected = solve(*arrays)[0]
    scratch = pool._scratch
    monkeypatch.setattr(pool, "_helpers", pool._Helpers())
    monkeypatch.setattr(pool, "_scratch", Exhausted())
    for _ in range(3):
        np.testing.assert_array_equal(solve(*arrays)[0], expected)
        deadline = time.monotonic() + 20
        while not pool._helpers._jobs.empty():
            assert time.monotonic() < deadline
            time.sleep(0.001)
    for thread in pool._helpers._threads:
        assert thread.is_alive()
        thread.name = "of a pool that is gone"  # it waits there to the end


def test_a_second_process_takes_the_kernels_from_disk() -> None:
    solve(*qkv(1, 20, 20, (2, 1), (16, 16)))
    solve(*qkv(1, 2, 20, (2, 1), (16, 16)))
    code = """
import numpy as np
from numbaflash import cpu, problem
from numbaflash.cpu import decode, prefill
for tokens in (2, 20):
    q = k = v = np.ones((1, tokens, 2, 16), np.float32)
    cpu.attention(problem.describe(q, k, v), q, k, v, "v2")
for module in (decode.decode, prefill.prefill):
    assert module.stats.cache_hits and not module.stats.cache_misses, module.stats
"""
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


# Other CPUs than this one, as Numba's own settings describe them; an x86 machine alone can run them.
HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse2,+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt"}
ANY_X86 = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


@pytest.mark.slow  # compiles all kernels anew for another CPU: half a minute, once
@pytest.mark.parametrize(("settings", "lanes"), [(HASWELL, 8), (ANY_X86, 4)], ids=["AVX2", "SSE2"])
def test_a_cpu_with_shorter_vectors_gives_the_same_results(settings: dict[str, str], lanes: int) -> None:
    environment = {**os.environ, **settings}
    code = f"from numbaflash.cpu.target import TARGET; assert TARGET.lanes == {lanes}, TARGET"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    tests = [
        f"{os.path.dirname(__file__)}/{name}.py"
        for name in ("test_attention", "test_bias", "test_codes", "test_laws", "test_vector")
    ]
    without_compiling_the_rest = ["-k", "not standard and not v1"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *without_compiling_the_rest,
        *tests,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
