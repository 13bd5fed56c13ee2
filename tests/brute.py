"""Losses written as loops over Python floats, straight from the papers' formulas.

Nothing here is vectorised and nothing is imported from hapnb: this file is the opinion that the library is
compared with. Scores and relevances are plain lists; every function returns the value of each query (None for a
query that does not count) and the slope of that value with respect to each of the query's scores.
"""
import math

import numpy as np


def sigmoid(x): return 1 / (1 + math.exp(-min(max(x, -50.), 50.)))


def smooth_step(x, tau):
    "The sigmoid of Smooth-AP and its slope."
    s = sigmoid(x / tau)
    return s, s * (1 - s) / tau


def sup_step(x, tau=.01, rho=100., delta=.05, offset=1.44, start=.5):
    "The three pieces of H^- (ROADMAP, HAPPIER) and their slopes."
    s, slope = smooth_step(x, tau)
    if x <= 0: return s, slope
    if delta is None: return rho * x + (start if offset is None else offset), rho
    if x <= delta: return start + s, slope
    if offset is None: offset = sigmoid(delta / tau) + start
    return rho * (x - delta) + offset, rho


def hrank_step(x, beta=25., gamma=.5, leak=10.):
    "HAPPIER's lower bound of the step for more relevant items, and its slope."
    if x <= 0: return leak * x, leak
    v = beta * x + gamma
    return (v, beta) if v < 1 else (1., 0.)


def shared(query_labels, ref_labels):
    "How many levels each pair shares; -1 is equal to nothing."
    return [[sum(a == b and a != -1 for a, b in zip(q, r)) for r in ref_labels] for q in query_labels]


def pop(levels, depth, alpha=1.):
    "HAPPIER's default relevance: (l/L)^alpha divided by the number of items with exactly that level."
    n = {l: levels.count(l) for l in levels}
    return [(l / depth) ** alpha / n[l] if l > 0 else 0. for l in levels]


def weighted(levels, weights):
    "The 'map' relevance: sum over m <= l of w_m / (number of items with level >= m)."
    c = [sum(l >= m for l in levels) for m in range(len(weights) + 1)]
    return [sum(weights[m - 1] / c[m] for m in range(1, l + 1)) for l in levels]


def hap(scores, levels, rel, step, hstep=None):
    """1 - (1/sum rel) sum_k Hrank(k)/rank(k) for every query.

    `step(x)` smooths the comparison with a less relevant item, `hstep(x)` (if given) the H-rank comparison with a
    more relevant one; every other comparison is the exact step, 1 at 0."""
    values, slopes = [], []
    for s, l, r in zip(scores, levels, rel):
        ks, n = [k for k in range(len(s)) if l[k] > 0], len(s)
        g, total, value = [0.] * n, sum(r[k] for k in ks), 1.
        for k in ks:
            rank, hrank, drank, dhrank = 1., r[k], [0.] * n, [0.] * n
            for j in range(n):
                if j == k: continue
                x = s[j] - s[k]
                exact = 1. if x >= 0 else 0.
                if l[j] < l[k]: h, drank[j] = step(x)
                else: h = exact
                rank += h
                if l[j] > l[k] and hstep is not None:
                    e, dhrank[j] = hstep(x)
                    dhrank[j] *= min(r[j], r[k])
                else: e = exact
                hrank += e * min(r[j], r[k])
            value -= hrank / rank / total
            for j in range(n):
                d = (dhrank[j] / rank - hrank / rank ** 2 * drank[j]) / total
                g[j] -= d
                g[k] += d
        values.append(value if ks else None)
        slopes.append(g)
    return values, slopes


def smooth_ap(scores, positive, tau=.01):
    "Smooth-AP: every comparison is a sigmoid."
    values, slopes = [], []
    for s, p in zip(scores, positive):
        ks, n = [k for k in range(len(s)) if p[k]], len(s)
        g, value = [0.] * n, 1.
        for k in ks:
            up, rank, dup, drank = 1., 1., [0.] * n, [0.] * n
            for j in range(n):
                if j == k: continue
                h, drank[j] = smooth_step(s[j] - s[k], tau)
                rank += h
                if p[j]: up, dup[j] = up + h, drank[j]
            value -= up / rank / len(ks)
            for j in range(n):
                d = (dup[j] / rank - up / rank ** 2 * drank[j]) / len(ks)
                g[j] -= d
                g[k] += d
        values.append(value if ks else None)
        slopes.append(g)
    return values, slopes


def sup_ap(scores, positive, **kw):
    "SupAP is H-AP with one level and equal relevances."
    p = [[int(bool(x)) for x in row] for row in positive]
    return hap(scores, p, [[float(x) for x in row] for row in p], lambda x: sup_step(x, **kw))


def of_rank(scores, levels, step, worth, same=None):
    """1 - sum_k worth(rank(k)) for losses of the rank alone.

    `step(x)` smooths the comparison with an item of a lower level; `same(x)` the others (default: the exact step).
    `worth(row)` gives, from a query's levels, a function (level, rank) -> (value, slope)."""
    values, slopes = [], []
    for s, l in zip(scores, levels):
        ks, n, of = [k for k in range(len(s)) if l[k] > 0], len(s), worth(l)
        g, value = [0.] * n, 1.
        for k in ks:
            rank, drank = 1., [0.] * n
            for j in range(n):
                if j == k: continue
                x = s[j] - s[k]
                if l[j] < l[k]: h, drank[j] = step(x)
                elif same: h, drank[j] = same(x)
                else: h = 1. if x >= 0 else 0.
                rank += h
            w, slope = of(l[k], rank)
            value -= w
            for j in range(n):
                g[j] -= slope * drank[j]
                g[k] += slope * drank[j]
        values.append(value if ks else None)
        slopes.append(g)
    return values, slopes


def recall_worth(ks=(1, 2, 4, 8, 16), T=1.):
    "Recall@k with a soft cut, over the number of positives that fit, averaged over k."
    def worth(row):
        n = sum(l > 0 for l in row)
        def of(level, rank):
            parts = [(smooth_step(k - rank, T), min(n, k) * len(ks)) for k in ks]
            return sum(s / m for (s, _), m in parts), -sum(d / m for (_, d), m in parts)
        return of
    return worth


def ndcg_worth(row):
    "Gain 2^level - 1, discounted by log2(1 + rank), over the best order's sum."
    best = sum((2 ** l - 1) / math.log2(1 + i) for i, l in enumerate(sorted(row, reverse=True), 1))
    def of(level, rank):
        log = math.log2(1 + rank)
        return (2 ** level - 1) / log / best, -(2 ** level - 1) / log ** 2 / ((1 + rank) * math.log(2)) / best
    return of


def smooth_hap(scores, levels, rel, tau=.01):
    "H-AP with every comparison a sigmoid, in rank and in H-rank."
    values, slopes = [], []
    for s, l, r in zip(scores, levels, rel):
        ks, n = [k for k in range(len(s)) if l[k] > 0], len(s)
        g, total, value = [0.] * n, sum(r[k] for k in ks), 1.
        for k in ks:
            rank, hrank, d = 1., r[k], [0.] * n
            for j in range(n):
                if j == k: continue
                h, d[j] = smooth_step(s[j] - s[k], tau)
                rank, hrank = rank + h, hrank + h * min(r[j], r[k])
            value -= hrank / rank / total
            for j in range(n):
                slope = d[j] * (min(r[j], r[k]) / rank - hrank / rank ** 2) / total
                g[j] -= slope
                g[k] += slope
        values.append(value if ks else None)
        slopes.append(g)
    return values, slopes


def pnp(scores, positive, cost, tau=.01):
    """PNP: each positive costs a function of the smoothed number of negatives above it.

    `cost(n)` gives the value and its derivative."""
    values, slopes = [], []
    for s, p in zip(scores, positive):
        ks, n = [k for k in range(len(s)) if p[k]], len(s)
        g, value = [0.] * n, 0.
        for k in ks:
            above, d = 0., [0.] * n
            for j in range(n):
                if p[j]: continue
                h, d[j] = smooth_step(s[j] - s[k], tau)
                above += h
            c, slope = cost(above)
            value += c / len(ks)
            for j in range(n):
                g[j] += slope * d[j] / len(ks)
                g[k] -= slope * d[j] / len(ks)
        values.append(value if ks else None)
        slopes.append(g)
    return values, slopes


def pnp_cost(variant, alpha=4., b=2.):
    "What n negatives above a positive cost, and the derivative, straight from the paper's table."
    return {"O": lambda n: (n, 1.), "Iu": lambda n: ((1 + n) * math.log(1 + n), 1 + math.log(1 + n)),
            "Ib": lambda n: ((b * n - math.log(1 + b * n)) / b ** 2, n / (1 + b * n)),
            "Ds": lambda n: (math.log(1 + n), 1 / (1 + n)),
            "Dq": lambda n: (1 - 1 / (1 + n) ** alpha, alpha / (1 + n) ** (alpha + 1))}[variant]


def hinge_means(scores, positive, skip, margin=1.):
    "For each query the means of the squared hinge over its positives and over positives, or all items; or None."
    found = []
    for q, (s, p) in enumerate(zip(scores, positive)):
        items = [k for k in range(len(s)) if not skip(q, k)]
        ks, means = [k for k in items if p[k]], []
        for inside in ([k for k in items if p[k]], items):
            value, g = 0., [0.] * len(s)
            for i in ks:
                for j in inside:
                    h = max(0., margin - s[i] + s[j])
                    value += h * h
                    g[j] += 2 * h
                    g[i] -= 2 * h
            n = max(len(ks) * len(items), 1)
            means.append((value / n, [x / n for x in g]))
        found.append(means if ks else None)
    return found


def moving_ap(scores, positive, skip, margin=1., gamma=1., old=None):
    "One minus the ratio of the two means, each moved by `gamma` from the query's `old` pair."
    values, slopes = [], []
    for q, means in enumerate(hinge_means(scores, positive, skip, margin)):
        if means is None:
            values.append(None)
            slopes.append([0.] * len(scores[q]))
            continue
        (pos, dpos), (every, devery) = means
        if old is not None: pos, every = ((1 - gamma) * o + gamma * x for o, x in zip(old[q], (pos, every)))
        values.append(1 - pos / every)
        slopes.append([gamma * (pos * b / every ** 2 - a / every) for a, b in zip(dpos, devery)])
    return values, slopes


def supcon(scores, positive, skip, queries, refs, temperature):
    "Mean of -log of a softmax over some references, over the positives of each of some queries; value, slopes, count."
    total, g, n = 0., np.zeros((len(scores), len(scores[0]))), 0
    for q in queries:
        items = [k for k in refs if not skip(q, k)]
        ks = [k for k in items if positive[q][k]]
        if not ks: continue
        top = max(scores[q][k] for k in items)
        e = {k: math.exp((scores[q][k] - top) / temperature) for k in items}
        bottom, n = sum(e.values()), n + 1
        for k in items: g[q, k] += e[k] / bottom / temperature
        for k in ks:
            total += (math.log(bottom) - (scores[q][k] - top) / temperature) / len(ks)
            g[q, k] -= 1 / len(ks) / temperature
    return total / max(n, 1), g / max(n, 1), n


def hmlc_levels(scores, query_labels, ref_labels, skip, temperature=.07, one_per_class=True):
    "The supervised contrastive loss of each level, finest first: (value, slopes), None where no query has a positive."
    def first(labels, l):
        own = [x[l] for x in labels]
        return [i for i, c in enumerate(own) if c == -1 or c not in own[:i]]
    found = []
    for l in range(len(query_labels[0])):
        sides = [first(y, l - 1) if l and one_per_class else range(len(y)) for y in (query_labels, ref_labels)]
        positive = [[a[l] == b[l] != -1 for b in ref_labels] for a in query_labels]
        value, g, n = supcon(scores, positive, skip, *sides, temperature)
        found.append((value, g) if n else None)
    return found


def hmlc(levels, like, constraint=True):
    "Weighted sum over levels; a level counts at least as much as the finer ones. `like`: the scores."
    largest = total, slopes = 0., np.zeros((len(like), len(like[0])))
    for l, found in enumerate(levels, 1):
        if found is None: continue
        if not constraint or found[0] > largest[0]: largest = found
        total, slopes = total + 2 ** (1 / l) * largest[0], slopes + 2 ** (1 / l) * largest[1]
    return total / len(levels), slopes / len(levels)


def mean(values, slopes):
    "Mean over the queries that count, with its slopes; 0 when none counts."
    n = sum(v is not None for v in values)
    if n == 0: return 0., np.zeros((len(slopes), len(slopes[0]) if slopes else 0))
    return sum(v for v in values if v is not None) / n, np.array(slopes) / n


def calibration(scores, positive, skip, valid, pos_margin=.9, neg_margin=.6, average="nonzero"):
    "mean [pos_margin - s]_+ over positive pairs plus mean [s - neg_margin]_+ over negative ones."
    total, g = 0., np.zeros((len(scores), len(scores[0])))
    for want in (True, False):
        terms = []
        for q, s in enumerate(scores):
            for k in range(len(s)):
                if skip(q, k) or not valid[q] or bool(positive[q][k]) != want: continue
                terms.append((max(0., pos_margin - s[k] if want else s[k] - neg_margin), q, k))
        if average == "nonzero": terms = [t for t in terms if t[0] > 0]
        for t, q, k in terms:
            total += t / len(terms)
            if t > 0: g[q, k] += (-1 if want else 1) / len(terms)
    return total, g


def pair(scores, positive, skip, valid, margin=.5):
    "XBM's pair loss: sum over positives of (1 - s) plus sum of the negatives' s above the margin, mean over queries."
    total, g, n = 0., np.zeros((len(scores), len(scores[0]))), max(1, sum(valid))
    for q, s in enumerate(scores):
        for k in range(len(s)):
            if skip(q, k) or not valid[q]: continue
            if positive[q][k]: total, g[q, k] = total + (1 - s[k]) / n, -1 / n
            elif s[k] > margin: total, g[q, k] = total + s[k] / n, 1 / n
    return total, g


def to_embeddings(gscores, q, r=None, cosine=False):
    "Chain the slopes of the scores to the embeddings: s = q r^T, with q and r normalised first when `cosine`."
    def unit(a): return a / np.sqrt((a ** 2).sum(1, keepdims=True)) if cosine else a
    def back(g, a, u):
        if not cosine: return g
        return (g - (g * u).sum(1, keepdims=True) * u) / np.sqrt((a ** 2).sum(1, keepdims=True))
    g, uq, ur = np.asarray(gscores), unit(q), unit(q if r is None else r)
    gq, gr = back(g @ ur, q, uq), back(g.T @ uq, q if r is None else r, ur)
    return (gq + gr, None) if r is None else (gq, gr)


def dots(q, r, cosine=False):
    "All similarities, each as one sum."
    def unit(a): return a / np.sqrt((a ** 2).sum(1, keepdims=True)) if cosine else a
    q, r = unit(q), unit(r)
    return [[float(sum(x * y for x, y in zip(a, b))) for b in r] for a in q]
