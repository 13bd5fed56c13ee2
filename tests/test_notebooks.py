"""Every notebook runs from top to bottom, each in a process of its own."""
import os, subprocess, sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BEGAN = str(time.time())  # a study must train, not read back what an older version of the code left in the store
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
             if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT / "nbs").parts)
             and not (p.parent / ".notest").exists()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_notebook(path):
    env = {**os.environ, "MPLBACKEND": "agg", "IN_TEST": "1", "HAPNB_FORCE": BEGAN}
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): env.setdefault(threads, "1")
    run = subprocess.run([sys.executable, str(ROOT / "tests" / "notebook.py"), str(path)], cwd=ROOT, env=env,
                         capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-6000:] + run.stdout[-2000:]


def test_there_are_notebooks(): assert len(NOTEBOOKS) > 3
