"""Every notebook runs from top to bottom, each in a process of its own."""
import json, os, select, subprocess, sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BEGAN = str(time.time())  # a study must train, not read back what an older version of the code left in the store
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
             if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT / "nbs").parts)
             and not (p.parent / ".notest").exists()]
LIMIT = 900


def command(*args):
    "Arguments of `Popen` for `tests/notebook.py`."
    env = {**os.environ, "MPLBACKEND": "agg", "IN_TEST": "1", "HAPNB_FORCE": BEGAN}
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): env.setdefault(threads, "1")
    return dict(args=[sys.executable, str(ROOT / "tests" / "notebook.py"), *map(str, args)], cwd=ROOT, env=env)


class Server:
    "Runs notebooks in forks of one process that has imported PyTorch."
    def __init__(self, log):
        self.log, self.process = log, None

    def start(self):
        self.process = subprocess.Popen(**command("--serve"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def stop(self):
        "End the server and the notebook that it runs, if any."
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def run(self, path):
        "Exit status, output and CPU seconds of a notebook."
        if not self.process or self.process.poll() is not None: self.start()
        self.process.stdin.write(json.dumps([str(path), str(self.log)]).encode() + b"\n")
        self.process.stdin.flush()
        late = not select.select([self.process.stdout], [], [], LIMIT)[0]
        reply = b"" if late else self.process.stdout.readline()
        if not reply: self.stop()
        status, seconds = json.loads(reply) if reply else (f"no exit status within {LIMIT} s", None)
        return status, self.log.read_text(errors="replace") if self.log.exists() else "", seconds


@pytest.fixture(scope="session")
def run_notebook(tmp_path_factory):
    "From the path of a notebook to its exit status, output and CPU seconds: a fork on Linux, a new process elsewhere."
    if sys.platform != "linux":
        def run(path):
            done = subprocess.run(**command(path), capture_output=True, text=True, timeout=LIMIT)
            return done.returncode, done.stdout + done.stderr, None
        yield run
        return
    server = Server(tmp_path_factory.mktemp("notebook") / "log")
    yield server.run
    if server.process: server.stop()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_notebook(path, run_notebook, record_property):
    status, output, seconds = run_notebook(path)
    record_property("cpu_seconds", seconds)
    assert status == 0, f"{status}\n{output[-8000:]}"


def test_there_are_notebooks(): assert len(NOTEBOOKS) > 3
