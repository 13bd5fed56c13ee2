"""Check hapnb on a machine with one GPU, in at most 8 minutes and without a network: values, training, time and memory.

It writes a JSON file and a Markdown table after each result, so that a kill loses nothing. The exit status is 1 if a
part failed. `--device cpu` rehearses every line with small sizes (TRITON_INTERPRET=1 includes the Triton kernel)."""
import argparse, contextlib, gc, json, math, os, re, signal, statistics, subprocess, sys, tempfile, time, traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import gpu_kit as kit
from hapnb import kernels, measure
from hapnb.config import RunConfig
from hapnb.data import load
from hapnb.helpers import KERNELS, atomic_path, hardware
from hapnb.metrics import evaluate, recall_at_k
from hapnb.ranking import Leaky, Sigmoid, Step, Sup, without_kernels
from hapnb.retrieval import import_faiss
from hapnb.runs import environment
from hapnb.samplers import MPerClassSampler
from hapnb.tables import markdown_rows
from hapnb.train import run

RANK = [n for n in kit.NAMES if re.search("AP|Recall|NDCG|HAPPIER|ROADMAP", n) and not re.search("Fast|Soft|Black", n)]
SIZES = {
    "full": dict(losses=kit.NAMES, batches=(256, 512, 1024, 2048, 4096, 8192), dim=512, call=8., plain=2048,
                 queries=20_000, tests=(), part=None, run=dict(epochs=4),
                 kernels=((256, 252, 4), (1024, 1020, 4), (1024, 512, 512), (4096, 4092, 4), (4096, 2048, 2048))),
    "small": dict(losses=kit.NAMES, batches=(32, 64, 128), dim=64, call=.5, plain=64,
                  queries=2000, tests=(), part=72, run=dict(epochs=2, image_size=64, batch_size=16),
                  kernels=((4, 28, 4), (8, 40, 24), (4, 1000, 2))),
    "tiny": dict(losses=("SupAPLoss", "HAPLoss", "NormSoftmaxLoss"), batches=(16, 32, 64), dim=8, call=.05, plain=16,
                 queries=100, tests=("-k", "metrics"), part=None, kernels=((2, 8, 3),),
                 run=dict(epochs=2, dataset="toy", trunk="toy", image_size=32, batch_size=24, embed_dim=16)),
}


class OutOfTime(Exception): "A part used more than its time."


class Check:
    "What all parts share: the device, sizes, the report, and where it is written."
    def __init__(self, device, size, minutes, out, name):
        self.device, self.size, self.began, self.seconds = device, size, time.monotonic(), 60 * minutes
        self.path, self.settings = Path(out) / name, SimpleNamespace(**SIZES[size])
        self.report = dict(device=str(device), hardware=hardware(str(device)), size=size,
                           began=time.strftime("%Y-%m-%d %H:%M:%S"), seconds=0., passed=None, parts={})

    def elapsed(self): return time.monotonic() - self.began

    def write(self):
        "Write both files, each under a temporary name first."
        self.report["seconds"] = round(self.elapsed(), 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for ending, text in ((".json", json.dumps(self.report, indent=1) + "\n"), (".md", markdown(self.report))):
            with atomic_path(self.path.with_name(self.path.name + ending)) as to: to.write_text(text, encoding="utf-8")


class Part:
    "One part of the report: its rows, remarks and problems, and how much time it has left."
    def __init__(self, check, name, seconds):
        self.check, self.name, self.began, self.seconds = check, name, time.monotonic(), seconds
        self.found = dict(status="running", seconds=0., budget=round(seconds, 1), notes=[], problems=[], rows=[])
        check.report["parts"][name] = self.found

    def left(self): return self.seconds - (time.monotonic() - self.began)

    def say(self, text): print(f"[{self.check.elapsed():5.0f} s] {self.name}: {text}", flush=True)

    def row(self, **values):
        "Add a row of results; what is no finite number is kept as text."
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.found["rows"].append(plain)
        self.say(", ".join(f"{k} {shown(v)}" for k, v in plain.items()))
        self.check.write()

    def note(self, text):
        self.found["notes"].append(text)
        self.say(text)

    def problem(self, text):
        self.found["problems"].append(text)
        self.say(f"PROBLEM: {text}")


def shown(v):
    "A value in a table."
    if v is None: return "-"
    if isinstance(v, bool): return "yes" if v else "no"
    return f"{v:.3g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)


def markdown(report):
    "The report as Markdown: a line per part, then the rows of each part."
    state = {None: "not finished", True: "all parts passed", False: "a part FAILED"}[report["passed"]]
    text = ["# GPU check", "", f"{report['hardware']}. Device `{report['device']}`, sizes: {report['size']}. Began "
            f"{report['began']}, took {report['seconds']:.0f} s: **{state}**.", ""]
    head = ["part", "result", "seconds", "of at most", "problems"]
    text += markdown_rows(head, [[n, p["status"], shown(p["seconds"]), shown(p["budget"]), shown(len(p["problems"]))]
                                 for n, p in report["parts"].items()], 2)
    for name, p in report["parts"].items():
        text += ["", f"## {name}", ""]
        text += [f"- {n}" for n in p["notes"]] + [f"- **Problem**: {x}" for x in p["problems"]]
        rows = by_batch(p["rows"]) if name == "speed" else p["rows"]
        columns = list(dict.fromkeys(k for r in rows for k in r))
        if columns: text += ["", *markdown_rows(columns, [[shown(r.get(c)) for c in columns] for r in rows], 1)]
        if p.get("error"): text += ["", "```", p["error"].rstrip(), "```"]
    return "\n".join(text) + "\n"


def by_batch(rows):
    "The rows of `speed` with one column per batch size."
    out = {}
    for r in rows:
        here = out.setdefault((r["loss"], r["method"]), dict(loss=r["loss"], method=r["method"]))
        here[f"B = {r['B']}"] = r.get("result") or f"{shown(r['ms'])} ms, {shown(r['MB'])} MB"
    return list(out.values())


# parts

def about(part):
    "What computes."
    found = environment(part.check.device)
    for k, v in found.items():
        if k not in ("host", "system"): part.row(what=k, value=str(v))
    part.row(what="threads and load", value=f"{measure.machine(str(part.check.device))}. {measure.others_load()}")
    if part.check.device.type != "cuda": return part.note("a rehearsal on the CPU: times say nothing about a GPU")
    gpu = torch.cuda.get_device_properties(part.check.device)
    part.row(what="GPU", value=f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} SMs, "
                               f"compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}")


def losses(part):
    "Values and gradients of every loss against the CPU."
    for name in part.check.settings.losses:
        for method in kit.methods(name):
            for dtype, most in kit.TOLERANCE.items():
                value, grad = kit.loss_errors(name, method, dtype, part.check.device)
                part.row(loss=name, method=method, dtype=str(dtype)[6:], value_error=value, gradient_error=grad)
                if not max(value, grad) < most: part.problem(f"{name} ({method}, {dtype}): more than {most:g}")


def metrics(part):
    "Metrics against the CPU, and how long they take."
    N = part.check.settings.queries // 5
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        error, n = kit.metric_error(dtype, part.check.device, N // 2)
        part.row(dtype=str(dtype)[6:], images=N // 2, metrics=n, largest_error=error)
        if not error < most: part.problem(f"metrics in {dtype} differ by {error:g}")
    emb, labels = kit.images(N, 64)
    emb = emb.to(part.check.device)
    seconds = timed(lambda: evaluate(emb, labels, device=part.check.device), part.check.device, 3)
    part.row(dtype="float32", images=N, seconds=seconds)


def kernel(part):
    "The Triton kernel against plain PyTorch: values and time."
    device = part.check.device
    if not kernels.available(device):
        if device.type == "cuda": return part.problem("Triton is not installed, or does not work here")
        return part.note("not run: set TRITON_INTERPRET=1 to run the kernel in Triton's interpreter")
    for Q, W, P in part.check.settings.kernels:
        for f in (Step(), Sigmoid(), Sup(), Leaky()):
            if part.left() < 2: return part.note("stopped here: no time left")
            compare_kernel(part, f, kit.kernel_inputs(torch.float32, Q, W, P, device))


def compare_kernel(part, f, inputs):
    "One row: a kernel's sums and derivatives, and those of plain PyTorch."
    def both(sums, pull):
        def call(s, k, outer): return (sums(f, s, k), *(pull(f, s, k, outer) if f.smooth else ()))
        return call
    mine, plain = both(kernels.sums, kernels.pull), both(kernels._plain_sums, kernels._plain_pull)
    (s, k, _), device = inputs, part.check.device
    # float64 of a few queries says which of the two is nearer
    few = [t[:8].double() for t in inputs]
    exact = plain(*few)
    errors = [max(map(kit.far, way(*(t[:8] for t in inputs)), exact)) for way in (mine, plain)]
    a, b = (timed(lambda: way(*inputs), device, 3) for way in (mine, plain))
    part.row(surrogate=type(f).__name__, Q=len(s), W=s.shape[1], P=k.shape[1], kernel_ms=1e3 * a, plain_ms=1e3 * b,
             times_faster=b / a, kernel_ps_per_triple=1e12 * a / (s.numel() * k.shape[1]), kernel_error=errors[0],
             plain_error=errors[1])
    if not errors[0] < max(1e-5, 3 * errors[1]): part.problem(f"{f} at {tuple(s.shape)}: error {errors[0]:g}")


def tests(part):
    "The tests marked `gpu`."
    marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    if not marked: return part.problem("no test is marked `gpu`")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short",
               *part.check.settings.tests, *map(str, marked)]
    # the parts that count run without the interpreter
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= dict(HAPNB_GPU_DEVICE=str(part.check.device))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=max(part.left(), 1))
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error|deselected)", done.stdout)}
    part.row(files=" ".join(p.name for p in marked), **counts)
    if done.returncode or not counts.get("passed"):
        part.problem(f"pytest ended with status {done.returncode}")
        part.found["error"] = (done.stdout + done.stderr)[-6000:]


def training(part):
    "Train the whole network on bundled images in bf16: the loss falls and R@1 rises above the frozen start."
    o, device = part.check.settings, part.check.device
    cfg = RunConfig(freeze="bn", precision="bf16", loss="SupAPLoss", lr=1e-3, groups={"trunk": {"lr": 1e-4}},
                    metrics=("R@1",), ks=(1,)).replace(**o.run)
    data = tuple(load(cfg.dataset, s) for s in ("train", "test"))
    if o.part: data = tuple(d.subset(range(o.part)) for d in data)
    images = len(MPerClassSampler(data[0].labels, cfg.batch_size, m=4)) * cfg.batch_size
    part.note(f"{cfg.trunk}, {cfg.image_size} pixels, batches of {cfg.batch_size}, {images} images per epoch, bf16, "
              f"{cfg.loss}")
    def each(row):
        seconds = row["seconds"]
        part.row(epoch=row["epoch"], loss=row["loss"], seconds=seconds, images_per_second=images / seconds)
    with tempfile.TemporaryDirectory() as store:
        workers = None if device.type == "cuda" else 0
        go = lambda c, **k: run(c, store, device, progress=False, save_every=1e9, workers=workers, data=data, **k)
        start = go(cfg.replace(epochs=0))
        part.say(f"frozen start: {start.metrics}")
        end = go(cfg, on_epoch=each)
        conclude_training(part, start.metrics, end.metrics, list(end.history["loss"]))


def conclude_training(part, start, end, loss):
    "Remarks and problems of a finished training."
    name = "R@1_level0"
    part.note(f"{name}: {start[name]:.4f} before, {end[name]:.4f} after {len(loss)} epochs; loss {loss[0]:.4f} to "
              f"{loss[-1]:.4f}")
    if not all(map(math.isfinite, (*loss, end[name]))): part.problem("a loss or R@1 is not finite")
    if part.check.size != "full": return
    if not loss[-1] < loss[0]: part.problem("the loss did not fall")
    if not end[name] > start[name]: part.problem(f"{name} did not rise above the frozen start")


def faiss(part):
    "R@k by faiss, on the GPU where faiss sees one, against `evaluate`."
    try: library = import_faiss()
    except ImportError as e: return part.note(f"not run: {e}")
    gpus, device = getattr(library, "get_num_gpus", int)(), part.check.device
    part.note(f"faiss {library.__version__} sees {gpus} GPUs" + ("" if gpus else ": it searches on the CPU"))
    emb, labels = kit.images(part.check.settings.queries, 64)
    took = {}
    def search(): took["found"] = recall_at_k(emb, labels, device=device)
    seconds = timed(search, device, 1)
    want = evaluate(emb, labels, metrics="R@k", device=device)
    error = max(abs(took["found"][k] - v) for k, v in want.items() if k.startswith("R@"))
    part.row(images=len(emb), gpus=gpus, seconds=seconds, largest_error=error)
    if not error < 1e-3: part.problem(f"R@k by faiss differs by {error:g}")


def speed(part):
    "Memory and time of every loss, from the smallest batch to the largest."
    o, known, stopped = part.check.settings, {}, set()
    for B in o.batches:
        emb, labels = kit.images(B, o.dim)
        emb, labels = emb.to(part.check.device).requires_grad_(), labels.to(part.check.device)
        for name in o.losses:
            for method in ways(part, name, B):
                key = name, method
                found = measure_loss(part, key, emb, labels, known.setdefault(key, []), key in stopped)
                if "result" in found: stopped.add(key)
                part.row(loss=name, method=method, B=B, **found)
        compare_methods(part, B)


def ways(part, name, B):
    "The methods of a loss; on a GPU also the direct one without the kernel, up to some size."
    plain = name in RANK and part.check.device.type in KERNELS and B <= part.check.settings.plain
    return (*kit.methods(name), *["no kernel"] * plain)


def measure_loss(part, key, emb, labels, known, stopped):
    "Milliseconds, megabytes and value of a step; or why it was not measured."
    (name, method), device = key, part.check.device
    expected = predicted(known)
    if stopped or expected > part.check.settings.call:
        known.append(expected)
        return dict(result=f"not measured: would take {expected:.2g} s")
    # one call, four timed ones, one that is watched
    if 6 * expected > part.left() - 3: return dict(result="not measured: no time left")
    direct = "direct" if "method" in kit.takes(name) else None
    loss = kit.build(name, emb.shape[1], max(len(emb) // 4, 1), method=direct if method == "no kernel" else method)
    loss = loss.to(device)
    def step():
        emb.grad = None
        value = loss(emb, labels)
        value.backward()
        return value
    try:
        with without_kernels(device.type) if method == "no kernel" else contextlib.nullcontext():
            value, seconds = step().item(), timed(step, device, 3)
            memory = measure.peak_memory(step, device)
    except torch.OutOfMemoryError: return dict(result="not measured: out of memory")
    finally: gc.collect()
    known.append(seconds)
    if not math.isfinite(value): part.problem(f"{name} ({method}) at B = {len(emb)} is {value}")
    return dict(ms=1e3 * seconds, MB=memory / 1e6, value=value)


def predicted(known):
    "The next of a series of times, for a batch of twice the size: between 2 and 8 times the last."
    if len(known) < 2: return 8 * sum(known)
    return known[-1] * min(max(known[-1] / known[-2], 2), 8)


def compare_methods(part, B):
    "All methods of a loss must give the same value."
    values = {}
    for r in part.found["rows"]:
        if r["B"] == B and "value" in r: values.setdefault(r["loss"], {})[r["method"]] = r["value"]
    for name, found in values.items():
        if name == "BlackBoxAPLoss": continue
        numbers = [v for v in found.values() if isinstance(v, float)]
        if max(numbers) - min(numbers) > 1e-4 * max(1., abs(numbers[0])):
            part.problem(f"{name} at B = {B}: {found}")


def timed(f, device, repeats):
    "Median seconds of some calls, after one that does not count; a single one where that took more than 2 seconds."
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for i in range(repeats + 1):
        sync()
        began = time.perf_counter()
        f()
        sync()
        seconds.append(time.perf_counter() - began)
        if seconds[0] > 2: break
    return statistics.median(seconds[1:] or seconds)


# the whole

# at most so many seconds of 480; `speed` is last and takes what is left
PARTS = {"about": (about, 10), "losses": (losses, 50), "metrics": (metrics, 30), "kernel": (kernel, 50),
         "tests": (tests, 110), "faiss": (faiss, 30), "training": (training, 100), "speed": (speed, 480)}


@contextlib.contextmanager
def limit(seconds):
    "Stop what is inside after some time, where the system has alarms."
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    def stop(*_): raise OutOfTime(f"stopped after {seconds:.0f} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(check, name):
    "Run one part and keep what it found or how it failed."
    function, seconds = PARTS[name]
    rest = check.seconds - check.elapsed() - 5
    part = Part(check, name, max(min(seconds * check.seconds / 480, rest), 1.))
    part.say(function.__doc__)
    try:
        with limit(min(part.seconds * 1.3, max(rest, 1.))): function(part)
    # whatever goes wrong belongs into the report, and the next part can still be of use
    except Exception:
        part.found["error"] = traceback.format_exc()
        part.problem(traceback.format_exc().strip().splitlines()[-1])
    part.found["status"] = "FAILED" if part.found["problems"] else "passed"
    part.found["seconds"] = round(time.monotonic() - part.began, 1)
    part.say(part.found["status"])
    check.write()
    return not part.found["problems"]


def options(arguments):
    "Read the command line."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda", help="cuda (default), cuda:1, or cpu for a rehearsal")
    p.add_argument("--size", choices=list(SIZES), help="default: full on a GPU, small on the CPU")
    p.add_argument("--out", type=Path, help="folder of the results; default: figures/90_speed, on a CPU runs/gpu_check")
    p.add_argument("--name", default="gpu", help="of both files, without ending (default: gpu)")
    p.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    p.add_argument("--minutes", type=float, default=8., help="for all parts together (default: 8)")
    o = p.parse_args(arguments)
    o.parts = o.parts.split(",")
    unknown = [n for n in o.parts if n not in PARTS]
    if unknown: p.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if not 0 < o.minutes < 1e4: p.error("--minutes must be above 0")
    return o


def main(arguments=None):
    "Run the parts; 0 if all passed, 1 if one failed, 2 if there is no such device."
    o = options(arguments)
    try: device = torch.zeros(1, device=o.device).device
    except (RuntimeError, AssertionError) as e:
        print(f"device {o.device!r} cannot be used here: {str(e).splitlines()[0]}\n--device cpu rehearses the check.")
        return 2
    small = device.type == "cpu"
    # threads that wait for each other make small sizes slow
    if small: torch.set_num_threads(1)
    out = o.out or ROOT / ("runs/gpu_check" if small else "figures/90_speed")
    check = Check(device, o.size or ("small" if small else "full"), o.minutes, out, o.name)
    passed = [run_part(check, name) for name in o.parts]
    check.report["passed"] = all(passed)
    check.write()
    print(f"{sum(passed)} of {len(passed)} parts passed in {check.elapsed():.0f} s: {check.path}.json and .md")
    return 0 if all(passed) else 1


if __name__ == "__main__": sys.exit(main())
