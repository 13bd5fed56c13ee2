"""Results on other processors.

torch, numpy, MKL, OpenBLAS, oneDNN and faiss choose their instructions by the processor, and the environment can
make them choose those of an older one. A probe runs under each of these settings. Numbers may differ from those of this
machine within the tolerances below. Decisions (neighbours, clusters) may not differ at all: no two distances of the
inputs are equal."""
import json, os, subprocess, sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# MKL_ENABLE_INSTRUCTIONS has an effect on processors of Intel, MKL_CBWR on all. numpy's sorts are not stable by
# default: with other instructions they leave equal values in another order.
SETTINGS = {
    "this machine": {},
    "AVX2": dict(ATEN_CPU_CAPABILITY="avx2", NPY_DISABLE_CPU_FEATURES="AVX512", MKL_CBWR="AVX2",
                 MKL_ENABLE_INSTRUCTIONS="AVX2", OPENBLAS_CORETYPE="Haswell", ONEDNN_MAX_CPU_ISA="AVX2",
                 FAISS_SIMD_LEVEL="AVX2"),
    "oldest": dict(ATEN_CPU_CAPABILITY="default", NPY_DISABLE_CPU_FEATURES="all", MKL_CBWR="COMPATIBLE",
                   MKL_ENABLE_INSTRUCTIONS="SSE4_2", OPENBLAS_CORETYPE="Nehalem", ONEDNN_MAX_CPU_ISA="SSE41",
                   FAISS_SIMD_LEVEL="NONE", GLIBC_TUNABLES="glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
                   OMP_NUM_THREADS="2", MKL_NUM_THREADS="2", OMP_WAIT_POLICY="passive"),
}

# How far a number may be from its reference, relative to the larger of 1 and the reference.
TOLERANCES = {
    "golden float64": 1e-6,  # values of the official code
    "float64": 1e-9,  # the same computation on this machine
    "float32": 1e-4,  # losses, gradients and embeddings in float32
    "metric": 1e-6,  # a rank that changes moves a metric of these inputs by more
    "training": 2e-3,  # losses of ten steps, over which rounding grows
}

PROBE = """
import hashlib, json, sys
sys.path.insert(0, "tests")
import numpy as np, torch, torch.nn.functional as F
from conftest import GOLDEN, golden_inputs
from test_golden import NAMES, build, value_and_grad

threads = int(sys.argv[1])
torch.set_num_threads(threads)
numbers, decisions = {}, {}
def number(kind, name, x):
    x = x.detach().double() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)
    numbers[name] = [kind, x.ravel().tolist()]

# losses, on the inputs of the golden values
for case in GOLDEN["cases"]:
    emb, labels = golden_inputs(case)
    for name in NAMES:
        want = case["losses"][name]
        loss, levels = build(name, want["params"], case, labels, "cosine")
        value, grad = value_and_grad(loss, emb, labels[:, :levels])
        number("golden float64", f"{case['id']} {name} golden", [value])
        number("float64", f"{case['id']} {name}", [value, *grad.norm(dim=1)])
        value, grad = value_and_grad(loss.float(), emb.float(), labels[:, :levels])
        number("float32", f"{case['id']} {name} float32", [value])

# metrics
from hapnb.metrics import evaluate
for case in GOLDEN["cases"]:
    emb, labels = golden_inputs(case)
    for dtype in (torch.float64, torch.float32):
        found = evaluate(emb.to(dtype), labels, ks=(1, 2, 4))
        number("metric", f"{case['id']} {dtype} metrics", [found[k] for k in sorted(found)])

# k-NN graphs and clusterings: 40 directions and 6 points around each, no two distances equal
from hapnb.clustering import cluster
from hapnb.graphs import knn_graph, training_levels
rng = np.random.RandomState(0)
y = torch.arange(40).repeat_interleave(6)
x = torch.tensor(rng.standard_normal((40, 32))[y] + .4 * rng.standard_normal((240, 32))).float()
graph = knn_graph(x, 12)
decisions["neighbours"] = graph.neighbours.tolist()
number("float32", "similarity", graph.similarity)
decisions["levels"] = [level.nodes.tolist() for level in training_levels(x, y, k=5, levels=3)]
for method, args in (("kmeans", dict(clusters=40)), ("agglomerative", dict(threshold=.5)),
                     ("agglomerative", dict(neighbours=20)), ("hdbscan", dict(min_cluster_size=3, min_samples=1)),
                     ("hdbscan", dict(min_cluster_size=3, min_samples=2, neighbours=None))):
    decisions[f"{method} {args}"] = cluster(x, method, **args).tolist()

# convolutions, and ten steps of training from weights that numpy draws
def filled(net):
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.tensor(rng.standard_normal(p.shape) / max(p[0].numel(), 9) ** .5))
    return net
conv = filled(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3)))
number("float32", "convolutions", conv(torch.tensor(rng.standard_normal((4, 3, 16, 16))).float()).mean((2, 3)))
from hapnb.losses import ROADMAPLoss
head, loss = filled(torch.nn.Linear(32, 16)), ROADMAPLoss()
optimizer, losses = torch.optim.SGD(head.parameters(), lr=.1), []
for _ in range(10):
    optimizer.zero_grad()
    value = loss(head(x), y)
    value.backward()
    optimizer.step()
    losses.append(value.item())
number("training", "ten steps", losses)

# what shows that a setting took effect: which of equal values come first, and the last digits of a product
ties, a = rng.randint(0, 9, 2000).astype(float), rng.standard_normal((200, 77))
digest = lambda x: hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:12]
b = torch.from_numpy(a)
bits = dict(order=digest(np.argsort(ties)), numpy=digest(a @ a.T), torch=digest(b @ b.T), exp=digest(np.exp(a)))
capability = torch.backends.cpu.get_cpu_capability()
print(json.dumps(dict(numbers=numbers, decisions=decisions, bits=bits, capability=capability)))
"""


def environment(setting):
    "The process environment of a setting; numpy's features go by names that depend on its version."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **SETTINGS[setting]}
    if kind := env.get("NPY_DISABLE_CPU_FEATURES"):
        known = "from numpy._core._multiarray_umath import __cpu_dispatch__ as names; print(*names)"
        names = subprocess.run([sys.executable, "-c", known], capture_output=True, text=True).stdout.split()
        chosen = (n for n in names if kind == "all" or n == "X86_V4" or n.startswith(kind))
        env["NPY_DISABLE_CPU_FEATURES"] = " ".join(chosen)
    return env


@lru_cache
def probe(setting):
    "What the probe prints under a setting."
    env = environment(setting)
    command = [sys.executable, "-c", PROBE, env["OMP_NUM_THREADS"]]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@lru_cache
def golden():
    "The values of the official code, by the names that the probe gives them."
    cases = json.loads((ROOT / "tests" / "golden.json").read_text())["cases"]
    losses = ((f"{c['id']} {name} golden", v["value"]) for c in cases for name, v in c["losses"].items())
    return {name: ["golden float64", [value]] for name, value in losses}


def same_groups(a, b):
    "Whether two lists of integers put the same positions together, by whatever numbers."
    return len(set(zip(a, b))) == len(set(a)) == len(set(b))


def far(numbers, wanted):
    "How numbers of a kind are too far from those that are wanted, in words; nothing where they are not."
    (kind, values), (_, wanted) = numbers, wanted
    assert len(values) == len(wanted)
    worst = max(abs(v - w) / max(1., abs(w)) for v, w in zip(values, wanted))
    return "" if worst <= TOLERANCES[kind] else f"off by {worst:.3g}, and {TOLERANCES[kind]:g} is allowed"


def decided(value, wanted):
    "Whether two probes decided alike: the same rows, or the same groups."
    return same_groups(value, wanted) if isinstance(value[0], int) else value == wanted


def differences(found, here):
    "What in a probe's results is too far from the official values or from the results of this machine."
    assert found["numbers"].keys() == here["numbers"].keys() >= golden().keys()
    assert found["decisions"].keys() == here["decisions"].keys()
    wanted = here["numbers"] | golden()
    out = [f"{name}: {words}" for name, x in found["numbers"].items() if (words := far(x, wanted[name]))]
    return out + [f"{name}: other decisions" for name, x in found["decisions"].items()
                  if not decided(x, here["decisions"][name])]


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_agree_with_the_official_values_and_with_this_machine(setting):
    assert not (found := differences(probe(setting), probe("this machine"))), "\n".join(found)


def test_a_difference_is_found():
    here = probe("this machine")
    numbers, decisions = dict(here["numbers"]), dict(here["decisions"])
    for name, (kind, values) in numbers.items():
        moved = values[0] + 3 * TOLERANCES[kind] * max(1., abs(values[0]))
        numbers[name] = [kind, [moved, *values[1:]]]
    for name, value in decisions.items():
        other = value[0] + 1 if isinstance(value[0], int) else value[1]
        decisions[name] = [other, *value[1:]]
    found = differences({**here, "numbers": numbers, "decisions": decisions}, here)
    names = [*numbers, *decisions]
    assert len(found) == len(names) and all(line.startswith(name) for line, name in zip(found, names))


@pytest.mark.parametrize("setting, changed", [
    ("AVX2", {"order", "exp"}), ("oldest", {"order", "exp", "numpy", "torch"})])
def test_the_settings_take_effect(setting, changed):
    "Otherwise the other tests compare this machine with itself."
    here, there = probe("this machine"), probe(setting)
    if here["capability"] != "AVX512": pytest.skip("this processor has nothing newer than AVX2")
    assert there["capability"] == {"AVX2": "AVX2", "oldest": "DEFAULT"}[setting]
    assert changed <= {k for k, v in here["bits"].items() if v != there["bits"][k]}


@pytest.mark.parametrize("setting", ["AVX2", "oldest"])
def test_the_notebook_that_once_failed_elsewhere(setting):
    "46_clustering compares clusterings; a threshold in it stood where the order of equal distances decides."
    env = environment(setting) | {"MPLBACKEND": "agg", "IN_TEST": "1"}
    command = [sys.executable, "tests/notebook.py", "nbs/46_clustering.ipynb"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-6000:] + run.stdout[-2000:]
