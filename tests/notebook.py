"""Run notebooks as `nbdev_test` does, and let coverage see exported cells as lines of the module they make.

`python tests/notebook.py nbs/X.ipynb` runs one notebook and compares its outputs with the stored ones; with
`--outputs FILE` it writes them there. `python tests/notebook.py --serve` imports the libraries once
and then forks one process for each path that it reads from standard input, so that 80 notebooks do not import PyTorch
80 times. A fork imports `hapnb` itself: each notebook starts with the state of a new process. Studies start workers,
which `multiprocessing` forks from a server of its own; such a server is ready too, with the same libraries.

nbdev_test runs a cell under a made-up file name, so the tests that stand beside the code would count for nothing.
Here an exported cell keeps the file name and the line numbers that it has in `hapnb/`.
"""
import ast, base64, contextlib, ctypes, gc, importlib, io, json, multiprocessing.util, os, re, select, signal, socket
import sys, threading
from pathlib import Path

import nbdev.test
from execnb.shell import CaptureShell
from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

ROOT = Path(__file__).resolve().parents[1]
# What the notebooks import most, by time. None of these starts a thread pool or touches a GPU when it is imported.
LIBRARIES = ("torch", "torch._dynamo", "torchvision.transforms.v2", "timm", "pandas", "matplotlib.pyplot", "seaborn",
             "scipy.stats", "scipy.optimize", "sklearn.cluster", "sklearn.manifold", "sklearn.neighbors",
             "accelerate", "optuna", "pydantic", "papermill", "nbclient", "safetensors.torch", "fastcore.test")
# coverage must begin after the fork: one measurement per notebook
COVERAGE = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")


def exported_cells():
    "Map the id of each exported cell to (module path, line of its marker)."
    return {m[1]: (str(path), n) for path in sorted((ROOT / "hapnb").glob("*.py"))
            for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if (m := re.match(r"# %% \S+ #(\w+)$", line))}


class InPlace(CachingCompiler):
    "Compile a cell under the name and line numbers given by `place`, if any."
    place = None

    def cache(self, *args, **kwargs): return self.place[0] if self.place else super().cache(*args, **kwargs)

    def ast_parse(self, *args, **kwargs):
        tree = super().ast_parse(*args, **kwargs)
        return ast.increment_lineno(tree, self.place[1]) if self.place else tree


class Results(DisplayHook):
    "Add the value of a cell to what it has shown."
    def write_output_prompt(self): pass
    def log_output(self, format_dict): pass
    def quiet(self): return self.semicolon_at_end_of_expression(self.shell.code)
    def write_format_data(self, data, metadata=None): self.shell.show("execute_result", data=data, metadata=metadata)


class Displays(DisplayPublisher):
    "Add what is displayed to what the cell has shown."
    def publish(self, data, metadata=None, *args, **kwargs):
        self.shell.show("display_data", data=data, metadata=metadata or {})

    def clear_output(self, wait=False): self.shell.shown.clear()


class Prints(io.TextIOBase):
    "Add what is printed to what the cell has shown."
    def __init__(self, shell): self.shell = shell
    def writable(self): return True

    def write(self, text):
        self.shell.show("stream", name="stdout", text=text)
        return len(text)


def draw(figure):
    "A figure as JupyterLab shows it, at 80 dpi and without the version of matplotlib, and a text in its place."
    if not figure.axes: return None
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
    titles = [figure.get_suptitle(), *(a.get_title() for a in figure.axes)]
    axes = [f"{n}: {t}" for a in figure.axes for n, t in (("x", a.get_xlabel()), ("y", a.get_ylabel())) if t]
    alt = "; ".join(dict.fromkeys(t.replace("\n", " ") for t in (*titles, *axes) if t))
    return base64.b64encode(file.getvalue()).decode(), {"alt": alt[:300]}


class Shell(CaptureShell):
    "The shell of nbdev_test, with exported cells in their place; it keeps what each cell shows, in order."
    compiler_class, displayhook_class, display_pub_class = InPlace, Results, Displays
    places, outputs = exported_cells(), {}

    def __init__(self, path):
        self.shown, self.code = [], ""
        # "retina" would draw four times the pixels
        super().__init__(path, mpl_format="png")
        from matplotlib.figure import Figure
        self.display_formatter.formatters["image/png"].for_type(Figure, draw)

    def show(self, kind, **output):
        "Add an output, with pictures as text."
        for k, v in output.get("data", {}).items():
            if isinstance(v, bytes): output["data"][k] = base64.b64encode(v).decode()
        self.shown.append(dict(output_type=kind, **output))

    def run(self, code, **kwargs):
        "Run the code of a cell; its outputs are in `shown`."
        self.shown, self.code = [], code
        with contextlib.redirect_stdout(Prints(self)), contextlib.redirect_stderr(io.StringIO()):
            done = InteractiveShell.run_cell(self, code)
        self.result, self.exc = done.result, done.error_in_exec or done.error_before_exec

    def cell(self, cell, **kwargs):
        self.compile.place = self.places.get(cell.get("id"))
        super().cell(cell, **kwargs)
        if cell.cell_type == "code": self.outputs[cell.id] = self.shown


def run(path):
    "Run a notebook in this process; True if every cell passed."
    nbdev.test.CaptureShell = Shell
    flags = nbdev.test.get_config().tst_flags.split()
    return nbdev.test.test_nb(Path(path).resolve(), skip_flags=flags, basepath=ROOT)[0]


def compare(path):
    "Print what differs between the outputs of the notebook that ran and the stored ones; True if nothing does."
    sys.path.append(str(ROOT / "tools"))
    import render
    found = list(render.differences(Path(path).resolve(), Shell.outputs))
    if found: print(*found, f"If it is right: make render ARGS={path}", sep="\n", file=sys.stderr)
    return not found


def wait_for(child):
    "Exit status and CPU seconds of `child`. If standard input closes first, the tests are gone: end its whole group."
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid: return os.waitstatus_to_exitcode(status), round(used.ru_utime + used.ru_stime, 2)
        if select.select([sys.stdin], [], [], .02)[0]:
            os.killpg(child, signal.SIGKILL)
            sys.exit(1)


def die_with_parent():
    "Let the kernel kill this process when its parent dies, however it dies (PR_SET_PDEATHSIG)."
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def lend_libraries():
    "Fork a process that becomes the server of workers when `multiprocessing` starts one; else it ends with this one."
    ours, its = socket.socketpair()
    spare, start = os.fork(), multiprocessing.util.spawnv_passfds
    if not spare:
        ours.close()
        serve_workers(its)
    its.close()

    def spawnv_passfds(path, args, passed):
        "Start a process as before, except the first server of workers."
        if "multiprocessing.forkserver" not in args[-1] or len(passed) != 2 or ours.fileno() < 0:
            return start(path, args, passed)
        with ours:
            socket.send_fds(ours, [b"!"], passed)
            ours.sendall(json.dumps([args[-1], dict(os.environ), sys.path, os.getcwd()]).encode())
        return spare
    multiprocessing.util.spawnv_passfds = spawnv_passfds


def serve_workers(pipe):
    "Wait for the files and the command of a server of workers, and run it as a new interpreter would."
    die_with_parent()
    sign, files, *_ = socket.recv_fds(pipe, 1, 2)
    if not sign: os._exit(0)
    with pipe.makefile() as text: command, environment, sys.path[:], folder = json.load(text)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    command, n = re.subn(r"main\(\d+, \d+", "main({}, {}".format(*files), command)
    assert n == 1, command
    exec(command)


def become_child(log, environment):
    "Make the fork a process like any other: its own group, its output in `log`, no way to outlive the server."
    os.setpgid(0, 0)
    die_with_parent()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    empty = os.open(os.devnull, os.O_RDONLY)
    for new, old in ((empty, 0), (out, 1), (out, 2)): os.dup2(new, old)
    lend_libraries()
    os.environ.update(environment)
    if any(name in os.environ for name in COVERAGE):
        import coverage
        coverage.process_startup()


def serve(libraries):
    "Fork for each line `[path, log]` of standard input and print `[status, CPU seconds]`; returns the path in a fork."
    measured = {name: os.environ.pop(name) for name in COVERAGE if name in os.environ}
    for name in libraries: importlib.import_module(name)
    assert threading.active_count() == 1 and not any(name.split(".")[0] == "hapnb" for name in sys.modules)
    # the collector leaves what was imported alone, so forks share its memory
    gc.collect()
    gc.freeze()
    while line := sys.stdin.buffer.raw.readline():
        path, log = json.loads(line)
        child = os.fork()
        if not child:
            become_child(log, measured)
            return path
        print(json.dumps(wait_for(child)), flush=True)


if __name__ == "__main__":
    path, *asked = sys.argv[1:]
    if path == "--serve": path, asked = serve(asked or LIBRARIES), []
    if path is None: sys.exit()
    passed = run(path)
    if asked: Path(asked[1]).write_text(json.dumps(Shell.outputs), encoding="utf-8")
    sys.exit(not (passed and (asked or compare(path))))
