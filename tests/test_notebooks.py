"""Every notebook runs from top to bottom, each in a process of its own, and shows the texts that are stored in it."""
import json, os, select, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
BEGAN = str(time.time())  # a study must train, not read back what an older version of the code left in the store
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
             if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT / "nbs").parts)
             and not (p.parent / ".notest").exists()]
LIMIT = 900


def command(*args):
    "Arguments of `Popen` for `tests/notebook.py`."
    env = {**os.environ, "MPLBACKEND": "agg", "IN_TEST": "1", "HAPNB_FORCE": BEGAN,
           "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): env.setdefault(threads, "1")
    return dict(args=[sys.executable, str(ROOT / "tests" / "notebook.py"), *map(str, args)], cwd=ROOT, env=env)


class Server:
    "Runs notebooks in forks of one process that has imported PyTorch."
    def __init__(self, log, libraries=()):
        self.log, self.libraries, self.process = log, libraries, None

    def begin(self, path):
        "Start a notebook, and the server if there is none."
        if not self.process or self.process.poll() is not None:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.process = subprocess.Popen(**command("--serve", *self.libraries), **pipes)
        self.process.stdin.write(json.dumps([str(path), str(self.log)]).encode() + b"\n")
        self.process.stdin.flush()

    def stop(self):
        "End the server and the notebook that it runs, if any."
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def run(self, path):
        "Exit status, output and CPU seconds of a notebook."
        self.begin(path)
        late = not select.select([self.process.stdout], [], [], LIMIT)[0]
        reply = b"" if late else self.process.stdout.readline()
        if not reply: self.stop()
        status, seconds = json.loads(reply) if reply else (f"no exit status within {LIMIT} s", None)
        return status, self.log.read_text(errors="replace") if self.log.exists() else "", seconds


def run_alone(path):
    "Exit status and output of a notebook in a process that imports everything itself."
    done = subprocess.run(**command(path), capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stdout + done.stderr, None


def forked(path):
    "Whether a notebook can be forked: Linux only, and Triton's interpreter must be chosen before Triton is imported."
    return sys.platform == "linux" and "TRITON_INTERPRET" not in path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def run_notebook(tmp_path_factory):
    "From the path of a notebook to its exit status, output and CPU seconds."
    server = Server(tmp_path_factory.mktemp("notebook") / "log")
    yield lambda path: server.run(path) if forked(path) else run_alone(path)
    if server.process: server.stop()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_notebook(path, run_notebook, record_property):
    status, output, seconds = run_notebook(path)
    record_property("cpu_seconds", seconds)
    assert status == 0, f"{status}\n{output[-8000:]}"


def test_there_are_notebooks(): assert len(NOTEBOOKS) > 3


def write_notebook(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), path)
    return path


linux = pytest.mark.skipif(sys.platform != "linux", reason="notebooks are not forked here")


@linux
def test_a_notebook_that_fails_is_red_and_each_begins_anew(tmp_path):
    server = Server(tmp_path / "log", ["json"])
    good = write_notebook(tmp_path / "good.ipynb", "import sys, hapnb", "assert not hasattr(hapnb, 'x')", "hapnb.x = 1")
    bad = write_notebook(tmp_path / "bad.ipynb", "print('before')", "1 / 0")
    assert [server.run(good)[0] for _ in range(2)] == [0, 0], "the second sees what the first did"
    status, output, _ = server.run(bad)
    assert status == 1 and "ZeroDivisionError" in output
    assert server.run(write_notebook(tmp_path / "dies.ipynb", "import os; os.kill(os.getpid(), 9)"))[0] == -9
    server.stop()


@linux
@pytest.mark.parametrize("end", ["the tests are killed", "the server is killed"])
def test_no_notebook_outlives_the_tests(tmp_path, end):
    server, note = Server(tmp_path / "log", ["json"]), tmp_path / "pid"
    cells = "import subprocess, sys, pathlib, os", "p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1)"
    server.begin(write_notebook(tmp_path / "long.ipynb", *cells, f"pathlib.Path({str(note)!r}).touch()", "p.wait()"))
    for _ in range(600):
        if note.exists(): break
        time.sleep(0.1)
    family = psutil.Process(server.process.pid).children(recursive=True)
    # the notebook and its own process, and with some versions of Python a tracker of resources
    assert len(family) >= 2
    # a test process that is killed closes its end of the pipe
    if end == "the server is killed": server.process.send_signal(signal.SIGKILL)
    server.stop()
    assert not psutil.wait_procs(family, timeout=20)[1]
