"""The cache of features: interruptions, kills, full disks, two processes. `test_damage.py` damages its files."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import hapnb.core
from hapnb import batches
from hapnb.batches import cached_features, fold_batchnorm
from hapnb.models import make_trunk
from test_models import Fake, LITE0, prepare, tiny_trunk


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(batches, "CHUNK", 6)


def features(folder, data=None, trunk=None, **kw):
    return cached_features(
        trunk or tiny_trunk(), Fake() if data is None else data, image_size=32, cache_dir=folder, progress=False, **kw
    )


def test_a_batch_of_bytes_is_prepared_like_single_images():
    for t in (prepare(LITE0, 32), prepare("resnet34", 32), prepare("bn_inception", 32)):
        each, last = batches._split_transform(t)
        assert torch.equal(
            last(torch.stack([each(Fake().image(i)) for i in range(5)])),
            torch.stack([t(Fake().image(i)) for i in range(5)]),
        )
    odd = torch.nn.Identity()
    assert batches._split_transform(odd) == (odd, None)


@pytest.mark.parametrize(
    "name", [LITE0, "resnet34", "timm/resnet26", "timm/mobilenetv3_small_050", "bn_inception", "googlenet"]
)
def test_folding_keeps_the_function(name):
    torch.manual_seed(0)
    trunk = make_trunk(name, pretrained=name == LITE0).eval()
    for m in trunk.modules():
        if isinstance(m, nn.BatchNorm2d) and name != LITE0:  # fresh statistics would hide mistakes
            (
                m.running_mean.normal_(0, 0.1),
                m.running_var.uniform_(0.5, 2),
                m.weight.data.uniform_(0.5, 1.5),
                m.bias.data.normal_(0, 0.1),
            )
    folded = fold_batchnorm(trunk)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        a, b = trunk(x), folded(x)
    assert (a - b).abs().max() <= 1e-4 * max(1, a.abs().max())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) < sum(
        isinstance(m, nn.BatchNorm2d) for m in trunk.modules()
    )


def test_a_wrong_fold_is_never_used(monkeypatch):
    trunk = make_trunk("resnet34", False).eval()
    monkeypatch.setattr(batches, "fold_batchnorm", lambda t: tiny_trunk())
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(batches._quick(trunk)(x), trunk(x))


def test_a_second_call_reads_the_file(tmp_path, monkeypatch):
    x = features(tmp_path)
    assert x.shape == (20, 12) and x.dtype == torch.float32 and not x.is_inference()
    monkeypatch.setattr(batches, "_extract", lambda *a: pytest.fail("computed again"))
    assert torch.equal(features(tmp_path), x)
    assert not list(tmp_path.glob("*.parts"))


def test_features_are_those_of_the_plain_network(tmp_path):
    trunk = make_trunk()
    x = cached_features(trunk, Fake(5), image_size=64, cache_dir=None, progress=False)
    t = prepare(trunk, 64)
    with torch.inference_mode():
        y = trunk.eval()(torch.stack([t(Fake().image(i)) for i in range(5)])).mean((2, 3))
    assert torch.allclose(x, y, atol=1e-3)


def dies_at_third_chunk(monkeypatch):
    "Let the third extraction of a chunk be interrupted; the list of calls grows by one at each."
    real, calls = batches._extract, []

    def dies(*a):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(batches, "_extract", dies)
    return calls


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_interruption_changes_nothing(tmp_path, small_chunks, monkeypatch, batch_size):
    whole = features(None, batch_size=batch_size)
    calls = dies_at_third_chunk(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        features(tmp_path, batch_size=batch_size)
    assert len(list(tmp_path.glob("*.parts/*.safetensors"))) == 2 and not list(tmp_path.glob("*.json"))
    assert torch.equal(features(tmp_path, batch_size=batch_size), whole)
    assert len(calls) == 3 + 2  # 20 images in chunks of 6: only the two missing chunks were computed


def test_kill_9(tmp_path):
    """A process killed without warning leaves chunks that the next one uses; the features are the same."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import time, torch, test_features_cache as t\nfrom hapnb import batches\nbatches.CHUNK = 6\n"
        "class Slow(t.Fake):\n    def image(self, i):\n        time.sleep(0.03)\n        return super().image(i)\n"
        "t.features(sys.argv[1], Slow())\n"
    )
    job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(hapnb.core.__file__).parents[1])
    end = time.time() + 50
    while time.time() < end and job.poll() is None and not list(tmp_path.glob("*.parts/[0-9]*.safetensors")):
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert list(tmp_path.glob("*.parts/[0-9]*.safetensors")) and not list(tmp_path.glob("*.json"))
    old, batches.CHUNK = batches.CHUNK, 6
    try:
        assert torch.equal(features(tmp_path), features(None))
    finally:
        batches.CHUNK = old


def test_a_damaged_chunk_is_computed_again(tmp_path, small_chunks, monkeypatch):
    x = features(None)
    dies_at_third_chunk(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        features(tmp_path)
    chunk = sorted(tmp_path.glob("*.parts/*.safetensors"))[0]
    data = bytearray(chunk.read_bytes())
    data[-3] ^= 4
    chunk.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="00000.safetensors is made again"):
        assert torch.equal(features(tmp_path), x)


def test_another_recipe_is_another_file(tmp_path):
    features(tmp_path)
    other = Fake()
    other.fingerprint = "def"
    features(tmp_path, other)
    features(tmp_path, Fake(19))
    features(tmp_path, trunk=tiny_trunk(1))
    features(tmp_path, pooling="max")
    features(tmp_path, crop_pct=1.0)
    assert len(list(tmp_path.glob("*.json"))) == 6


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features(None)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="features cannot be kept in .*No space left.*cache_dir=None"):
        features(tmp_path)
    monkeypatch.undo()
    assert features(tmp_path).shape == (20, 12)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(OSError, match="cannot be kept in"):
        features(tmp_path / "cache")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_folder(tmp_path):
    ready = tmp_path / "ready"
    x = features(ready)
    ready.chmod(0o500)
    try:
        assert torch.equal(features(ready), x)  # finished features can still be read
        with pytest.raises(OSError, match="cannot be kept in"):
            features(ready, Fake(3))
    finally:
        ready.chmod(0o700)


def test_two_processes_take_turns(tmp_path):
    pytest.importorskip("fcntl")
    import threading

    real, calls, gate = batches._extract, [], threading.Event()

    def slow(*a):
        calls.append(1)
        gate.wait(5)
        return real(*a)

    batches._extract = slow
    try:
        got, trunk = [], tiny_trunk()
        jobs = [threading.Thread(target=lambda: got.append(features(tmp_path, trunk=trunk))) for _ in range(2)]
        for j in jobs:
            j.start()
        time.sleep(0.3)
        gate.set()
        for j in jobs:
            j.join()
    finally:
        batches._extract = real
    assert len(calls) == 1 and torch.equal(*got)


def test_features_input_errors(tmp_path):
    with pytest.raises(ValueError, match="has no images"):
        features(tmp_path, Fake(0))
    with pytest.raises(ValueError, match="unknown pooling"):
        features(tmp_path, pooling="mean")

    class Anonymous:
        def __call__(self, image):
            return image

    with pytest.raises(ValueError, match="repr must say"):
        features(tmp_path, transform=Anonymous())

    class Broken(Fake):
        def image(self, i):
            if i == 7:
                raise OSError("cannot read image 7 of fake/train, 7.png: truncated")
            return super().image(i)

    with pytest.raises(OSError, match="^cannot read image 7"):
        features(tmp_path, Broken())
    sick = tiny_trunk()
    sick.net[3].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="features of image 0 of fake/train are not finite"):
        features(tmp_path, trunk=sick)
