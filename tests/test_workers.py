"""Worker processes: what they inherit, how they share GPUs, what happens when one of them or their server dies."""
import os, signal, subprocess, sys, time, zlib
from pathlib import Path

import psutil
import pytest
import torch

from hapnb import grids, workers
from hapnb.grids import grid, run_grid
from hapnb.helpers import write_atomic
from toy_study import Toy, started, toy_gpu, toy_look, toy_run, tries

ROOT = Path(__file__).resolve().parents[1]
no_server = sys.platform != "linux" or sys.version_info < (3, 11)
needs_server = pytest.mark.skipif(no_server, reason="workers start from nothing")


def look(store, seeds=1, x=0):
    "Rows of runs that note what their process was given."
    return run_grid(grid(Toy(args={"x": x}), seeds=seeds), store=store, jobs=seeds, device="cpu", runner=toy_look,
                    progress=False)


def test_workers_see_the_environment_and_the_modules_of_their_parent(tmp_path, monkeypatch):
    import hapnb
    # the server was started before, with neither
    for n, word in enumerate(("one", "three")):
        monkeypatch.setenv("HAPNB_SEEN", word)
        rows = look(tmp_path, seeds=2, x=n)
        assert rows["seen"].eq(len(word)).all() and rows["threads"].eq(1).all()
        assert rows["code"].eq(zlib.crc32(hapnb.__file__.encode())).all()
        forked = workers.worker_context(torch.device("cpu")).get_start_method() == "forkserver"
        assert rows["prepared"].eq(int(forked)).all(), "a worker began from nothing"
        assert not forked or rows["server_threads"].eq(1).all(), "a process with threads was forked"


@needs_server
def test_workers_are_not_forked_from_an_old_server(tmp_path, monkeypatch):
    def method(device="cpu"): return workers.worker_context(torch.device(device)).get_start_method()
    monkeypatch.setattr(workers, "_SERVER", {})
    assert (method(), method("cuda"), method()) == ("forkserver", "spawn", "forkserver")
    monkeypatch.setenv("HAPNB_SEEN", "read when it is needed")
    assert method() == "forkserver"
    with monkeypatch.context() as m:
        m.setenv("HF_HOME", str(tmp_path))
        assert method() == "spawn", "a library reads the variable while it is imported"
    assert method() == "forkserver"
    file = Path(workers.__file__)
    seen = file.stat()
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1000))
    try:
        assert method() == "spawn", "the library was edited"
        rows = look(tmp_path, x=7)
        assert rows["prepared"].eq(0).all() and rows["seen"].eq(22).all() and rows["threads"].eq(1).all()
    finally: os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))


@needs_server
@pytest.mark.parametrize("error", [EOFError, ConnectionRefusedError])
def test_a_server_that_died_costs_time_only(tmp_path, monkeypatch, error):
    submit, methods = workers.ProcessPoolExecutor.submit, []
    def first_fails(self, *args):
        methods.append(self._mp_context.get_start_method())
        if len(methods) == 1: raise error
        return submit(self, *args)
    monkeypatch.setattr(workers, "_SERVER", {})
    monkeypatch.setattr(workers.ProcessPoolExecutor, "submit", first_fails)
    rows = run_grid(grid(Toy(), seeds=2), store=tmp_path, jobs=1, device="cpu", runner=toy_run, progress=False)
    assert rows["H-AP"].tolist() == [0.3, 0.31] and methods == ["forkserver", "spawn", "spawn"]
    assert set(tries(tmp_path).values()) == {1}


def test_gpus_are_shared_by_any_number_of_workers_and_restarts(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    tasks = {k: (k,) for k in range(9)} | {"dies": ("dies",)}
    # more workers than GPUs, and workers that die twice: each generation begins at the first GPU again
    found = {o.key: o for o in workers.Workers(toy_gpu, tasks, 3, torch.device("cuda")) if o}
    assert "died twice" in found.pop("dies").error
    assert {o.value for o in found.values()} <= {"5", "7"} and all(o.error is None for o in found.values())
    assert len(found) == 9


def test_one_named_gpu_is_the_only_one_that_workers_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    found = [o.value for o in workers.Workers(toy_gpu, {0: (0,), 1: (1,)}, 2, torch.device("cuda:1")) if o]
    assert found == ["7", "7"]


def test_a_killed_grid_leaves_no_worker_and_goes_on(tmp_path, monkeypatch):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    # where the command is typed lies another package of that name
    trap = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    write_atomic(trap / "hapnb/__init__.py", "open('read', 'w')")
    p = subprocess.Popen([sys.executable, str(ROOT / "tests/toy_study.py"), str(tmp_path)], env=env, cwd=trap,
                         stderr=subprocess.DEVNULL)
    for _ in range(600):
        if list(tmp_path.glob("*/try-*")): break
        time.sleep(0.1)
    family = [c for c in psutil.Process(p.pid).children(recursive=True)]
    assert sum(map(started, family)) >= 2
    p.send_signal(signal.SIGKILL)
    p.wait()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not [w for w in alive if started(w)], "workers outlive the study that was killed"
    assert not (trap / "read").exists(), "the server of workers imported another package"
    monkeypatch.setattr(grids, "is_local", lambda cfg, runner: True)
    rows = run_grid(grid(Toy(), seeds=4), store=tmp_path, device="cpu", runner=toy_run, progress=False)
    assert rows["H-AP"].tolist() == [0.3 + 0.01 * s for s in range(4)]
