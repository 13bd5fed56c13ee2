"""Backbones and their weights, poolings, heads, frozen parts and transforms. No network is used."""
import argparse
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from hapnb import batches, models
from hapnb.helpers import TRUNKS
from hapnb.models import (
    GeMPool, Head, RetrievalNet, Trunk, TrunkInfo, check_trunk, lite_state, load_weights, make_pooling, make_trunk,
    read_weights, train_transform, trunk_info, trunk_stages)
from hapnb.batches import cached_features, weights_hash

prepare = models.test_transform
LITE0 = "tf_efficientnet_lite0"
INSTALLED = [LITE0, "tf_efficientnet_lite2"]


class Fake:
    """The interface of RetrievalDataset that features need."""
    name, split, fingerprint = "fake", "train", "abc"
    def __init__(self, n=20): self.n = n
    def __len__(self): return self.n
    def image(self, i):
        rng = np.random.default_rng(i)
        return Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))


def tiny_trunk(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2))
    return Trunk(net, TrunkInfo("tiny", 12, image_size=32)).eval()


# ---- trunks and weights

@pytest.mark.parametrize("name", INSTALLED)
def test_an_installed_trunk_holds_every_tensor_of_its_package(name):
    trunk, state = make_trunk(name), lite_state(name)
    own = trunk.net.state_dict()
    assert set(state) - set(own) == {"classifier.weight", "classifier.bias"} and set(own) <= set(state)
    assert all(torch.equal(own[k], state[k]) for k in own)
    assert trunk.info.mean == (0.5, 0.5, 0.5) and "package" in trunk.info.weights
    assert weights_hash(trunk) == weights_hash(make_trunk(name)) != weights_hash(make_trunk(name, pretrained=False))


@pytest.mark.parametrize("name", INSTALLED)
def test_an_installed_trunk_recognises_photographs(name):
    import timm
    from sklearn.datasets import load_sample_image
    from torchvision.models._meta import _IMAGENET_CATEGORIES as names
    net = timm.create_model(name, pretrained=False).eval()
    net.load_state_dict(lite_state(name))
    t = prepare(name, net.pretrained_cfg["input_size"][1])
    # a dahlia, for which ImageNet has no class
    for file, seen in (("china.jpg", "palace"), ("flower.jpg", "daisy" if name == LITE0 else "honeycomb")):
        with torch.inference_mode(): top = net(t(Image.fromarray(load_sample_image(file)))[None]).argmax().item()
        assert names[top] == seen


def test_running_statistics_fit_the_weights():
    """On a natural image the first BatchNorms see about the mean and variance that they remember."""
    from sklearn.datasets import load_sample_image
    trunk, seen = make_trunk().eval(), {}
    for name in ("bn1", "blocks.1.0.bn1", "blocks.3.0.bn1"):
        def look(m, x, n=name): seen[n] = x[0].mean((0, 2, 3)), m.running_mean, m.running_var
        trunk.net.get_submodule(name).register_forward_pre_hook(look)
    photos = [Image.fromarray(load_sample_image(f)) for f in ("china.jpg", "flower.jpg")]
    with torch.inference_mode(): trunk(torch.stack([prepare(trunk, 224)(p) for p in photos]))
    for mean, kept, var in seen.values():
        assert ((mean - kept).abs() / (var + 1e-3).sqrt()).median() < 1


@pytest.mark.parametrize("name, size, features_", [
    ("resnet34", 64, 512),
    ("timm/resnet18", 64, 512),
    ("vit_tiny_patch16_224", 224, 192),
    ("swin_tiny_patch4_window7_224", 224, 768),
    ("convnext_atto", 64, 320)])
def test_every_trunk_gives_a_map_or_a_vector(name, size, features_):
    trunk = make_trunk(name, pretrained=False).eval()
    with torch.inference_mode(): x = trunk(torch.zeros(2, 3, size, size))
    assert x.shape[:2] == (2, features_) and trunk.info.features == features_ and x.ndim in (2, 4)
    with torch.inference_mode(): assert make_pooling("avg")(x).shape == (2, features_)


def test_unknown_trunk_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'resnet50'"): make_trunk("resnet5O", pretrained=False)
    assert {"resnet34", "resnet50", LITE0} <= set(TRUNKS.names())


@pytest.mark.parametrize("name, where", [
    ("resnet34", "torch.hub.load_state_dict_from_url"),
    ("resnet18.a1_in1k", "timm.create_model")])
def test_without_a_network_the_message_says_what_to_do(name, where, monkeypatch):
    def offline(*a, **kw): raise OSError("no route to host")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    if "timm" in where: monkeypatch.setattr(where, offline)
    with pytest.raises(RuntimeError, match="could not be downloaded.*pretrained=False.*tf_efficientnet_lite0"):
        make_trunk(name)


def test_weights_from_files(tmp_path):
    source = make_trunk("timm/resnet18", pretrained=False)
    plain = {k: v.contiguous() for k, v in source.net.state_dict().items()}
    save_file(plain, tmp_path / "a.safetensors")
    wrapped = {f"module.{k}": v for k, v in plain.items()} | {"module.fc.weight": torch.ones(2)}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "b.pth")
    net = RetrievalNet(source, embed_dim=4)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "c.safetensors")
    for f in ("a.safetensors", "b.pth", "c.safetensors"):
        trunk = make_trunk("timm/resnet18", str(tmp_path / f))
        assert all(torch.equal(v, plain[k]) for k, v in trunk.net.state_dict().items())
        assert trunk.info.weights == f"file {f}"


def test_bad_weight_files(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "few.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "few.safetensors").read_bytes()[:-2])
    torch.save({"x": 3}, tmp_path / "none.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pth")
    torch.save({1: torch.ones(2)}, tmp_path / "numbers.pth")
    words_of = {"few.safetensors": "tensors are missing", "cut.safetensors": "cannot be read",
                "none.pth": "no table of named tensors", "numbers.pth": "no table of named tensors",
                "pickled.pth": "weights_only=True"}
    for f, words in words_of.items():
        with pytest.raises(ValueError, match=words): make_trunk("timm/resnet18", tmp_path / f)
    with pytest.raises(FileNotFoundError, match="no file of weights at"): read_weights(tmp_path / "nothing.pth")
    full = {k: v.contiguous() for k, v in make_trunk("timm/resnet18", False).net.state_dict().items()}
    save_file(full | {"conv1.weight": torch.zeros(2, 2)}, tmp_path / "shape.safetensors")
    with pytest.raises(ValueError, match=r"'conv1.weight' has shape \(2, 2\)"):
        make_trunk("timm/resnet18", tmp_path / "shape.safetensors")


@pytest.mark.parametrize("name", INSTALLED)
def test_a_damaged_package_is_noticed(name, monkeypatch):
    package, file, _ = models._LITE[name]
    monkeypatch.setitem(models._LITE, name, (package, file, "0" * 64))
    with pytest.raises(ValueError, match=f"reinstall.* {package}"): make_trunk(name)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"pip install {package}"): make_trunk(name)


@pytest.mark.parametrize("wrong, words", [
    (torch.ones(3, dtype=torch.int8), "holds torch.int8"),
    (torch.ones(3, dtype=torch.complex64), "holds torch.complex64"),
    (torch.tensor([1., torch.nan, 1.]), "holds NaN or infinite values"), (torch.ones(3).to_sparse(), "torch.sparse")])
def test_tensors_that_would_give_wrong_features_are_refused(wrong, words):
    net = nn.Linear(2, 3)
    before = net.bias.detach().clone()
    with pytest.raises(ValueError, match=f"a.pth.*'bias'.*{words}"):
        load_weights(net, {"weight": torch.ones(3, 2), "bias": wrong}, "a.pth")
    assert torch.equal(net.bias, before)


@pytest.mark.parametrize("name, args, words", [
    ("resnet5O", {}, "Did you mean 'resnet50'"), ("deit_smal", {"drop_rate": 0.}, "Did you mean 'deit_small'"),
    ("resnet50", {"drop": 1}, "no setting 'drop'. resnet50 takes: none"),
    ("toy", {"dropout": 1}, "no setting 'dropout'"),
    (LITE0, {"dropout": 1}, "no setting 'dropout'"),
    ("vit_small", {"drop_pathrate": 1}, "Did you mean 'drop_path_rate'"),
    ("deit_small", {"embed_dim": 10**10}, "at most 4096"), ("deit_small", {"img_size": [64, 10**6]}, "at most 4096"),
    ("timm/resnet18", {"in_chans": 1}, "do not fit"), ("bn_inception", {"bn_momentum": 2.}, "between 0 and 1"),
    ("bn_inception", {"bn_momentum": "x"}, "do not fit")])
def test_wrong_arguments_of_a_trunk_are_found_without_weights(name, args, words):
    with pytest.raises(ValueError, match=words): check_trunk(name, args)


@pytest.mark.parametrize("name, args", [(LITE0, {"drop_rate": .1}), ("vit_small_dino", {"drop_path_rate": .1}),
                                        ("deit_small", {"img_size": [64, 96]}), ("bn_inception", {"bn_momentum": .9}),
                                        ("timm/resnet18", {"output_stride": 16})])
def test_right_arguments_of_a_trunk_pass(name, args): check_trunk(name, args)


# ---- BN-Inception

# each row: 1x1, reduce, 3x3, reduce, double 3x3, pooled (None: that branch is not there)
TABLE = {"3a": (64, 64, 64, 64, 96, 32), "3b": (64, 64, 96, 64, 96, 64),
         "3c": (None, 128, 160, 64, 96, None), "4a": (224, 64, 96, 96, 128, 128),
         "4b": (192, 96, 128, 96, 128, 128), "4c": (160, 128, 160, 128, 160, 128), "4d": (96, 128, 192, 160, 192, 128),
         "4e": (None, 128, 192, 192, 256, None),
         "5a": (352, 192, 320, 160, 224, 128), "5b": (352, 192, 320, 192, 224, 128)}


def inception_shapes():
    "Names and shapes of the convolutions of the converted file, and the width of the last map."
    out, c = {"conv1_7x7_s2": (64, 3, 7, 7), "conv2_3x3_reduce": (64, 64, 1, 1), "conv2_3x3": (192, 64, 3, 3)}, 192
    for block, (one, r, three, rr, double, pooled) in TABLE.items():
        n = f"inception_{block}_"
        if one: out[n + "1x1"] = (one, c, 1, 1)
        out |= {n + "3x3_reduce": (r, c, 1, 1), n + "3x3": (three, r, 3, 3), n + "double_3x3_reduce": (rr, c, 1, 1),
                n + "double_3x3_1": (double, rr, 3, 3), n + "double_3x3_2": (double, double, 3, 3)}
        if pooled: out[n + "pool_proj"] = (pooled, c, 1, 1)
        c = (one or 0) + three + double + (pooled or c)
    return out, c


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    "A file as converters of Caffe write it: BatchNorm as [1, C], no counters, with a classifier."
    g, state = torch.Generator().manual_seed(0), {}
    for name, shape in inception_shapes()[0].items():
        state[f"{name}.weight"] = torch.randn(shape, generator=g) * (2 / (shape[1] * shape[2] * shape[3])) ** .5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=g) * .1
        for k in ("weight", "bias", "running_mean", "running_var"):
            draw = torch.rand if k.endswith(("weight", "var")) else torch.randn
            state[f"{name}_bn.{k}"] = draw(1, shape[0], generator=g) * .5 + .25
    state |= {"last_linear.weight": torch.zeros(1000, 1024), "last_linear.bias": torch.zeros(1000)}
    path = tmp_path_factory.mktemp("inception") / "bn_inception-52deb4733.pth"
    torch.save(state, path)
    return path


def plain_inception(x, state):
    "The network in functions, one line per layer, as the paper draws it."
    F = torch.nn.functional
    def unit(x, n, stride=1):
        w = state[n + ".weight"]
        bn = [state[f"{n}_bn.{k}"].flatten() for k in ("running_mean", "running_var", "weight", "bias")]
        x = F.conv2d(x, w, state[n + ".bias"], stride, w.shape[-1] // 2)
        return F.batch_norm(x, *bn, training=False, eps=1e-5).relu()
    half = lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)
    x = half(unit(x, "conv1_7x7_s2", 2))
    x = half(unit(unit(x, "conv2_3x3_reduce"), "conv2_3x3"))
    for block in TABLE:
        n = f"inception_{block}_"
        s = 2 if block in ("3c", "4e") else 1
        three = unit(unit(x, n + "3x3_reduce"), n + "3x3", s)
        double = unit(unit(unit(x, n + "double_3x3_reduce"), n + "double_3x3_1"), n + "double_3x3_2", s)
        if s == 2: x = torch.cat([three, double, half(x)], 1)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1) if block == "5b" else F.avg_pool2d(x, 3, 1, 1)
            x = torch.cat([unit(x, n + "1x1"), three, double, unit(pooled, n + "pool_proj")], 1)
    return x


def test_bn_inception_has_the_names_and_sizes_of_the_converted_file():
    trunk, (convs, width) = make_trunk("bn_inception", pretrained=False), inception_shapes()
    own = {k: tuple(v.shape) for k, v in trunk.net.state_dict().items() if not k.endswith("num_batches_tracked")}
    want = {f"{n}.weight": s for n, s in convs.items()} | {f"{n}.bias": s[:1] for n, s in convs.items()}
    want |= {f"{n}_bn.{k}": s[:1] for n, s in convs.items() for k in ("weight", "bias", "running_mean", "running_var")}
    assert own == want and len(convs) == 69 and width == trunk.info.features == 1024
    counted = sum(torch.Size(s).numel() + 3 * s[0] for s in convs.values())
    assert sum(p.numel() for p in trunk.parameters()) == counted == 10_270_240
    assert "bn_inception" in TRUNKS.names()


@pytest.mark.parametrize("size", [224, 96])
def test_bn_inception_from_a_file_is_the_plain_network(inception_file, size):
    trunk = make_trunk("bn_inception", str(inception_file)).eval()
    assert trunk.info.weights == f"file {inception_file.name}"
    state = torch.load(inception_file, weights_only=True)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 60
    with torch.inference_mode(): a, b = trunk(x), plain_inception(x, state)
    assert a.shape == (2, 1024, size // 32, size // 32) and b.abs().max() > 0.1
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bn_inception_learns_everywhere():
    trunk = make_trunk("bn_inception", pretrained=False, bn_momentum=0.9).train()
    x = torch.randn(4, 3, 64, 64)
    trunk(x).square().mean().backward()
    for n, p in trunk.named_parameters():  # a bias before BatchNorm has no effect
        assert p.grad is not None and p.grad.isfinite().all() and (n.endswith("bias") or p.grad.abs().max() > 0), n
    with torch.no_grad(): mean = trunk.net.conv1_7x7_s2(x).mean((0, 2, 3))
    torch.testing.assert_close(trunk.net.conv1_7x7_s2_bn.running_mean, 0.9 * mean, rtol=1e-4, atol=1e-5)


def test_bn_inception_bad_input(inception_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="bn_inception-52deb4733.pth.*pretrained=False"):
        make_trunk("bn_inception")
    with pytest.raises(ValueError, match="cannot halve a map of 7 x 7.*multiples of 32"):
        make_trunk("bn_inception", False)(torch.zeros(1, 3, 56, 56))
    state = torch.load(inception_file, weights_only=True)
    state["conv1_7x7_s2_bn.weight"] = torch.ones(2, 64)
    torch.save(state, tmp_path / "two_rows.pth")
    with pytest.raises(ValueError, match=r"'conv1_7x7_s2_bn.weight' has shape \(2, 64\), the trunk wants \(64,\)"):
        make_trunk("bn_inception", tmp_path / "two_rows.pth")


def test_bn_inception_sees_blue_first():
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    rgb = torch.tensor(pixels).permute(2, 0, 1).float()
    want = torch.stack([rgb[2] - 104, rgb[1] - 117, rgb[0] - 128])
    for t in (prepare("bn_inception", crop_pct=1), train_transform("bn_inception", scale=(1, 1), ratio=(1, 1), flip=0)):
        x = t(Image.fromarray(pixels))
        torch.testing.assert_close(x, want, rtol=0, atol=1e-4)
        assert type(x) is torch.Tensor
    # the others stay RGB
    assert not torch.allclose(prepare("resnet50", crop_pct=1)(Image.fromarray(pixels)) * 0.226 * 255, want, atol=30)


@pytest.mark.parametrize("name", ["resnet50", "timm/resnet50", "bn_inception"])
def test_the_network_of_hist(name):
    """Average + maximum, 512 numbers, LayerNorm after; BatchNorm with its scale and shift is frozen, all else moves."""
    torch.manual_seed(0)
    head = dict(pooling="avg+max", norm="after", init="kaiming", embed_dim=512, normalise=False)
    net = RetrievalNet(name, pretrained=False, freeze="bn", bn_affine=False, **head).train()
    norms = {n for n, m in net.trunk.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for m in net.trunk.modules():
        # timm starts some at zero, and their branch would get no gradient
        if isinstance(m, nn.BatchNorm2d): m.weight.data.uniform_(0.5, 1.5)
    before = {k: v.clone() for k, v in net.trunk.state_dict().items()}
    opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    z = net(torch.randn(2, 3, 64, 64))
    assert z.shape == (2, 512)
    assert torch.allclose(z.mean(1), torch.zeros(2), atol=1e-5)
    assert torch.allclose(z.std(1, unbiased=False), torch.ones(2), atol=1e-2)
    z.sum(0).square().sum().backward()
    opt.step()
    moved = {k for k, v in net.trunk.state_dict().items() if not torch.equal(v, before[k])}
    still = {k for k in before if k.rpartition(".")[0] in norms}
    assert norms and not moved & still and {k for k in before if k.endswith("weight")} - still <= moved


# ---- poolings and heads

def test_gem():
    x = torch.rand(3, 5, 4, 4, dtype=torch.float64)
    assert torch.allclose(GeMPool(1)(x), make_pooling("avg")(x))
    assert torch.allclose(GeMPool(3)(x), (x ** 3).mean((2, 3)) ** (1 / 3))
    assert torch.allclose(GeMPool(500)(x * 6), make_pooling("max")(x * 6), rtol=0.01)  # 6^500 would overflow
    pool = GeMPool(2).double()
    assert torch.autograd.gradcheck(pool, (x + 0.1).requires_grad_())
    pool(x).sum().backward()
    e = 2 ** -10
    change = (GeMPool(2 + e).double()(x) - GeMPool(2 - e).double()(x)).sum() / (2 * e)
    assert pool.p.grad.item() == pytest.approx(change.item(), rel=1e-4)
    assert GeMPool()(-torch.ones(1, 2, 3, 3)).isfinite().all()
    assert GeMPool()(torch.rand(1, 2, 3, 3).half()).dtype == torch.float32


def test_avg_max_is_the_sum():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(make_pooling("avg+max")(x), make_pooling("avg")(x) + make_pooling("max")(x))


@pytest.mark.parametrize("norm", ["layernorm", "after", None])
@pytest.mark.parametrize("embed_dim", [4, None])
def test_head(norm, embed_dim):
    head = Head(6, embed_dim, norm)
    x = torch.randn(5, 6, 3, 3)
    z = head(x)
    assert z.shape == (5, embed_dim or 6) and torch.allclose(z.norm(dim=1), torch.ones(5))
    assert torch.equal(z, head.from_pooled(x.mean((2, 3))))
    assert not [n for n, _ in head.named_parameters() if "norm" in n or "after" in n]
    raw = Head(6, embed_dim, norm, normalise=False)
    assert not torch.allclose(raw(x).norm(dim=1), torch.ones(5))
    assert torch.allclose(raw.eval()(x).norm(dim=1), torch.ones(5))


def test_head_in_autocast_and_half():
    head = Head(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16): z = head(torch.randn(5, 6, 3, 3))
    assert z.dtype == torch.float32 and torch.allclose(z.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("embed_dim", [0, -1, 1.5, True, "4", 10**10])
def test_sizes_of_an_embedding_that_make_no_sense_are_refused(embed_dim):
    with pytest.raises(ValueError, match="embed_dim must be"): Head(6, embed_dim)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_embeddings_of_any_length_get_unit_length(scale):
    head = Head(6, None, norm=None)
    x = torch.randn(5, 6)
    torch.testing.assert_close(head.from_pooled(x * scale), head.from_pooled(x))


# ---- frozen parts

@pytest.mark.parametrize("affine", [True, False])
def test_frozen_batchnorm_stays_frozen_under_train(affine):
    net = RetrievalNet(tiny_trunk(), embed_dim=4, freeze="bn", bn_affine=affine)
    bn, before = net.trunk.net[1], None
    for _ in range(2):
        net.train()
        before = bn.running_mean.clone()
        net(torch.randn(4, 3, 32, 32)).sum().backward()
        assert torch.equal(bn.running_mean, before) and net.training and net.trunk.training and not bn.training
    assert bn.weight.requires_grad is affine
    free = RetrievalNet(tiny_trunk(), embed_dim=4).train()
    before = free.trunk.net[1].running_mean.clone()
    free(torch.randn(4, 3, 32, 32))
    assert not torch.equal(free.trunk.net[1].running_mean, before)


def test_frozen_trunk_only_trains_its_head():
    net = RetrievalNet(tiny_trunk(), embed_dim=4, freeze="trunk", pooling="gem").train()
    assert not any(m.training for m in net.trunk.modules())
    net(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in net.trunk.parameters())
    assert all(p.grad is not None for p in net.head.parameters())
    net.eval()
    assert not net.head.training


def test_vit_dropout_is_off_in_a_frozen_trunk():
    class_token = dict(embed_dim=None, norm=None, freeze="trunk", drop_rate=0.5)
    net = RetrievalNet("vit_tiny_patch16_224", pretrained=False, **class_token).train()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(): assert torch.equal(net(x), net(x)) and net(x).shape == (1, 192)


def test_state_dict_round_trip(tmp_path):
    a, b = (RetrievalNet(tiny_trunk(s), embed_dim=4, pooling="gem") for s in (0, 1))
    save_file(a.state_dict(), tmp_path / "w.safetensors")
    from safetensors.torch import load_file
    b.load_state_dict(load_file(tmp_path / "w.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(a.eval()(x), b.eval()(x))


# ---- transforms

def test_transforms():
    info = trunk_info(LITE0)
    image = Image.new("RGB", (60, 40), (255, 0, 127))
    x = prepare(info, 32)(image)
    assert x.shape == (3, 32, 32) and torch.allclose(x[:, 0, 0], torch.tensor([1., -1., 127 / 127.5 - 1]), atol=1e-6)
    torch.manual_seed(0)
    t = train_transform(info, 32, flip=0, resize=48)
    assert t(image).shape == (3, 32, 32) and "Flip" not in repr(t) and "Flip" in repr(train_transform(info))
    assert "size=[36, 36]" in repr(prepare(info, 32, crop_pct=32 / 36, square=True))
    with pytest.raises(ValueError, match="crop_pct"): prepare(info, 32, crop_pct=1.5)


# ---- a GPU that is not there

@pytest.mark.parametrize("make", [
    lambda: (Head(12, 4, pooling="gem"), (2, 12, 3, 3)),
    lambda: (Head(12, 4, norm="after", pooling="avg+max"), (2, 12, 3, 3)),
    lambda: (RetrievalNet(Trunk(nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)), TrunkInfo("t", 12)),
                          embed_dim=4, freeze="bn"), (2, 3, 16, 16)),
    lambda: (RetrievalNet("timm/resnet18", pretrained=False, embed_dim=4), (2, 3, 64, 64))],
    ids=["gem", "after", "bn", "resnet18"])
def test_shapes_on_a_fake_gpu(make):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            with torch.device("cuda"): net, shape = make()
            x = torch.randn(shape, device="cuda")
        except (RuntimeError, AssertionError) as e:
            if "CUDA" not in str(e) and "cuda" not in str(e): raise
            pytest.skip(f"this torch cannot make fake CUDA tensors: {e}")
        for mode in (True, False):
            z = net.train(mode)(x)
            assert z.shape == (2, 4) and z.device.type == "cuda"


# ---- GoogLeNet and transformers

def on_meta(name, **args):
    with torch.device("meta"): return make_trunk(name, pretrained=False, **args)


def parameters(net): return sum(p.numel() for p in net.parameters())


# features, parameters with classifier as torchvision, DeiT and timm publish them (None: has none), classes
TRANSFORMERS = {"deit_small": (384, 22_050_664), "deit_base": (768, 86_567_656),
                "vit_small": (384, 22_050_664), "vit_base": (768, 86_567_656),
                "vit_small_dino": (384, 22_050_664), "vit_base_dino": (768, 86_567_656)}


@pytest.mark.parametrize("name", ["googlenet", "resnet34", "resnet50", "resnet101"])
def test_torchvision_trunks_have_all_parameters_but_the_classifier(name):
    import torchvision
    trunk = on_meta(name)
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta["num_params"]
    assert parameters(trunk) == published - 1000 * (trunk.info.features + 1)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_have_all_parameters_but_the_classifier(name):
    trunk, (features_, published) = on_meta(name), TRANSFORMERS[name]
    assert trunk.info.name == name
    assert trunk.info.features == features_
    assert parameters(trunk) == published - 1000 * (features_ + 1)
    assert trunk.info.mean == ((0.5,) * 3 if name in ("vit_small", "vit_base") else (0.485, 0.456, 0.406))
    assert trunk.info.image_size == 224
    assert len(trunk.net.blocks) == 12 and not hasattr(trunk.net, "dist_token")


@pytest.mark.parametrize("name, size, map_", [
    ("googlenet", 224, (1024, 7, 7)),
    ("googlenet", 100, (1024, 3, 3)),
    ("resnet101", 64, (2048, 2, 2)),
    ("deit_small", 224, (384,)),
    ("deit_small", 96, (384,)),
    ("vit_small_dino", (64, 96), (384,)),
    ("vit_base", 32, (768,))])
def test_the_further_trunks_give_maps_and_vectors(name, size, map_):
    trunk = make_trunk(name, pretrained=False).eval()
    with torch.inference_mode():
        x = trunk(torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size))))
        assert x.shape == (2, *map_) and not torch.equal(x[0], x[1]) and make_pooling("gem")(x).shape == (2, map_[0])


def test_a_later_notebook_is_found_by_name(monkeypatch):
    later = {*TRANSFORMERS, "googlenet"}
    monkeypatch.setattr(TRUNKS, "_items", {k: v for k, v in TRUNKS._items.items() if k not in later})
    monkeypatch.delitem(sys.modules, "hapnb.trunks", raising=False)
    with pytest.raises(ValueError, match="Did you mean 'deit_small'"): make_trunk("deit_smal", pretrained=False)
    assert {"googlenet", *TRANSFORMERS} <= set(TRUNKS.names())


@pytest.mark.parametrize("name, where", [
    ("googlenet", "torchvision.models._api.load_state_dict_from_url"),
    ("resnet101", "torchvision.models._api.load_state_dict_from_url"),
    ("deit_small", "timm"),
    ("vit_small_dino", "timm")])
def test_the_further_trunks_without_a_network(name, where, monkeypatch):
    import timm
    real = timm.create_model
    def offline(*a, pretrained=True, **kw):
        if pretrained: raise OSError("no route to host")
        return real(*a, pretrained=False, **kw)
    monkeypatch.setattr("timm.create_model" if where == "timm" else where, offline)
    words = f"ImageNet weights of '{name[:8]}.*could not be downloaded.*no route to host.*pretrained=False"
    with pytest.raises(RuntimeError, match=words):
        make_trunk(name)
    assert make_trunk(name, pretrained=False).info.weights == "random"


def test_googlenet_is_torchvisions(tmp_path):
    """The same outputs as torchvision's class, with its own preparation of images and a file with side classifiers."""
    import torchvision
    whole = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False, transform_input=True).eval()
    for m in whole.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
    torch.save(whole.state_dict(), tmp_path / "googlenet.pth")
    trunk = make_trunk("googlenet", tmp_path / "googlenet.pth").eval()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    usual = prepare("resnet34", 96, 1)(photo)[None]
    with torch.inference_mode(): a, b = whole.fc(trunk(prepare(trunk, 96, 1)(photo)[None]).mean((2, 3))), whole(usual)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert b.std() > 1e-2  # not all the same


# ---- files of transformers

SMALL = dict(img_size=64, embed_dim=24, depth=3, num_heads=2)  # a DeiT-S that fits in a test


def deit(seed, **args):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = make_trunk("deit_small", pretrained=False, **{**SMALL, **args}).eval()
        for p in trunk.parameters(): nn.init.normal_(p, 0, 0.3)
    return trunk


def distilled(state):
    "A file of distilled DeiT made of a plain one: another token, its position between the class's and the patches'."
    pos = state["pos_embed"]
    C, longer = pos.shape[2], torch.cat([pos[:, :1], torch.full_like(pos[:, :1], 9), pos[:, 1:]], 1)
    heads = {"head.weight": torch.zeros(5, C), "head_dist.weight": torch.zeros(5, C), "head_dist.bias": torch.zeros(5)}
    return state | {"dist_token": torch.randn(1, 1, C), "pos_embed": longer, **heads}


def test_distilled_weights_in_a_plain_deit(tmp_path):
    source, x = deit(0), torch.randn(2, 3, 64, 64)
    settings = argparse.Namespace(lr=5e-4, distillation_type="hard")
    torch.save({"model": distilled(source.net.state_dict()), "epoch": 299, "args": settings}, tmp_path / "deit.pth")
    trunk = make_trunk("deit_small", tmp_path / "deit.pth", **SMALL).eval()
    assert trunk.info.weights == "file deit.pth"
    with torch.inference_mode():
        assert torch.equal(trunk(x), source(x)) and not torch.allclose(deit(1)(x), source(x), atol=0.1)


def test_the_downloaded_deit_is_the_distilled_one(monkeypatch):
    import timm
    real, asked = timm.create_model, []
    def create(name, pretrained=False, **kw):
        if pretrained: asked.append(name)
        net = real(name, pretrained=False, **kw)
        if pretrained:
            with torch.no_grad(): net.pos_embed.copy_(torch.arange(198.)[None, :, None].expand(1, 198, 384))
        return net
    monkeypatch.setattr(timm, "create_model", create)
    trunk = make_trunk("deit_small")
    assert asked == ["deit_small_distilled_patch16_224.fb_in1k"]
    assert "without its distillation token" in trunk.info.weights
    assert trunk.net.pos_embed[0, :, 5].tolist() == [0, *range(2, 198)]


def test_a_distilled_network_keeps_its_token():
    """Loaded into a distilled DeiT, nothing is dropped."""
    net = make_trunk("timm/deit_tiny_distilled_patch16_224", pretrained=False, img_size=64, depth=1).net
    state = {k: v + 1 for k, v in net.state_dict().items()}
    load_weights(net, state, "a distilled file")
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items()) and net.pos_embed.shape[1] == 2 + 16


@pytest.mark.parametrize("wrap", ["plain", "teacher", "module", "timm", "whole"])
def test_files_of_dino_and_others(tmp_path, wrap):
    source = deit(0)
    plain = {k: v.contiguous() for k, v in source.net.state_dict().items()}
    other = {k: v + 1 for k, v in plain.items()}
    head = {"head.mlp.0.weight": torch.zeros(3, 24)}
    under = lambda p, s: {p + k: v for k, v in s.items()}
    path = tmp_path / ("w.safetensors" if wrap in ("timm", "whole") else "w.pth")
    if wrap == "plain": torch.save(plain, path)
    if wrap == "teacher":
        both = {"student": under("module.backbone.", other), "teacher": under("backbone.", plain) | head}
        torch.save({**both, "epoch": 100, "args": argparse.Namespace(arch="vit_small")}, path)
    if wrap == "module": torch.save(under("module.backbone.", plain) | under("module.", head), path)
    if wrap == "timm": save_file(plain, path)
    if wrap == "whole":
        save_file({k: v.contiguous() for k, v in RetrievalNet(source, embed_dim=4).state_dict().items()}, path)
    trunk = make_trunk("vit_small_dino", path, **SMALL)
    assert all(torch.equal(v, plain[k]) for k, v in trunk.net.state_dict().items())


def test_settings_may_lie_beside_the_weights_but_no_code(tmp_path):
    torch.save({"model": {"x": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth") == {"x": torch.ones(1)}
    torch.save({"model": {"x": torch.ones(1)}, "args": argparse.Namespace(net=nn.Linear(2, 2))}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="b.pth cannot be read.*weights_only=True"): read_weights(tmp_path / "b.pth")


def test_damaged_files_of_transformers(tmp_path):
    state = {k: v.contiguous() for k, v in deit(0).net.state_dict().items()}
    def fails(state, words, name="w.safetensors"):
        save_file(state, tmp_path / name)
        with pytest.raises(ValueError, match=words): make_trunk("deit_small", tmp_path / name, **SMALL)
    without = {k: v for k, v in state.items() if k != "blocks.2.attn.qkv.weight"}
    fails(without, "1 of .* tensors are missing, first 'blocks.2.attn.qkv.weight'")
    fails({k: v for k, v in state.items() if k != "pos_embed"}, "missing, first 'pos_embed'")
    # 13 patches are no square
    words = r"'pos_embed' has shape \(1, 14, 24\), the trunk wants \(1, 17, 24\)"
    fails(state | {"pos_embed": torch.zeros(1, 14, 24)}, words)
    fails(state | {"pos_embed": torch.zeros(17, 24)}, r"'pos_embed' has shape \(17, 24\)")
    fails(distilled(state) | {"cls_token": torch.zeros(1, 1, 8)}, r"'cls_token' has shape \(1, 1, 8\)")
    save_file(state, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-999])
    with pytest.raises(ValueError, match="cut.safetensors cannot be read"):
        make_trunk("deit_small", tmp_path / "cut.safetensors", **SMALL)
    torch.save({"model": state}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-999])
    with pytest.raises(ValueError, match="cut.pth cannot be read.*Is it whole"):
        make_trunk("deit_small", tmp_path / "cut.pth", **SMALL)


@pytest.mark.parametrize("size", [(96, 96), (64, 112), (64, 64)])
def test_positions_for_other_images(tmp_path, size):
    """Resized when the file is loaded, or on the way: the same function."""
    source = deit(0)
    save_file({k: v.contiguous() for k, v in source.net.state_dict().items()}, tmp_path / "w.safetensors")
    strict = SMALL | dict(img_size=size, dynamic_img_size=False)
    trunk = make_trunk("deit_small", tmp_path / "w.safetensors", **strict).eval()
    assert trunk.net.pos_embed.shape[1] == 1 + size[0] * size[1] // 256
    x = torch.randn(2, 3, *size)
    with torch.inference_mode(): torch.testing.assert_close(trunk(x), source(x), rtol=1e-4, atol=1e-4)
    # dynamic_img_size=False is timm's own, strict way
    with pytest.raises(AssertionError): trunk(torch.randn(1, 3, 32, 32))


def test_drop_path_is_only_in_training():
    trunk, x = deit(0, drop_path_rate=0.5), torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(trunk.eval()(x), trunk(x)) and torch.equal(trunk(x), deit(0)(x))
        assert not torch.equal(trunk.train()(x), trunk(x))


# ---- frozen first blocks

@pytest.mark.parametrize("name, args, n, last", [
    ("deit_small", SMALL, 2, 3),
    ("timm/resnet10t", {}, 3, 4),
    ("resnet34", {}, 1, 4),
    ("googlenet", {}, 2, 3),
    ("bn_inception", {}, 1, 3),
    (LITE0, {}, 4, 7), (INSTALLED[1], {}, 4, 7),
    ("convnext_atto", {}, 2, 4)])
def test_frozen_blocks(name, args, n, last):
    """No gradient below, and above it the gradients of a network that learns everywhere."""
    torch.manual_seed(0)
    norm = dict(freeze="none" if name in ("deit_small", "convnext_atto") else "bn")
    a = RetrievalNet(make_trunk(name, False, **args), embed_dim=6, freeze_blocks=n, **norm).train()
    for m in a.trunk.modules():
        if isinstance(m, nn.BatchNorm2d): m.weight.data.uniform_(0.5, 1.5)  # timm starts some at zero
    b = RetrievalNet(make_trunk(name, False, **args), embed_dim=6, **norm).train()
    b.load_state_dict(a.state_dict())
    stages, x = trunk_stages(a.trunk), torch.randn(2, 3, 64, 64)
    assert max(stages.values()) == last and min(stages.values()) == 0
    for net in (a, b): net(x)[:, 0].sum().backward()
    still = {k for k, p in a.trunk.net.named_parameters() if stages.get(k, 99) <= n}
    grads = dict(b.named_parameters())
    for k, p in a.named_parameters():
        if k.removeprefix("trunk.net.") in still:
            assert p.grad is None and not p.requires_grad and grads[k].grad is not None, k
        # ConvNeXt's last norm comes after its pooling, which is ours
        elif grads[k].grad is None: assert p.grad is None and "head.norm" in k
        else: assert torch.equal(p.grad, grads[k].grad), k
    assert 0 < len(still) < len(list(a.trunk.parameters()))
    first = next(k for k, _ in a.trunk.net.named_parameters() if "token" not in k and "pos" not in k)
    assert first in still  # the stem is part of it


def test_tokens_and_positions_are_frozen_too():
    net = RetrievalNet(deit(0), embed_dim=None, norm=None, freeze_blocks=1)
    still = {k.split(".")[0] for k, p in net.trunk.net.named_parameters() if not p.requires_grad}
    assert still == {"cls_token", "pos_embed", "patch_embed", "blocks"}
    learns = {k for k, p in net.trunk.net.named_parameters() if p.requires_grad}
    assert {k.split(".")[1] for k in learns if "blocks" in k} == {"1", "2"}
    assert net.trunk.net.norm.weight.requires_grad


def test_dropout_is_off_in_frozen_blocks():
    trunk = deit(0, depth=4, drop_path_rate=0.6, proj_drop_rate=0.3, attn_drop_rate=0.3, pos_drop_rate=0.3)
    net, seen = RetrievalNet(trunk, embed_dim=None, norm=None, freeze_blocks=2), {}
    for i in (1, 2):
        def keep(m, a, out, i=i): seen.setdefault(i, []).append(out.detach())
        net.trunk.net.blocks[i].register_forward_hook(keep)
    x = torch.randn(4, 3, 64, 64)
    for _ in range(2):
        net.eval()
        net.train()
        net(x)
    assert torch.equal(*seen[1]) and not torch.equal(*seen[2])
    assert net.training
    assert net.trunk.training
    assert not any(m.training for b in net.trunk.net.blocks[:2] for m in b.modules())
    assert net.trunk.net.blocks[2].training


def test_running_averages_are_frozen_in_frozen_stages():
    net = RetrievalNet("timm/resnet10t", pretrained=False, embed_dim=4, freeze_blocks=2).train()
    before = {k: v.clone() for k, v in net.trunk.net.state_dict().items() if "running" in k}
    net(torch.randn(4, 3, 64, 64))
    after = net.trunk.net.state_dict()
    moved = {k.split(".")[0] for k in before if not torch.equal(after[k], before[k])}
    assert moved == {"layer3", "layer4"}


def test_freeze_blocks_input():
    for bad in (-1, 4, True, 1.0, "2"):
        with pytest.raises(ValueError, match="freeze_blocks=.* does not fit: the trunk deit_small has 3 blocks"):
            RetrievalNet(deit(0), freeze_blocks=bad)
    with pytest.raises(ValueError, match="the trunk tiny has no blocks whose names are known"):
        RetrievalNet(tiny_trunk(), embed_dim=4, freeze_blocks=1)
    whole = RetrievalNet(deit(0), embed_dim=4, freeze="trunk", freeze_blocks=1)
    assert {k.split(".")[0] for k, p in whole.named_parameters() if p.requires_grad} == {"head"}
    assert not whole.train().trunk.training
    everything = RetrievalNet(deit(0), embed_dim=4, freeze_blocks=3)
    assert {k for k, p in everything.trunk.net.named_parameters() if p.requires_grad} == {"norm.weight", "norm.bias"}


# ---- whitening

def correlated(n, c, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(n, c) @ draw(c, c) + draw(c) * 3


@pytest.mark.parametrize("norm", [None, "l2", "layernorm"])
def test_whitening_gives_identity_covariance(norm):
    x = correlated(300, 12)
    head = Head(12, 7, norm=norm, init="whitening").double()
    z = head.whiten_(x).proj(head.norm(x)).detach()
    torch.testing.assert_close(z.mean(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cov(z.T, correction=0), torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.allclose(head.from_pooled(x).norm(dim=1), torch.ones(300, dtype=torch.float64)) and head.training


def test_whitening_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA
    x = correlated(200, 9)
    head = Head(9, 5, norm=None, init="whitening").double().whiten_(x)
    theirs = PCA(5, whiten=True, svd_solver="full").fit(x.numpy())
    z = torch.tensor(theirs.transform(x.numpy())) * (200 / 199) ** .5  # scikit-learn divides by N - 1
    torch.testing.assert_close(head.proj(x).detach().abs(), z.abs(), rtol=1e-9, atol=1e-9)
    # the sign is fixed
    assert (head.proj.weight.detach().gather(1, head.proj.weight.abs().argmax(1, keepdim=True)) > 0).all()


def test_unit_length_stands_before_the_projection():
    head, x = Head(6, 4, norm="l2"), torch.randn(5, 6, 3, 3)
    torch.testing.assert_close(head(x), head(x * 7))
    torch.testing.assert_close(head(x), nn.functional.normalize(head.proj(nn.functional.normalize(x.mean((2, 3))))))
    assert not torch.allclose(Head(6, 4, norm=None)(x), head(x), atol=1e-3)
    assert Head(6, 4, norm="l2").norm(x.mean((2, 3)).half()).dtype == torch.float32


def test_whitening_with_few_images():
    x = correlated(5, 12)
    head = Head(12, 8, norm=None, init="whitening").double()
    with pytest.warns(RuntimeWarning, match="5 images vary in 4 directions only; the other 4 rows"): head.whiten_(x)
    z = head.proj(x).detach()
    wanted = torch.diag(torch.tensor([1.] * 4 + [0.] * 4, dtype=torch.float64))
    torch.testing.assert_close(torch.cov(z.T, correction=0), wanted, rtol=0, atol=1e-8)
    flat = correlated(50, 4) @ torch.randn(4, 12, dtype=torch.float64)  # 50 images, 4 directions
    with pytest.warns(RuntimeWarning, match="50 images vary in 4 directions"): head.whiten_(flat)
    assert head.proj.weight.isfinite().all()


def test_whitening_input_errors():
    head = Head(6, 4, norm=None, init="whitening")
    for bad, words in ((torch.randn(5, 7), r"needs features \[N, 6\]"), (torch.randn(1, 6), "at least 2 images"),
                       (torch.ones(9, 6), "all 9 images are equal")):
        with pytest.raises(ValueError, match=words): head.whiten_(bad)
    x = torch.randn(9, 6)
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="row 3 are not finite"): head.whiten_(x)
    with pytest.raises(ValueError, match="without projection"): Head(6, None).whiten_(torch.randn(9, 6))
    with pytest.raises(ValueError, match="Known: default, kaiming, whitening"): Head(6, 4, init="pca")


def test_a_whitened_head_learns_and_can_be_kept(tmp_path):
    torch.manual_seed(0)
    net = RetrievalNet(tiny_trunk(), pooling="gem", norm="l2", embed_dim=5, init="whitening")
    images = torch.randn(40, 3, 32, 32)
    with torch.no_grad(): pooled = net.head.pool(net.trunk(images))
    net.head.whiten_(pooled)
    z = net.eval()(images)
    # no direction is lost
    assert abs(float(z.detach().mean())) < 0.1 and float(torch.linalg.eigvalsh(torch.cov(z.detach().T))[0]) > 0.05
    net.train()(images)[:, 0].sum().backward()
    assert net.head.proj.weight.grad.abs().max() > 0 and net.head.pool.p.grad is not None
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    again = RetrievalNet(tiny_trunk(1), pooling="gem", norm="l2", embed_dim=5)
    from safetensors.torch import load_file
    again.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(again.eval()(images), net.eval()(images))


# ---- sizes of the recipes

def steps(t): return [str(s) for s in t.transforms[:2]]


def test_recipe_sizes():
    bilinear = "interpolation=InterpolationMode.BILINEAR, antialias=True"
    resized = lambda side, crop: [f"Resize(size=[{side}], {bilinear})", f"CenterCrop(size=({crop}, {crop}))"]
    assert steps(prepare("resnet34", 256, resize=288)) == resized(288, 256)
    assert steps(prepare("resnet34", 256, resize=288, square=True))[0] == f"Resize(size=[288, 288], {bilinear})"
    info = trunk_info(on_meta("deit_small"))
    assert "size=[249]" in steps(prepare(info))[0] and "BICUBIC" in steps(prepare(info))[0]
    assert steps(prepare(info, resize=256, interpolation="bilinear")) == resized(256, 224)
    assert "size=[256]" in steps(train_transform("resnet34", 224, resize=256))[0]
    assert "size=[256, 256]" in steps(train_transform("resnet34", 224, resize=256, square=True))[0]
    usual = steps(train_transform(info))
    assert steps(train_transform(info, interpolation="bilinear")) == [s.replace("BICUBIC", "BILINEAR") for s in usual]
    for resize in (288, 256):
        assert repr(prepare("resnet34", 256, resize=resize)) == repr(prepare("resnet34", 256, crop_pct=256 / resize))
    image = Image.new("RGB", (400, 300), (9, 99, 199))
    assert prepare("resnet34", 256, resize=288, square=True)(image).shape == (3, 256, 256)
    assert train_transform("resnet34", 256, resize=288)(image).shape == (3, 256, 256)


@pytest.mark.parametrize("make", [prepare, train_transform])
@pytest.mark.parametrize("args, words", [
    (dict(size=0), "size must be a whole number"),
    (dict(size=10**6), "at most 4096"), (dict(size="32"), "whole number"),
    (dict(resize=0), "'resize' must be greater"), (dict(resize=10**6), "'resize' must be less"),
    (dict(square="no"), "'square' must be"), (dict(interpolation=3), "'interpolation' must be")])
def test_sizes_and_settings_that_make_no_sense_are_refused(make, args, words):
    with pytest.raises(ValueError, match=words): make("toy", **args)


@pytest.mark.parametrize("args, words", [
    (dict(flip=2), "'flip' must be less"),
    (dict(scale=(0., 1.)), "scale must rise"), (dict(scale=(.9, .1)), "scale must rise"),
    (dict(ratio=(0., 1.)), "ratio must be above 0"), (dict(scale=.5), "'scale' must be")])
def test_settings_of_random_crops_that_make_no_sense_are_refused(args, words):
    with pytest.raises(ValueError, match=words): train_transform("toy", 32, **args)


def test_size_errors():
    with pytest.raises(ValueError, match="resize=224 is less than the crop of 256"):
        prepare("resnet34", 256, resize=224)
    with pytest.raises(ValueError, match="not both"): prepare("resnet34", 256, crop_pct=0.9, resize=288)
    with pytest.raises(ValueError, match="give resize too"): train_transform("resnet34", 256, square=True)
    for f in (prepare, train_transform):
        with pytest.raises(ValueError, match="unknown interpolation 'bicubik'. Did you mean 'bicubic'"):
            f("resnet34", interpolation="bicubik")


# ---- features, precision and a GPU that is not there, for the further trunks

@pytest.mark.parametrize("name, args", [("googlenet", {}), ("deit_small", SMALL)])
def test_features_of_the_further_trunks(tmp_path, name, args):
    torch.manual_seed(0)
    trunk = make_trunk(name, pretrained=False, **args).eval()
    for m in trunk.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
    x = cached_features(trunk, Fake(5), image_size=64, cache_dir=tmp_path, progress=False)
    t = prepare(trunk, 64)
    with torch.inference_mode(): y = make_pooling("avg")(trunk(torch.stack([t(Fake().image(i)) for i in range(5)])))
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))
    assert torch.equal(cached_features(trunk, Fake(5), image_size=64, cache_dir=tmp_path, progress=False), x)
    assert len(list(tmp_path.glob("*.json"))) == 1
    if name == "googlenet": assert not any(isinstance(m, nn.BatchNorm2d) for m in batches._quick(trunk).modules())


@pytest.mark.parametrize("name, args", [("googlenet", {}), ("deit_small", SMALL), ("timm/resnet10t", {})])
def test_losses_in_bfloat16(name, args):
    from hapnb.losses import CalibrationLoss, SmoothAPLoss
    torch.manual_seed(0)
    trunk = make_trunk(name, False, **args)
    net = RetrievalNet(trunk, pooling="gem", embed_dim=16, freeze="bn").train()
    x = torch.randn(12, 3, 64, 64)
    y = torch.arange(12) // 3
    full = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16): half = net(x)
    assert half.dtype == torch.float32
    for loss in (CalibrationLoss(), SmoothAPLoss(tau=0.1)):
        assert abs(loss(half, y).item() - loss(full, y).item()) < 1e-2
    half[:, 0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name, size, head", [
    ("resnet101", 64, dict(pooling="gem", norm="l2", init="whitening", freeze="bn")),
    ("googlenet", 64, dict(pooling="avg+max")),
    ("bn_inception", 64, {}),
    ("resnet34", 64, {}),
    ("resnet50", 64, dict(freeze="bn")),
    ("tf_efficientnet_lite0", 64, {}),
    ("tf_efficientnet_lite2", 64, {}),
    ("deit_small", 96, {}),
    ("deit_base", 224, {}),
    ("vit_small", 224, {}),
    ("vit_base", 224, {}),
    ("vit_small_dino", 96, {}),
    ("vit_base_dino", 224, {})])
def test_all_trunks_on_a_fake_gpu(name, size, head):
    from torch._subclasses.fake_tensor import FakeTensorMode
    transformer = name in TRANSFORMERS
    with torch.device("meta"):
        own = dict(freeze_blocks=11, drop_path_rate=0.1) if transformer else dict(freeze_blocks=1)
        net = RetrievalNet(name, pretrained=False, embed_dim=4, **head, **own)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            net = net.to_empty(device="cuda")
            x = torch.randn(2, 3, size, size, device="cuda")
        except (RuntimeError, AssertionError) as e:
            if "CUDA" not in str(e) and "cuda" not in str(e): raise
            pytest.skip(f"this torch cannot make fake CUDA tensors: {e}")
        assert {p.device.type for p in net.parameters()} == {"cuda"}
        for mode in (True, False):
            z = net.train(mode)(x)
            assert z.shape == (2, 4) and z.device.type == "cuda" and z.dtype == torch.float32


def test_no_trunk_is_forgotten():
    # those of one builder are partial functions
    home = lambda f: getattr(f, "func", f).__module__
    ours = {n for n in TRUNKS.names() if home(TRUNKS.get(n)) in ("hapnb.models", "hapnb.trunks")} - {"toy"}
    assert ours == {case[0] for case in test_all_trunks_on_a_fake_gpu.pytestmark[0].args[1]}
