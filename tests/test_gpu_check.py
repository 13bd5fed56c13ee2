"""tools/gpu_check.py, rehearsed on the CPU at the smallest sizes."""
import importlib.util, json, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hapnb.helpers import KERNELS
from test_ranking import Plain

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def check():
    "The script as a module."
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    made = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(made)
    yield made
    sys.path[:] = before


def go(check, out, *arguments):
    "Exit status, and both files."
    status = check.main(["--device", "cpu", "--size", "tiny", "--out", str(out), *arguments])
    return status, json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


def test_a_rehearsal_passes_and_is_written(check, tmp_path, capsys):
    status, report, table = go(check, tmp_path, "--parts", "about,losses,metrics,kernel,faiss,training")
    assert status == 0 and report["passed"] is True, report
    assert {p["status"] for p in report["parts"].values()} == {"passed"}
    assert len(report["parts"]["losses"]["rows"]) >= 6 and len(report["parts"]["training"]["rows"]) == 2
    assert "| SupAPLoss | " in table and "**all parts passed**" in table and "] training: " in capsys.readouterr().out
    # nothing names the machine
    assert not {"host", "system"} & {r["what"] for r in report["parts"]["about"]["rows"]}


def test_speed_measures_what_fits_and_says_what_does_not(check, tmp_path, monkeypatch):
    "On a device with kernels, the engine without them is measured too."
    monkeypatch.setitem(KERNELS._items, "cpu", Plain)
    seconds = iter([.001] * 3 + [.9] * 100)
    monkeypatch.setattr(check, "timed", lambda f, device, repeats: next(seconds))
    _, report, table = go(check, tmp_path, "--parts", "speed")
    rows = report["parts"]["speed"]["rows"]
    first = [r for r in rows if (r["loss"], r["B"]) == ("SupAPLoss", 16)]
    assert "no kernel" in [r["method"] for r in first] and all(r["ms"] == 1 for r in first)
    assert any(r.get("result", "").startswith("not measured: would take") for r in rows if r["B"] == 64)
    assert "| B = 16 | B = 32 | B = 64 |" in table
    assert KERNELS.get("cpu") is Plain


def test_a_part_that_fails_is_told_and_the_next_ones_run(check, tmp_path, monkeypatch):
    def broken(part):
        part.row(half=1)
        raise RuntimeError("planted")
    monkeypatch.setitem(check.PARTS, "metrics", (broken, 30))
    status, report, table = go(check, tmp_path, "--parts", "metrics,kernel")
    assert status == 1 and report["passed"] is False
    assert report["parts"]["metrics"]["status"] == "FAILED" and report["parts"]["kernel"]["status"] == "passed"
    assert "RuntimeError: planted" in report["parts"]["metrics"]["error"] and "RuntimeError: planted" in table
    assert report["parts"]["metrics"]["rows"] == [dict(half=1)] and "a part FAILED" in table


def test_a_wrong_value_fails(check, tmp_path, monkeypatch):
    monkeypatch.setattr(check.kit, "loss_errors", lambda *a: (float("nan"), 0.))
    status, report, _ = go(check, tmp_path, "--parts", "losses")
    assert status == 1 and "SupAPLoss" in report["parts"]["losses"]["problems"][0]


def test_a_part_cannot_use_the_time_of_the_others(check, tmp_path, monkeypatch):
    monkeypatch.setitem(check.PARTS, "metrics", (lambda part: time.sleep(20), 30))
    monkeypatch.setattr(check.PARTS["metrics"][0], "__doc__", "Sleep.")
    status, report, _ = go(check, tmp_path, "--parts", "metrics", "--minutes", "0.012")
    assert status == 1 and "OutOfTime" in report["parts"]["metrics"]["problems"][0]


def test_what_was_found_survives_a_kill(check, tmp_path, monkeypatch):
    def killed(part):
        part.row(half=1)
        raise KeyboardInterrupt
    monkeypatch.setitem(check.PARTS, "metrics", (killed, 30))
    with pytest.raises(KeyboardInterrupt): go(check, tmp_path, "--parts", "metrics")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["passed"] is None and report["parts"]["metrics"]["rows"] == [dict(half=1)]
    assert "not finished" in (tmp_path / "gpu.md").read_text()


def test_failed_tests_fail_the_check(check, tmp_path, monkeypatch):
    done = SimpleNamespace(returncode=1, stdout="FAILED test_x\n1 failed, 3 passed in 2s", stderr="")
    monkeypatch.setattr(check.subprocess, "run", lambda *a, **k: done)
    status, report, _ = go(check, tmp_path, "--parts", "tests")
    assert status == 1 and report["parts"]["tests"]["rows"][0]["passed"] == 3
    assert "FAILED test_x" in report["parts"]["tests"]["error"]


def test_without_the_device_it_says_so(check, capsys):
    assert check.main(["--device", "cuda:77"]) == 2 and "--device cpu rehearses" in capsys.readouterr().out
    with pytest.raises(SystemExit): check.main(["--parts", "sped"])
    assert "unknown part 'sped'" in capsys.readouterr().err
