"""What only a GPU can show: losses, metrics, kernels and training on it against the CPU (skipped without one)."""
import pytest
import torch
from gpu_kit import (DEVICE, NAMES, SURROGATES, TOLERANCE, build, far, images, kernel_inputs, loss_errors, methods,
                     metric_error, step)
from hapnb import kernels
from hapnb.config import RunConfig
from hapnb.metrics import evaluate, recall_at_k
from hapnb.train import run

missing = DEVICE.startswith("cuda") and not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing, reason="needs a CUDA GPU")]
both = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@both
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_the_cpu(name, dtype):
    for method in methods(name): assert max(loss_errors(name, method, dtype, DEVICE)) < TOLERANCE[dtype], method


@pytest.mark.parametrize("name", NAMES)
def test_losses_inside_autocast_are_finite(name):
    emb, labels = images(32)
    loss = build(name, 16, 8).to(DEVICE)
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        value, grad = step(loss, emb.to(DEVICE), labels.to(DEVICE))
    assert value.dtype == torch.float32 and value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=str)
def test_metrics_are_those_of_the_cpu(dtype, most): assert metric_error(dtype, DEVICE)[0] < most


def test_recall_by_faiss_is_that_of_evaluate():
    pytest.importorskip("faiss")
    emb, labels = images(400)
    want = evaluate(emb, labels, metrics="R@k")
    assert recall_at_k(emb, labels, device=DEVICE) == pytest.approx({k: want[k] for k in want}, abs=5e-3)


@both
@pytest.mark.parametrize("f", SURROGATES, ids=repr)
@pytest.mark.parametrize("Q, W, P", [(5, 37, 3), (3, 700, 130), (2, 2500, 1)])
def test_the_kernel_does_what_pytorch_does(f, Q, W, P, dtype):
    if kernels.find_spec("triton") is None: pytest.skip("Triton is not installed")
    if DEVICE == "cpu" and not kernels.available(DEVICE): pytest.skip("TRITON_INTERPRET=1 runs it on a CPU")
    assert kernels.available(DEVICE)
    s, k, outer = kernel_inputs(dtype, Q, W, P, DEVICE)
    most = 1e-13 if dtype == torch.float64 else 1e-5
    assert far(kernels.sums(f, s, k), kernels._plain_sums(f, *(t.cpu() for t in (s, k)))) < most
    if not f.smooth: return
    plain = kernels._plain_pull(f, *(t.cpu() for t in (s, k, outer)))
    for got, want in zip(kernels.pull(f, s, k, outer), plain): assert far(got, want) < most


def test_a_run_in_bf16_ends_with_finite_numbers(tmp_path):
    cfg = RunConfig(dataset="toy", trunk="toy", freeze="none", image_size=32, batch_size=24, embed_dim=16, epochs=2,
                    loss="SupAPLoss", precision="bf16")
    found = run(cfg, tmp_path, DEVICE, progress=False, workers=0)
    assert len(found.history) == 2 and torch.tensor(list(found.metrics.values())).isfinite().all()
    assert found.environment["device"].startswith(torch.device(DEVICE).type)
