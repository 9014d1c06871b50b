"""The day with a GPU runs end to end without one, so that it works on the day."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.gpu_day.__main__ import main, run_apart
from benchmarks.gpu_day.checks import summary_of
from benchmarks.gpu_day.parts import PARTS, Part
from benchmarks.gpu_day.profile import rows_of
from benchmarks.gpu_day.report import markdown

ROOT = Path(__file__).parents[1]


def test_every_part_runs_on_the_emulator(tmp_path, capsys):
    main(["--emulated", "--here", "--out", str(tmp_path)])
    parts = json.loads((tmp_path / "emulated.json").read_text())["parts"]
    assert list(parts) == [part.name for part in PARTS]
    assert all(parts.values())
    (tests,) = parts["tests"]
    assert (tests["tests"], tests["failures"], tests["errors"]) == (1, 0, 0)
    assert all(row["error"] < 2e-3 and row["flash"] > 0 for row in parts["prefill"])
    assert capsys.readouterr().out.endswith((tmp_path / "emulated.md").read_text() + "\n")


def test_the_script_runs_a_part_in_a_process_of_its_own(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu_day"), "--emulated", "--part", "machine", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (gpu, *_) = json.loads((tmp_path / "emulated.json").read_text())["parts"]["machine"]
    assert gpu == {"what": "GPU", "value": "emulated"}
    assert "| GPU | emulated |" in done.stdout


def test_a_part_that_ends_early_is_a_row_that_says_why():
    (stopped,) = run_apart(PARTS[0], emulated=True, seconds=0.01)
    assert stopped["failed"] == "stopped after 0 s"
    (crashed,) = run_apart(Part("unknown", "nowhere:nothing", 600), emulated=True, seconds=600)
    assert crashed["failed"] == "exit status 2"
    assert "invalid choice: 'unknown'" in crashed["log"]
    report = markdown({"date": "", "seconds": 1, "emulated": False, "parts": {"one": [{"a": 0.5}, crashed]}})
    assert "| a |\n|---|\n| 0.5 |" in report
    assert "**Failed:** exit status 2" in report


def test_what_ncu_prints_is_read_by_name():
    (row,) = rows_of(
        "==PROF== Connected\noff by 1e-3\n"
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","us","register/thread"\n'
        '"0","flash_v2","12.5","244"\n'
    )
    assert (row["kernel"], row["time"], row["registers"]) == ("flash_v2", "12.5 us", "244 register/thread")
    assert row["bank_conflicts"] == ""


def test_the_last_word_of_compute_sanitizer_is_found():
    said = "========= COMPUTE-SANITIZER\nv2: off by 1e-4\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n"
    assert summary_of(said) == "RACECHECK SUMMARY: 0 hazards displayed (0 errors)"
    assert summary_of("no such tool") == "no such tool"
