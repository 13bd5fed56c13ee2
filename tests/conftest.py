"""What the tests share: one thread, and the inputs that the golden values were computed on."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)
# `quick` is the default: the same examples each time, and failures are reported as they come, without shrinking.
# `deep` draws new examples, ten times as many, and shrinks: HYPOTHESIS_PROFILE=deep pytest tests/test_properties.py
_common = dict(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
settings.register_profile("quick", derandomize=True, print_blob=False, **_common,
                          phases=[Phase.explicit, Phase.generate])
settings.register_profile("deep", print_blob=True, max_examples=1000, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def examples(n):
    "Settings for a test: `n` examples in the profile `quick`, ten times as many in `deep`."
    deep = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
    return settings(max_examples=10 * n if deep else n)


GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def golden_inputs(case):
    "Unit embeddings (float64) and 3-level labels of a golden case; the recipe is in golden.json."
    B, D = case["B"], case["D"]
    fine = np.arange(B) // case["m"]
    labels = np.stack([fine, fine // case["c"], fine // case["c"] // 2], 1)
    r = np.random.RandomState(case["seed"])
    if case["kind"] == "random": x = r.standard_normal((B, D))
    else:
        C, G, E = (r.standard_normal((n, D)) for n in (labels[-1, 0] + 1, labels[-1, 1] + 1, B))
        x = C[labels[:, 0]] + 0.6 * G[labels[:, 1]] + 0.8 * E
    return torch.tensor(x / np.sqrt((x ** 2).sum(1, keepdims=True))), torch.tensor(labels)


@pytest.fixture
def blocks():
    "The rank engine without the kernels that are installed."
    from hapnb.ranking import without_kernels
    with without_kernels(): yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Let each process begin with its part of the notebooks, the longest tests: all end at about the same time.

    The first process begins with the studies. They share features of images, for which a second one would wait.
    """
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    others = [i for i in items if i.path.name != "test_notebooks.py"]
    notebooks = [i for i in items if i.path.name == "test_notebooks.py"]
    notebooks.sort(key=lambda i: "[studies/" not in i.name)
    items.clear()
    # xdist gives each process neighbours: first as many as there are for each
    for left in range(processes, 0, -1):
        mine, more = len(notebooks) // left, len(others) // left
        items += notebooks[:mine] + others[:more]
        notebooks, others = notebooks[mine:], others[more:]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU; HAPNB_GPU_DEVICE=cpu rehearses these tests without one")


def pytest_runtest_setup():
    "Seed torch before each test: it may begin with other numbers in each process."
    torch.manual_seed(0)


@pytest.fixture
def golden(): return GOLDEN
