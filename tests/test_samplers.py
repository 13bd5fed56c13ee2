"""Samplers: the same epoch whatever came before, tiny classes, clear errors."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from hapnb.helpers import SAMPLERS
from hapnb.samplers import (BalancedSampler, HierarchicalSampler, MPerClassSampler, RandomBatchSampler,
                            WholeClassSampler, class_rows, epoch_summary, make_sampler)


def unequal(classes=24, supers=4, seed=0):
    fine = np.repeat(np.arange(classes), np.random.default_rng(seed).integers(1, 10, classes))
    return np.stack([fine, fine * supers // classes], 1)


ARGS = {"random": {}, "m_per_class": {"m": 4}, "balanced": {"m": 4}, "hierarchical": {"m": 4, "batches_per_pair": 2},
        "whole_classes": {}}
NAMES = sorted(ARGS)


def test_all_are_registered():
    assert set(NAMES) <= set(SAMPLERS.names())


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_does_not_depend_on_what_came_before(name):
    labels = unequal()
    walked, jumped = (make_sampler(name, labels, 16, seed=5, **ARGS[name]) for _ in range(2))
    for e in range(4):
        walked.set_epoch(e)
        last = list(walked)
    jumped.set_epoch(3)
    assert list(jumped) == last == list(jumped)
    assert len(jumped) == len(last)
    assert [jumped.batch(b).tolist() for b in range(2, len(last))] == last[2:]  # an epoch can go on anywhere
    jumped.set_epoch(2)
    assert list(jumped) != last


@pytest.mark.parametrize("name", NAMES)
def test_the_global_random_state_is_neither_read_nor_changed(name):
    labels = unequal()
    np.random.seed(0), torch.manual_seed(0)
    a = list(make_sampler(name, labels, 16, **ARGS[name]))
    numpy_next, torch_next = np.random.rand(), torch.rand(1)
    np.random.seed(0), torch.manual_seed(0)
    assert np.random.rand() == numpy_next and torch.rand(1) == torch_next
    assert list(make_sampler(name, labels, 16, **ARGS[name])) == a


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_epochs_are_not_mixed_up(name):
    labels = unequal()
    def epoch(seed, e):
        s = make_sampler(name, labels, 16, seed=seed, **ARGS[name])
        s.set_epoch(e)
        return str(list(s))
    seen = [epoch(s, e) for s in range(3) for e in range(3)]
    assert len(set(seen)) == 9


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=4, max_size=30), m=st.integers(1, 4), need=st.integers(1, 4),
       seed=st.integers(0, 99))
def test_m_per_class_uses_each_image_at_most_once(sizes, m, need, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    big = sum(s >= m for s in sizes)
    if big < need:
        with pytest.raises(ValueError, match=f"there are {big} "): MPerClassSampler(labels, m * need, m=m)
        return
    batches = list(MPerClassSampler(labels, m * need, seed=seed, m=m))
    drawn = np.concatenate(batches)
    assert len(set(drawn)) == len(drawn)
    for b in batches: assert sorted(np.bincount(labels[b])[np.unique(labels[b])]) == [m] * need
    left = np.array(sizes) // m - np.bincount(labels[drawn], minlength=len(sizes)) // m
    assert (left > 0).sum() < need  # it stopped because no batch could be filled, not before


def test_m_per_class_walks_from_the_first_class_each_time():
    # 3 classes of 6 images, m=2, 2 classes per batch: the walk exhausts the first two classes, the third is alone
    s = MPerClassSampler(np.repeat([0, 1, 2], 6), 4, m=2)
    for e in range(5):
        s.set_epoch(e)
        assert len(list(s)) == 3 and len({tuple(sorted({int(i) // 6 for i in b})) for b in s}) == 1


def test_m_per_class_at_a_coarser_level():
    labels = unequal()
    for b in MPerClassSampler(labels, 16, m=4, level=1): assert set(np.bincount(labels[b, 1])) <= {0, 4}
    with pytest.raises(ValueError, match="level 2 does not exist"): MPerClassSampler(labels, 16, level=2)


def test_unknown_labels_are_left_out():
    labels = unequal()
    labels[labels[:, 0] == 3] = -1
    gone = set(np.flatnonzero(labels[:, 0] < 0))
    for name in ("m_per_class", "balanced", "hierarchical"):
        assert not gone & {i for b in make_sampler(name, labels, 16, **ARGS[name]) for i in b}
    classes, rows = class_rows(labels[:, 0])
    assert -1 not in classes and sum(map(len, rows)) == len(labels) - len(gone)


def test_balanced_draws_small_classes_with_replacement_and_large_ones_without():
    labels = np.repeat([0, 1, 2], [1, 3, 40])
    for e in range(10):
        s = BalancedSampler(labels, 12, m=4)
        s.set_epoch(e)
        for b in s:
            assert np.bincount(labels[b]).tolist() == [4, 4, 4]
            large = [i for i in b if labels[i] == 2]
            assert len(set(large)) == 4
    assert len(BalancedSampler(labels, 12, m=4)) == 44 // 12
    assert len(BalancedSampler(labels, 12, m=4, batches=7)) == 7


def test_balanced_draws_all_classes_equally_often():
    labels = np.repeat(np.arange(10), [1] * 5 + [50] * 5)
    s = BalancedSampler(labels, 4, m=2, batches=4000)
    share = np.bincount(labels[np.concatenate(list(s))], minlength=10) / 16000
    assert abs(share - 0.1).max() < 0.01


def test_hierarchical_visits_every_pair_and_halves_the_batch():
    labels = unequal(classes=40, supers=5)
    s = HierarchicalSampler(labels, 16, m=2, batches_per_pair=3)
    assert len(s) == 10 * 3
    pairs = {}
    for b in s:
        supers, counts = np.unique(labels[b, 1], return_counts=True)
        assert counts.tolist() == [8, 8]
        pairs[tuple(supers)] = pairs.get(tuple(supers), 0) + 1
    assert len(pairs) == 10 and set(pairs.values()) == {3}


@pytest.mark.parametrize("small, sizes", [("short", {20, 32}), ("repeat", {32}), ("skip", {32})])
def test_hierarchical_with_a_small_super_class(small, sizes):
    fine = np.repeat(np.arange(9), 4)
    labels = np.stack([fine, np.minimum(fine // 4, 2)], 1)  # super-classes of 4, 4 and 1 classes
    got = {len(b) for b in HierarchicalSampler(labels, 32, m=4, batches_per_pair=2, small=small)}
    assert got == sizes


def test_random_uses_everything_once():
    s = RandomBatchSampler(range(10), 3, drop_last=False)
    assert sorted(sum(list(s), [])) == list(range(10)) and len(s) == 4
    assert len(list(RandomBatchSampler(range(10), 3))) == len(RandomBatchSampler(range(10), 3)) == 3


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30), parts=st.integers(1, 6), unknown=st.integers(0, 3))
def test_whole_classes_divide_a_class_only_at_a_cut(sizes, parts, unknown):
    labels = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(unknown, -1)])
    known, size = sum(sizes), max(1, sum(sizes) // parts)
    batches = list(WholeClassSampler(labels, size))
    assert len(batches) == known // size and all(len(b) == size for b in batches)
    rows = sum(batches, [])
    assert len(set(rows)) == len(rows) and (labels[rows] >= 0).all()
    changes = np.count_nonzero(np.diff(labels[rows]))
    assert changes == len(set(labels[rows].tolist())) - 1
    if parts == 1: assert sorted(rows) == list(range(known))
    assert list(WholeClassSampler(labels, size, batches=1)) == batches[:1]


@pytest.mark.parametrize("make, words", [
    (lambda: make_sampler("m_per_clas", [0, 1], 2), "Did you mean 'm_per_class'"),
    (lambda: make_sampler("balanced", [0, 1], 2, batchs=1), "Did you mean 'batches'"),
    (lambda: MPerClassSampler(np.repeat(range(9), 4), 30, m=4), "not a multiple of m=4. Nearest that are: .28, 32."),
    (lambda: MPerClassSampler(np.repeat(range(9), 4), 64, m=4),
     "needs 16 classes of at least 4 images; there are 9 .*batch_size <= 36"),
    (lambda: MPerClassSampler(np.repeat(range(9), 3), 24, m=4), "there are 0 .*m=3"),
    (lambda: MPerClassSampler([0, 1], 4, m=0), "m must be a whole number"),
    (lambda: BalancedSampler([0, 0, 1, 1], 12, m=4), "needs 3 classes, but there are 2"),
    (lambda: HierarchicalSampler([0, 0, 1, 1], 4, m=2), "at least two levels"),
    (lambda: HierarchicalSampler([[0, 0], [1, 0]], 4, m=2), "two super-classes, found 1"),
    (lambda: HierarchicalSampler(unequal(), 20, m=4), "multiple of 2 x m = 8"),
    (lambda: HierarchicalSampler(unequal(), 16, small="shrt"), "Did you mean 'short'"),
    (lambda: RandomBatchSampler(range(3), 4), "3 images do not fill one batch of 4"),
    (lambda: WholeClassSampler([0, 0, -1], 3),
     "2 images with a known class do not fill 1 batch.es. of 3; use batch_size <= 2"),
    (lambda: WholeClassSampler([0, 0, 1, 1], 2, batches=3), "do not fill 3 batch.es. of 2; use batch_size <= 1"),
    (lambda: RandomBatchSampler(range(8), 4, seed=-1), "seed must be a whole number, 0 or more"),
    (lambda: RandomBatchSampler([[0, 0], [0, 1]], 2), "not a tree"),
])
def test_errors_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_large_sets_are_quick():
    """The size of Stanford Online Products: an epoch of each sampler takes about a second, not minutes."""
    import time
    fine = np.repeat(np.arange(11318), np.random.default_rng(0).integers(2, 9, 11318))
    labels = np.stack([fine, fine // 944], 1)
    start = time.process_time()
    for name, args in (("m_per_class", {}), ("hierarchical", {}), ("balanced", {}), ("random", {}),
                       ("whole_classes", {})):
        assert epoch_summary(make_sampler(name, labels, 256, **args))["batches"] > 100
    assert time.process_time() - start < 20
