"""The Triton kernel against plain PyTorch in Triton's interpreter, compiled for GPUs that are not there, and absent."""
import os, re, subprocess, sys
from pathlib import Path

import pytest
import torch
from hapnb import kernels
from hapnb.kernels import available, pull, sums
from hapnb.ranking import Leaky, Sigmoid, Sup

triton_needed = pytest.mark.skipif(kernels.find_spec("triton") is None, reason="Triton is not installed")


@triton_needed
def test_in_the_interpreter_the_kernel_does_what_pytorch_does():
    "In a process of its own, since the variable counts when Triton is imported."
    here = Path(__file__).with_name("kernels_interpreted.py")
    command = [sys.executable, "-m", "pytest", here, "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize("f", [Sigmoid(.1), Sup(), Leaky()], ids=repr)
def test_without_a_gpu_pytorch_serves(f, monkeypatch):
    "Values and gradients against a cube of differences, whatever the size of a block."
    assert not available("cpu")
    s, k, outer = (torch.randn(2, n, dtype=torch.float64) for n in (37, 9, 9))
    leaves = s.clone().requires_grad_(), k.clone().requires_grad_()
    total = f(leaves[0][:, None] - leaves[1][:, :, None]).sum(-1)
    (outer * total).sum().backward()
    for step in (9, 4):
        monkeypatch.setattr(kernels, "_chunks", lambda s, k: [slice(i, min(i + step, 9)) for i in range(0, 9, step)])
        torch.testing.assert_close(sums(f, s, k), total.detach())
        for mine, leaf in zip(pull(f, s, k, outer), leaves): torch.testing.assert_close(mine, leaf.grad)


def test_fake_tensors_on_a_gpu_keep_their_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(), torch.device("cuda"):
        s, k, outer = torch.randn(2, 7), torch.randn(2, 3), torch.randn(2, 3)
        assert not available(s)
        found = sums(Sup(), s, k), *pull(Sup(), s, k, outer)
    assert [(tuple(t.shape), t.device.type) for t in found] == [((2, n), "cuda") for n in (3, 7, 3)]


def test_a_device_where_triton_fails_is_told_once(monkeypatch):
    def broken(*args): raise RuntimeError("no C compiler")
    monkeypatch.setattr(kernels, "_launch", broken)
    monkeypatch.setattr(kernels, "find_spec", lambda name: True)
    kernels._works.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain PyTorch is used instead: RuntimeError: no C compiler"):
            assert not kernels._works("cpu", True)
        assert not kernels._works("cpu", True)
    finally: kernels._works.cache_clear()


VARIANTS = [(kind, slope, items) for kind in range(4) for slope, items in ((0, 0), (1, 0), (1, 1)) if kind or not slope]


def compiled(arch, dtype, kind, slope, items, TA, TB):
    "PTX of a variant, and a line on what its machine code uses."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    fixed = dict(KIND=kind, STRICT=kind == 2, SLOPE=bool(slope), ITEMS=bool(items), TA=TA, TB=TB)
    pointers, sizes = dict.fromkeys(("out", "a", "b", "w", "c"), f"*{dtype}"), dict(A="i32", B="i32")
    source = ASTSource(kernels._compiled(), {**pointers, **sizes, **dict.fromkeys(fixed, "constexpr")}, fixed)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(enable_fp_fusion=False))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return made.asm["ptx"], made.asm["cubin"], tool


@triton_needed
@pytest.mark.parametrize("arch, dtype, TA, TB", [(90, "fp32", 128, 16), (75, "fp32", 4, 512), (90, "fp64", 512, 4)])
def test_every_variant_compiles_for_gpus(arch, dtype, TA, TB, tmp_path, monkeypatch):
    "No GPU is needed. float32 must not join operations, or equal scores differ; nothing may spill from registers."
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for variant in VARIANTS:
        if dtype == "fp64" and variant[0] in (0, 3): continue
        ptx, machine, tool = compiled(arch, dtype, *variant, TA, TB)
        assert dtype == "fp64" or not re.search(r"\bfma\.", ptx), variant
        # a constant in float32 among float64
        assert not re.search(r"cvt\.f64\.f32", ptx), variant
        if not tool.exists(): continue
        (tmp_path / "code").write_bytes(machine)
        use = subprocess.run([tool, "-res-usage", tmp_path / "code"], capture_output=True, text=True, check=True).stdout
        assert "STACK:0" in use and "LOCAL:0" in use, use
