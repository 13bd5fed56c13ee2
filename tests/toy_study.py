"""A toy run, in a module of its own so that worker processes can import it, and toy study notebooks.

Workers need neither pandas nor nbformat, which take seconds to import: the functions that use them import them.
"""
import contextlib, io, json, os, signal, sys, time, zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import psutil
from fastcore.xtras import working_directory

from hapnb.helpers import write_atomic, write_manifest

METHODS = {"A": {"loss": "a"}, "B": {"loss": "b", "args": {"x": 1}}}


@dataclass(frozen=True)
class Toy:
    loss: str = "a"
    args: dict = field(default_factory=dict)
    batch_size: int = 32
    seed: int = 0
    wait: float = 0.0
    def key(self): return f"{self.loss}-{self.batch_size}-{self.seed}-{self.args.get('x', 0)}"


def toy_rows(groups, **more):
    "Rows of a grid: scores of methods, one per seed."
    import pandas as pd
    return pd.DataFrame([dict(method=m, seed=s, score=v, **more) for m, vs in groups.items() for s, v in enumerate(vs)])


def toy_run(cfg, store, device, progress):
    "A run that notes its process and threads; `loss` says how it fails."
    import torch
    folder = Path(store) / cfg.key()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"try-{time.time_ns()}").touch()
    if cfg.loss == "bad" and cfg.seed == 1: raise ValueError("loss is NaN at epoch 3")
    if cfg.loss == "dies" and cfg.seed == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(cfg.wait)
    score = 0.3 + 0.01 * cfg.seed + 0.1 * (cfg.loss == "b")
    metrics = {"H-AP": score, "threads": torch.get_num_threads(), "pid": os.getpid()}
    write_atomic(folder / "metrics.json", json.dumps(metrics))
    write_manifest(folder, ["metrics.json"])
    return SimpleNamespace(metrics=metrics)


def tries(store):
    "How many times each run was begun."
    return {p.name: len(list(p.glob("try-*"))) for p in Path(store).iterdir() if p.is_dir()}


def toy_gpu(task):
    "Tell which GPUs this process sees; one task kills its process."
    if task == "dies": os.kill(os.getpid(), signal.SIGKILL)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def toy_look(cfg, store, device, progress):
    "A run that notes what its process was given."
    prepared, tasks = int("hapnb.models" in sys.modules), Path(f"/proc/{os.getppid()}/task")
    import hapnb, torch
    return SimpleNamespace(metrics={
        "prepared": prepared, "server_threads": len(list(tasks.iterdir())) if tasks.exists() else 0,
        "seen": len(os.environ.get("HAPNB_SEEN", "")), "threads": torch.get_num_threads(),
        "code": zlib.crc32(hapnb.__file__.encode())})


def started(p):
    "Whether `run_grid` started this process: a worker, or the server that workers are forked from."
    try: return any(w in " ".join(p.cmdline()) for w in ("spawn_main", "forkserver"))
    except psutil.Error: return False


def left_workers():
    "Workers of this process; the server stays, and has no children when they are gone."
    found = [c for c in psutil.Process().children(recursive=True) if started(c)]
    return [c for c in found if "spawn_main" in " ".join(c.cmdline()) or c.ppid() != os.getpid()]


PARAMETERS = """seeds: int = 2  # how many
lr: float = 0.1  # step
flag: bool = False  # yes or no
store: str = 'runs'  # where
"""
STUDY = """profile: str = 'smoke'  # size
dataset: str = 'emoji'  # data
data_dir: str = ''  # where
seeds: int = 0  # 0: the profile's
device: str = 'auto'  # where to compute
store: str = 'runs'  # run store
out: str = ''  # results
jobs: int = 0  # at a time
"""


def write_study(path, parameters=PARAMETERS, cells=(), tags=("parameters",), kernel="python3"):
    "Write a study notebook; returns its path."
    import nbformat
    new, path = nbformat.v4, Path(path)
    title = "# A toy\n\n> Shows that it works.\n\nExpected time on 2 cores: smoke 0.1 min, quick 2 min."
    tagged = [new.new_code_cell(parameters, metadata={"tags": list(tags)})] if parameters is not None else []
    nb = new.new_notebook(cells=[new.new_markdown_cell(title), *tagged, *map(new.new_code_cell, cells)])
    nb.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def run_here(notebook, executed, parameters, say, *_):
    "Run the cells of a notebook in this process; takes and returns the same as `driver._papermill`, in milliseconds."
    import nbformat
    nb, names, status = nbformat.read(notebook, 4), {}, 0
    cells = [c for c in nb.cells if c.cell_type == "code"]
    given = nbformat.v4.new_code_cell("\n".join(f"{k} = {v!r}" for k, v in parameters.items()))
    nb.cells.insert(nb.cells.index(cells[0]) + 1, given)
    for cell in [cells[0], given, *cells[1:]]:
        printed, state = io.StringIO(), "pending" if status else "completed"
        try:
            with contextlib.redirect_stdout(printed), working_directory(notebook.parent):
                if not status: exec(cell.source, names)
        except Exception as e:
            error = nbformat.v4.new_output("error", ename=type(e).__name__, evalue=str(e), traceback=[])
            cell.outputs, state, status = [error], "failed", 1
        cell.metadata["papermill"] = {"status": state}
        for line in printed.getvalue().splitlines(): say(line)
    nbformat.write(nb, executed)
    return status, ""


# `python toy_study.py STORE`: a grid to be killed
if __name__ == "__main__":
    from toy_study import Toy, toy_run
    from hapnb.grids import grid, run_grid
    run_grid(grid(Toy(wait=1.0), seeds=4), store=sys.argv[1], jobs=2, device="cpu", runner=toy_run)
