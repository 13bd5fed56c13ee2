"""A toy run, in a module of its own so that worker processes can import it, and toy study notebooks."""
import json, os, signal, sys, time, zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import nbformat

from hapnb.helpers import write_atomic, write_manifest


@dataclass(frozen=True)
class Toy:
    loss: str = "a"
    args: dict = field(default_factory=dict)
    batch_size: int = 32
    seed: int = 0
    wait: float = 0.0
    def key(self): return f"{self.loss}-{self.batch_size}-{self.seed}-{self.args.get('x', 0)}"


def toy_run(cfg, store, device, progress):
    "A run that notes its process and threads; `loss` says how it fails."
    import torch
    folder = Path(store) / cfg.key()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"try-{time.time_ns()}").touch()
    if cfg.loss == "bad" and cfg.seed == 1: raise ValueError("loss is NaN at epoch 3")
    if cfg.loss == "dies" and cfg.seed == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(cfg.wait)
    metrics = {"H-AP": 0.3 + 0.01 * cfg.seed + 0.1 * (cfg.loss == "b"), "threads": torch.get_num_threads(), "pid": os.getpid()}
    write_atomic(folder / "metrics.json", json.dumps(metrics))
    write_manifest(folder, ["metrics.json"])
    return SimpleNamespace(metrics=metrics)


def toy_gpu(task):
    "Tell which GPUs this process sees; one task kills its process."
    if task == "dies": os.kill(os.getpid(), signal.SIGKILL)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def toy_look(cfg, store, device, progress):
    "A run that notes what its process was given."
    prepared, tasks = int("hapnb.models" in sys.modules), Path(f"/proc/{os.getppid()}/task")
    import hapnb, torch
    return SimpleNamespace(metrics={"prepared": prepared, "server_threads": len(list(tasks.iterdir())) if tasks.exists() else 0, "seen": len(os.environ.get("HAPNB_SEEN", "")), "threads": torch.get_num_threads(), "code": zlib.crc32(hapnb.__file__.encode())})


PARAMETERS = "seeds: int = 2  # how many\nlr: float = 0.1  # step\nflag: bool = False  # yes or no\nstore: str = 'runs'  # where\n"
STUDY = ("profile: str = 'smoke'  # size\ndataset: str = 'emoji'  # data\ndata_dir: str = ''  # where\nseeds: int = 0  # 0: the profile's\n"
         "device: str = 'auto'  # where to compute\nstore: str = 'runs'  # run store\nout: str = ''  # results\njobs: int = 0  # at a time\n")


def write_study(path, parameters=PARAMETERS, cells=(), tags=("parameters",), kernel="python3"):
    "Write a study notebook; returns its path."
    new, path = nbformat.v4, Path(path)
    first = [new.new_markdown_cell("# A toy\n\n> Shows that it works.\n\nExpected time on 2 cores: smoke 0.1 min, quick 2 min.")]
    tagged = [new.new_code_cell(parameters, metadata={"tags": list(tags)})] if parameters is not None else []
    nb = new.new_notebook(cells=first + tagged + [new.new_code_cell(c) for c in cells])
    nb.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


if __name__ == "__main__":  # `python toy_study.py STORE`: a grid to be killed
    from toy_study import Toy, toy_run
    from hapnb.grids import grid, run_grid
    run_grid(grid(Toy(wait=1.0), seeds=4), store=sys.argv[1], jobs=2, device="cpu", runner=toy_run)
