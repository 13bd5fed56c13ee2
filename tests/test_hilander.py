"""Graphs and Hi-LANDER agree with loops from the formulas; order, batch size and interruptions change nothing."""
import dataclasses, json, math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from hapnb import graphs
from hapnb.graphs import (Graph, canonical_order, find_parents, find_roots, knn_graph, same_class, supervised_density,
                          toy_points, training_levels)
from hapnb.hilander import (HiLander, HiLanderConfig, build_hilander, cluster_hilander, edge_loss, load_hilander,
                            predict_edges, train_hilander)
from hapnb.train import Diverged

SMALL = HiLanderConfig(k=(5, 3), levels=(2, 2), hidden=16, edge_hidden=8, epochs=6)


def blobs(classes=12, n=8, D=16, noise=0.5, seed=0):
    "Unit vectors around random centres, and their labels."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(n)
    return F.normalize(F.normalize(torch.randn(classes, D, generator=g), dim=1)[y]
                       + noise * torch.randn(len(y), D, generator=g) / D**0.5, dim=1), y


@pytest.fixture(scope="module")
def model():
    x, y = blobs(80, noise=.8)
    return train_hilander(x, y, dataclasses.replace(SMALL, epochs=60, lr=1e-2), device="cpu", progress=False)


# graphs

def knn_loop(x, k):
    x = x.double()
    x = x / x.norm(dim=1, keepdim=True)
    out = []
    for i in range(len(x)):
        others = sorted((-float(x[i] @ x[j]), j) for j in range(len(x)) if j != i)
        out.append([(j, max(-a, 0)) for a, j in others[:k]])
    return out


@pytest.mark.parametrize("n, k", [(40, 7), (40, 1), (5, 10), (2, 3)])
def test_knn_graph_against_a_loop(n, k):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) * 3
    g, want = knn_graph(x, k), knn_loop(x, k)
    assert g.neighbours.tolist() == [[j for j, _ in row] for row in want]
    assert torch.allclose(g.similarity, torch.tensor([[a for _, a in row] for row in want]), atol=1e-6)
    assert (g.similarity >= 0).all() and (g.similarity[:, :-1] >= g.similarity[:, 1:]).all()


def test_search_in_blocks_finds_what_faiss_finds():
    x = F.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    blocks = torch.cat([(b @ x.T).topk(13, dim=1).indices for b in x.split(10)])
    a, b = (graphs._pick(x, found, 8) for found in (graphs._candidates(x, 13), blocks))
    assert torch.equal(a.neighbours, b.neighbours) and torch.equal(a.similarity, b.similarity)


def test_ties_go_to_the_smaller_row_and_copies_are_neighbours():
    x = torch.tensor([[1., 0], [0, 1], [1, 0], [1, 0], [0, -1]])
    g = knn_graph(x, 3)
    assert g.neighbours.tolist() == [[2, 3, 1], [0, 2, 3], [0, 3, 1], [0, 2, 1], [0, 2, 3]]
    assert g.similarity[4].tolist() == [0, 0, 0]  # at right angles, and the opposite vector is clamped


def test_similarity_is_symmetric_to_the_last_bit():
    g = knn_graph(torch.randn(200, 33, generator=torch.Generator().manual_seed(1)), 12)
    seen = {(i, j): a for i, (nb, s) in enumerate(zip(g.neighbours.tolist(), g.similarity.tolist()))
            for j, a in zip(nb, s)}
    both = [(e, seen[e[::-1]]) for e in seen if e[::-1] in seen]
    assert len(both) > 500 and all(seen[e] == a for e, a in both)


def test_supervised_density_against_a_loop():
    x, y = blobs()
    y[3] = -1
    g = knn_graph(x, 6)
    want = [sum(a * (1 if y[j] == y[i] >= 0 else -1) for j, a in zip(nb, s)) / 6
            for i, (nb, s) in enumerate(zip(g.neighbours.tolist(), g.similarity.tolist()))]
    assert torch.allclose(supervised_density(g, y), torch.tensor(want), atol=1e-6)
    toy = Graph(torch.tensor([[1, 2, 3]] * 4), torch.tensor([[.9, .8, .6]] * 4))
    assert supervised_density(toy, torch.tensor([0, 0, 0, 1]))[0].item() == pytest.approx(0.36667, abs=1e-5)


def parents_loop(neighbours, density, far, below):
    out = []
    for i, row in enumerate(neighbours):
        good = [(far[i][c], c, j) for c, j in enumerate(row) if density[j] > density[i] and far[i][c] < below]
        out.append(min(good)[2] if good else -1)
    return out


@st.composite
def forests(draw):
    "A random graph with few different densities and distances, so that ties are common."
    n = draw(st.integers(2, 14))
    k = draw(st.integers(1, min(4, n - 1)))
    nb = [draw(st.permutations([j for j in range(n) if j != i]))[:k] for i in range(n)]
    few = st.sampled_from([0., .25, .5, .75, 1.])
    return nb, draw(st.lists(few, min_size=n, max_size=n)), [draw(st.lists(few, min_size=k, max_size=k))
                                                             for _ in range(n)], draw(st.sampled_from([.3, .6, 2.]))


@settings(deadline=None, max_examples=150)
@given(forests())
def test_parents_are_a_forest(case):
    nb, density, far, below = case
    g = Graph(torch.tensor(nb), torch.zeros(len(nb), len(nb[0])))
    parents = find_parents(g, torch.tensor(density), torch.tensor(far), below)
    assert parents.tolist() == parents_loop(nb, density, far, below)
    roots = find_roots(parents)
    for i in range(len(nb)):
        at, steps = i, 0
        while parents[at] >= 0:
            assert density[parents[at]] > density[at]
            at, steps = int(parents[at]), steps + 1
            assert steps <= len(nb)
        assert at == roots[i]                                   # every point reaches its peak
        if parents[i] >= 0: assert roots[i] == roots[parents[i]]  # and is constant on its tree


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_roots_of_deep_trees(dice):
    parents = torch.tensor([-1] + [d % (i + 1) for i, d in enumerate(dice)])
    assert (find_roots(parents) == 0).all()
    assert (find_roots(torch.arange(len(parents)) - 1) == 0).all()  # a chain


def test_training_levels_against_a_loop():
    x, y = toy_points(sizes=(9, 8, 7, 6))
    nodes, members = list(range(len(x))), {i: [i] for i in range(len(x))}
    for level in training_levels(x, y, k=3, levels=3):
        assert level.nodes.tolist() == nodes
        for i, m in zip(nodes, level.means): assert torch.allclose(m, x[members[i]].mean(0), atol=1e-6)
        g = knn_graph(x[nodes], 3)
        d = supervised_density(g, y[nodes])
        up = parents_loop(g.neighbours.tolist(), d.tolist(), (1 - g.similarity).tolist(), math.inf)
        tops = []
        for i in range(len(nodes)):
            at = i
            while up[at] >= 0: at = up[at]
            tops.append(at)
        new = {nodes[t]: [] for t in sorted(set(tops))}
        for i, t in enumerate(tops): new[nodes[t]] += members[nodes[i]]
        nodes, members = list(new), new


def test_links_within_classes_never_leave_them():
    x, y = blobs(noise=2.)
    top = training_levels(x, y, k=5, levels=9, links="class")[-1]
    assert set(y[top.nodes].tolist()) == set(y.tolist())


def test_canonical_order_is_the_same_for_every_order_and_merges_copies():
    x, _ = blobs()
    x = torch.cat([x, x[:5], 4 * x[2:3]])
    u, place, first = canonical_order(x)
    assert len(u) == 96 and torch.equal(place[96:101], place[:5]) and place[101] == place[2]
    assert torch.equal(place[first], torch.arange(96)) and (first < 96).all()
    p = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    v, other, _ = canonical_order(x[p])
    assert torch.equal(u, v) and torch.equal(other, place[p])
    zeros = torch.tensor([[0., 1.], [-0., 1.]])
    assert len(canonical_order(zeros)[0]) == 1


# layer and head

def net(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return HiLander(5, 7, 6, **options).to(dtype)


OPTIONS = [dict(), dict(self_loop=True), dict(attention=False), dict(edge_similarity=True, self_loop=True),
           dict(attention=False, self_loop=True)]


def forward_loop(m, x, nb, a):
    "Edge by edge from the formulas."
    o, (N, k) = m.options, nb.shape
    h = [m.project.weight @ v for v in x]
    z = []
    for i in range(N):
        js, ws = nb[i].tolist(), a[i].tolist()
        if o["self_loop"]: js, ws = [i] + js, [1.] + ws
        if o["attention"]:
            e = torch.stack([F.leaky_relu(m.attend[0] @ h[j] + m.attend[1] @ h[i], 0.2) for j in js]).exp()
            w = e / e.sum()
        else: w = torch.tensor(ws, dtype=x.dtype) / sum(ws)
        z.append(torch.relu(sum(w_ * h[j] for w_, j in zip(w, js)) + m.bias))
    prelu = lambda v, layer: torch.where(v > 0, v, layer.weight * v)
    logits = torch.zeros(N, k, 2, dtype=x.dtype)
    for i in range(N):
        for c, j in enumerate(nb[i].tolist()):
            e = m.source(z[j]) + m.target(z[i])
            if o["edge_similarity"]:
                b = (a - m.scale[0]) / m.scale[1]
                e = e + b[i, c] * m.cosine[0] + b[j].mean() * m.cosine[1] + b[i].mean() * m.cosine[2]
            logits[i, c] = m.last(prelu(m.middle(prelu(e, m.first)), m.second))
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return logits, torch.stack([sum(a[i, c] * (p[i, c, 1] - p[i, c, 0]) for c in range(k)) / k for i in range(N)])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_against_a_loop(options):
    m = net(**options)
    m.scale.copy_(torch.tensor([.3, .2]))
    x = torch.randn(9, 5, dtype=torch.float64)
    g = knn_graph(x, 3)
    with torch.no_grad():
        for got, want in zip(m(x, g.neighbours, g.similarity.double()),
                             forward_loop(m, x, g.neighbours, g.similarity.double())):
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_the_formula(options):
    m = net(**options)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    g = knn_graph(x.detach(), 2)
    a = g.similarity.double()
    names, values = zip(*m.named_parameters())
    f = lambda x, *w: torch.func.functional_call(m, dict(zip(names, w)), (x, g.neighbours, a))
    assert torch.autograd.gradcheck(f, (x, *values), atol=1e-6)


def test_a_batch_gives_its_contribution_to_the_whole():
    m, (x, _) = net(), blobs(D=5)
    x, g = x.double(), knn_graph(x, 4)
    whole = m(x, g.neighbours, g.similarity)
    rows = torch.randperm(len(x))[:17]
    part = m(x, g.neighbours, g.similarity, rows)
    for w, p in zip(whole, part): assert torch.allclose(w[rows], p, atol=1e-12)
    grads = lambda loss: torch.autograd.grad(loss, list(m.parameters()), retain_graph=True)
    total = [sum(t) for t in zip(*(grads(m(x, g.neighbours, g.similarity, r)[1].square().sum())
                                   for r in torch.arange(len(x)).split(10)))]
    for a, b in zip(total, grads(whole[1].square().sum())): assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_everything_is_made_on_the_device_of_the_input():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(), torch.device("cuda"):
        m = HiLander(8, 16, 12, self_loop=True, edge_similarity=True)
        logits, d = m(torch.randn(20, 8, device="cuda"), torch.zeros(20, 4, dtype=torch.long, device="cuda"),
                      torch.rand(20, 4, device="cuda"))
        loss = edge_loss(logits, torch.ones(20, 4, dtype=torch.bool, device="cuda"),
                         torch.ones(20, 4, dtype=torch.bool, device="cuda"), focal=2.)
    assert logits.shape == (20, 4, 2) and d.shape == (20,) and {t.device.type for t in (logits, d, loss)} == {"cuda"}


def test_autocast_changes_the_result_little_and_breaks_no_gradient():
    m, (x, _) = net(torch.float32, edge_similarity=True, self_loop=True), blobs(D=5)
    g = knn_graph(x, 4)
    exact = m(x, g.neighbours, g.similarity)
    with torch.autocast("cpu", dtype=torch.bfloat16): rough = m(x, g.neighbours, g.similarity)
    for e, r in zip(exact, rough): assert r.dtype == torch.float32 and torch.allclose(e, r, atol=0.05)
    rough[1].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())


# losses

def test_edge_loss_against_a_loop():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4, 2, generator=g, dtype=torch.float64)
    same = torch.rand(20, 4, generator=g) < .3
    counted = torch.rand(20, 4, generator=g) < .6
    def term(i, c, gamma):
        l = logits[i, c]
        p = math.exp(l[int(same[i, c])]) / (math.exp(l[0]) + math.exp(l[1]))
        return -(1 - p)**gamma * math.log(p)
    for gamma in (0., 2.):
        kinds = {s: [term(i, c, gamma) for i in range(20) for c in range(4) if counted[i, c] and bool(same[i, c]) == s]
                 for s in (True, False)}
        mean = {s: sum(v) / len(v) for s, v in kinds.items()}
        assert edge_loss(logits, same, counted, gamma).item() == pytest.approx((mean[True] + mean[False]) / 2, rel=1e-9)
        assert edge_loss(logits, same, counted, gamma, "none").item() == pytest.approx(sum(sum(v)
            for v in kinds.values()) / sum(map(len, kinds.values())), rel=1e-9)


def test_sampled_balance_keeps_as_many_of_each():
    from hapnb.edge_network import _thin
    yes, no = torch.rand(30, 5) < .2, torch.rand(30, 5) < .9
    no &= ~yes
    a, b = (_thin(yes, no, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert (a & yes).sum() == (a & no).sum() == yes.sum() and not (a & ~yes & ~no).any() and not torch.equal(a, b)
    assert not _thin(yes, no & False, None).any()


def test_only_edges_from_denser_sources_count():
    from hapnb.hilander import _task
    x, y = blobs()
    level = training_levels(x, y, 4, 1)[0]
    t = _task(level, SMALL, "cpu")
    for i, row in enumerate(level.graph.neighbours.tolist()):
        assert t.counted[i].tolist() == [bool(level.density[j] > level.density[i]) for j in row]


@pytest.mark.parametrize("balance", ["weight", "sample", "none"])
@pytest.mark.parametrize("same", [True, False])
def test_graphs_whose_edges_are_all_of_one_kind_have_finite_losses(balance, same):
    logits = torch.randn(4, 3, 2, requires_grad=True)
    loss = edge_loss(logits, torch.full((4, 3), same), torch.ones(4, 3, dtype=torch.bool), balance=balance,
                     generator=torch.Generator())
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert (loss == 0) == (balance == "sample")


# training

def weights(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


@pytest.mark.parametrize("changes", [dict(), dict(batch_size=20, balance="sample"),
                                     dict(optimizer="sgd", lr=.01, cluster_features=True, focal=2.)], ids=str)
def test_interrupted_training_ends_at_the_same_weights(tmp_path, changes):
    x, y = blobs()
    cfg = dataclasses.replace(SMALL, **changes)
    whole = train_hilander(x, y, cfg, device="cpu", progress=False)
    class Stop(Exception): pass
    def stop(row):
        if row["epoch"] in (2, 5): raise Stop
    for _ in range(2):
        with pytest.raises(Stop):
            train_hilander(x, y, cfg, device="cpu", progress=False, state=tmp_path / "s.pt", save_every=0,
                           on_epoch=stop)
    resumed = train_hilander(x, y, cfg, device="cpu", progress=False, state=tmp_path / "s.pt", save_every=0)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.history == resumed.history
    assert len(whole.history) == 6
    again = train_hilander(x, y, cfg, device="cpu", progress=False, state=tmp_path / "s.pt")  # finished: read back
    assert torch.equal(weights(whole), weights(again))


def test_training_leaves_the_global_generator_alone():
    x, y = blobs()
    torch.manual_seed(5)
    a = torch.rand(3)
    torch.manual_seed(5)
    m = train_hilander(x, y, SMALL, device="cpu", progress=False)
    assert torch.equal(a, torch.rand(3))
    assert torch.equal(weights(m), weights(train_hilander(x, y, SMALL, device="cpu", progress=False)))
    assert not torch.equal(weights(m), weights(train_hilander(x, y, dataclasses.replace(SMALL, seed=1), device="cpu",
                                                              progress=False)))


def test_a_state_of_other_data_or_settings_or_a_damaged_one_is_refused(tmp_path):
    x, y = blobs()
    s = tmp_path / "s.pt"
    train_hilander(x, y, SMALL, device="cpu", progress=False, state=s)
    with pytest.raises(ValueError, match="other features, labels or settings"):
        train_hilander(x, y.flip(0), SMALL, device="cpu", progress=False, state=s)
    with pytest.raises(ValueError, match="other features, labels or settings"):
        train_hilander(x, y, dataclasses.replace(SMALL, lr=.1), device="cpu", progress=False, state=s)
    s.write_bytes(s.read_bytes()[:100])
    with pytest.raises(ValueError, match="no readable state"):
        train_hilander(x, y, SMALL, device="cpu", progress=False, state=s)


def test_training_learns(model):
    assert model.history[-1]["edge"] < 0.5 * model.history[0]["edge"]
    x, y = blobs(30, noise=.8, seed=7)  # other classes
    found = cluster_hilander(model, x, k=5, tau=.5, device="cpu").labels
    pairs = lambda v: v[:, None] == v
    same, together = pairs(y).fill_diagonal_(False), pairs(found).fill_diagonal_(False)
    assert (same & together).sum() > 0.45 * same.sum()
    assert (same & together).sum() > 0.55 * together.sum()  # the classes overlap


@pytest.mark.parametrize("x, y, message", [
    (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), "0 labelled row"),
    (torch.randn(4, 4), torch.zeros(4, dtype=torch.long), "all 4 labelled rows are of class 0"),
    (torch.randn(4, 4), torch.arange(4), "each of the 4 classes has one row"),
    (torch.randn(4, 4), torch.full((4,), -1), "0 labelled row"),
    (torch.ones(4, 4), torch.tensor([0, 0, 1, 1]), "identical"),
    (torch.randn(4, 4), torch.tensor([0, 0, 1]), "4 rows but 3 labels"),
    (torch.tensor([[1., 0], [math.nan, 1], [0, 1], [1, 1]]), torch.tensor([0, 0, 1, 1]), r"row\(s\) 1 of 4"),
    (torch.tensor([[1., 0], [0, 0], [0, 1], [1, 1]]), torch.tensor([0, 0, 1, 1]), r"row\(s\) 1 of 4 are all zero"),
])
def test_unusable_training_sets_are_refused_with_the_reason(x, y, message):
    with pytest.raises(ValueError, match=message): train_hilander(x, y, SMALL, device="cpu", progress=False)


def test_a_diverging_training_says_so():
    x, y = blobs()
    with pytest.raises(Diverged, match="use a smaller lr"):
        train_hilander(x, y, dataclasses.replace(SMALL, optimizer="sgd", lr=1e30, epochs=20), device="cpu",
                       progress=False)


def test_unknown_labels_are_left_out_and_coarse_ones_ignored():
    x, y = blobs()
    z = torch.cat([x, torch.randn(5, 16)])
    labels = torch.stack([torch.cat([y, torch.full((5,), -1)]), torch.cat([y, torch.full((5,), -1)]) // 4], 1)
    a = train_hilander(x, y, SMALL, device="cpu", progress=False)
    b = train_hilander(z, labels, SMALL, device="cpu", progress=False)
    assert torch.equal(weights(a), weights(b))


def test_small_training_sets_shrink_k():
    x, y = blobs(2, 2)
    m = train_hilander(x, y, SMALL, device="cpu", progress=False)
    assert weights(m).isfinite().all()


# saving

def test_a_saved_model_gives_the_same_clusters(model, tmp_path):
    model.save(tmp_path / "m")
    back = load_hilander(tmp_path / "m")
    x, _ = blobs(seed=3)
    assert torch.equal(cluster_hilander(model, x, k=5, device="cpu").labels,
                       cluster_hilander(back, x, k=5, device="cpu").labels)
    assert back.config == model.config and back.history == model.history
    with pytest.raises(ValueError, match="x has 5 dimensions, but the model was trained on 16"):
        cluster_hilander(back, torch.randn(9, 5))
    from hapnb.clustering import cluster
    named = cluster(x, "hilander", model=tmp_path / "m", k=5, device="cpu")
    want = cluster_hilander(model, x, k=5, device="cpu").labels
    assert torch.equal(named[:, None] == named, want[:, None] == want)
    about = json.loads((tmp_path / "m" / "hilander.json").read_text())
    about["options"]["hidden"] = 99
    (tmp_path / "m" / "hilander.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="hilander.json differs from what was saved"): load_hilander(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="nowhere holds no Hi-LANDER model: hilander.json is missing"):
        load_hilander(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["hilander.json", "hilander.safetensors"])
def test_a_flipped_bit_in_a_saved_model_is_found(model, tmp_path, name):
    whole = model.save(tmp_path).joinpath(name).read_bytes()
    for at in range(3, len(whole) - 3, max(len(whole) // 25, 1)):
        data = bytearray(whole)
        data[at] ^= 1
        (tmp_path / name).write_bytes(data)
        try:
            back = load_hilander(tmp_path)
        except ValueError as e:
            assert "damaged" in str(e)
        else:  # a blank between two values of JSON means nothing
            assert torch.equal(weights(back), weights(model)) and back.history == model.history
    for text in ("[" * 100_000, "[1]", "{}", '{"sha256": 3}'):
        (tmp_path / "hilander.json").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            load_hilander(tmp_path)


# clustering

def cluster_loop(m, x, k, tau, distance, max_levels, early_stop):
    "Level by level with lists and dicts; the network over the whole graph at once."
    u = canonical_order(x)[0]
    nodes, members, before = list(range(len(u))), {i: [i] for i in range(len(u))}, None
    for _ in range(max_levels):
        if len(nodes) < 2: break
        g = knn_graph(u[nodes], k)
        f = u[nodes]
        if m.options["cluster_features"]:
            f = torch.cat([f, torch.stack([u[members[i]].double().mean(0).float() for i in nodes])], 1)
        with torch.no_grad(): logits, d = m(f, g.neighbours, g.similarity)
        far = 1 - (logits.softmax(-1)[..., 1] if distance == "prob" else g.similarity)
        up = parents_loop(g.neighbours.tolist(), d.tolist(), far.tolist(), 1 - tau)
        new = {}
        for i in range(len(nodes)):
            at = i
            while up[at] >= 0: at = up[at]
            new.setdefault(nodes[at], []).extend(members[nodes[i]])
        now = sum(p >= 0 for p in up)
        nodes, members = sorted(new), new
        if now == 0 or (early_stop and before is not None and before / now < k): break
        before = now
    return {frozenset(v) for v in members.values()}


@pytest.mark.parametrize("distance, tau, early_stop, cluster_features", [
    ("prob", .5, True, False), ("prob", .5, False, True), ("prob", .9, True, True), ("prob", 0., False, False),
    ("sim", .6, True, True), ("sim", .6, False, False)])
def test_decoding_against_a_loop(distance, tau, early_stop, cluster_features):
    x, y = blobs(15, 6, noise=1.)
    m = train_hilander(x, y, dataclasses.replace(SMALL, cluster_features=cluster_features, epochs=10), device="cpu",
                       progress=False)
    x, _ = blobs(15, 6, noise=1., seed=1)
    found = cluster_hilander(m, x, 4, tau, distance, early_stop=early_stop, device="cpu")
    place = canonical_order(x)[1]
    groups = {}
    for p, c in zip(place.tolist(), found.labels.tolist()): groups.setdefault(c, []).append(p)
    assert {frozenset(v) for v in groups.values()} == cluster_loop(m, x, 4, tau, distance, 10, early_stop)


def check_clusters(c, n):
    "What holds for every clustering."
    assert len(c.labels) == len(c.density) == len(c.parents) == n
    assert c.labels.unique().tolist() == list(range(len(c))) and (c.sizes[:-1] >= c.sizes[1:]).all()
    roots = find_roots(c.parents)
    assert torch.equal(c.labels, c.labels[roots]) and len(roots.unique()) == len(c)
    for a, b in zip(c.levels, c.levels[1:]): assert torch.equal(a.peaks, b.nodes)
    for l in c.levels:
        assert len(l.nodes) == len(l.parents) == len(l.density) and torch.equal(l.nodes[l.parents < 0], l.peaks)


@pytest.mark.parametrize("n", [40, 1300])  # less and more than a block of 512
def test_order_and_batch_size_change_nothing(model, n):
    x, _ = blobs(n // 8, 8, noise=1.5, seed=2)
    x = torch.cat([x, x[:9]])
    whole = cluster_hilander(model, x, k=5, tau=.5, device="cpu")
    check_clusters(whole, len(x))
    assert torch.equal(whole.labels[-9:], whole.labels[:9])
    for seed in range(3):
        p = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        c = cluster_hilander(model, x[p], k=5, tau=.5, device="cpu", batch_size=[1, 600, None][seed])
        assert torch.equal(c.labels, whole.labels[p]) and torch.equal(c.density, whole.density[p])
    for b in (1, 7, 512, 513, len(x)):
        c = cluster_hilander(model, x, k=5, tau=.5, device="cpu", batch_size=b)
        assert torch.equal(c.labels, whole.labels)
        assert torch.equal(c.density, whole.density)
        assert torch.equal(c.parents, whole.parents)


def test_a_copy_changes_nothing_for_others(model):
    x, _ = blobs(20, 8, noise=1.5, seed=4)
    a = cluster_hilander(model, x, k=5, device="cpu")
    b = cluster_hilander(model, torch.cat([x, x[:1].repeat(30, 1)]), k=5, device="cpu")
    same = lambda v: v[:, None] == v
    assert torch.equal(same(a.labels), same(b.labels[:160])) and torch.equal(a.density, b.density[:160])
    assert (b.labels[160:] == b.labels[0]).all() and (b.parents[160:] == 0).all()


def test_small_sets_and_wrong_arguments(model):
    one = cluster_hilander(model, torch.ones(1, 16), device="cpu")
    assert one.labels.tolist() == [0] and one.density.tolist() == [0] and one.levels == []
    same = cluster_hilander(model, torch.ones(50, 16), device="cpu")
    assert len(same) == 1 and same.parents.tolist() == [-1] + [0] * 49
    for n in (2, 3, 7):
        c = cluster_hilander(model, blobs(1, n)[0], k=10, tau=0., device="cpu")
        check_clusters(c, n)
        assert c.levels[0].k == n - 1
    with pytest.raises(ValueError, match="nothing to cluster"):
        cluster_hilander(model, torch.zeros(0, 16), device="cpu")
    with pytest.raises(ValueError, match=r"NaN or infinite values in row\(s\) 2 of 3"):
        cluster_hilander(model, torch.cat([torch.ones(2, 16), torch.full((1, 16), math.nan)]), device="cpu")
    with pytest.raises(ValueError, match="must be 'prob' or 'sim'"):
        cluster_hilander(model, torch.ones(3, 16), distance="probs", device="cpu")
    for wrong in (dict(tau=-1), dict(tau=1.5), dict(k=0), dict(max_levels=0), dict(batch_size=0), dict(tau=math.nan),
                  dict(early_stop="no")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            cluster_hilander(model, torch.ones(3, 16), device="cpu", **wrong)
    broken = build_hilander(16, SMALL)
    with torch.no_grad(): broken.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"): cluster_hilander(broken, blobs()[0], device="cpu")


def test_tau_of_one_links_nothing_and_max_levels_holds(model):
    x, _ = blobs(20, 8, seed=4)
    assert len(cluster_hilander(model, x, k=5, tau=1., device="cpu")) == 160
    c = cluster_hilander(model, x, k=5, tau=0., max_levels=1, early_stop=False, device="cpu")
    assert len(c.levels) == 1


def test_clustering_leaves_the_model_alone(model):
    before = weights(model).clone()
    model.train()
    cluster_hilander(model, blobs()[0], device="cpu")
    assert model.training and torch.equal(before, weights(model))
    model.eval()


def test_blocks_agree_with_the_whole_graph(model):
    x, _ = blobs(150, 8, seed=5)
    g = knn_graph(x, 6)
    p, d = predict_edges(model, x, g)
    with torch.no_grad(): logits, want = model(x, g.neighbours, g.similarity)
    assert torch.allclose(p, logits.softmax(-1)[..., 1], atol=1e-5) and torch.allclose(d, want, atol=1e-5)
