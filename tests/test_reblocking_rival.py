"""Re-blocking against complete-linkage clustering, by which the paper's public code groups rows."""

import numpy as np
import pytest

from dsb_jax.layout import count_groups, num_active, ragged_blocks, validate
from dsb_jax.reblocking import cut_columns, reblock

cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is in the extra train")

# Planted growth of few directions hits few rows, which then hold positions of all groups.
RANKS = [1, 2, 6, None]


def grown_score(seed, sizes, rank):
    """What re-blocking sees after an adaptation, and the row groups before it.

    Weights in shuffled blocks, of which the smallest 30 % are dropped; as many positions grow, where a gradient of low
    rank is the largest or (rank None) anywhere, and count as much as the mean of the others.
    """
    rng = np.random.default_rng(seed)
    shape, (rows, cols), num_blocks = sizes["shape"], sizes["block_shape"], sizes["num_blocks"]
    groups, ragged = count_groups(shape[0], rows), ragged_blocks(shape, sizes["block_shape"], num_blocks)
    out_idx = np.append(rng.permutation(shape[0]), np.arange(shape[0], groups * rows)).reshape(groups, rows)
    full = groups if ragged is None else groups - 1
    counts = np.full(groups, ragged or 0)
    counts[:full] = (num_blocks - (ragged or 0) + np.arange(full)) // full
    active = np.zeros((groups * rows, shape[1]), bool)
    for members, count in zip(out_idx, counts, strict=True):
        active[np.ix_(members, rng.permutation(shape[1])[: count * cols])] = True
    active = active[: shape[0]]
    score = np.abs(rng.standard_normal(shape)).astype(np.float32) * active
    drops = int(0.3 * active.sum())
    score[score < np.partition(score[active], drops)[drops]] = 0
    if rank is None:
        gradient = rng.random(shape)
    else:
        gradient = np.abs(rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1])))
        gradient += 0.2 * np.abs(rng.standard_normal(shape))
    gradient[active] = 0
    score[gradient >= np.partition(gradient.ravel(), -drops)[-drops]] = score[score > 0].mean()
    return score, out_idx


def complete_linkage(score, sizes):
    """Row groups of clusters by the cosine of patterns, the largest first, cut into runs of R rows."""
    out, rows = score.shape[0], sizes["block_shape"][0]
    pattern = score >= np.partition(score.ravel(), -num_active(**sizes))[-num_active(**sizes)]
    unit = pattern / np.maximum(np.linalg.norm(pattern, axis=1, keepdims=True), 1)
    linkage = cluster.AgglomerativeClustering(out // rows, metric="precomputed", linkage="complete")
    labels = linkage.fit(1 - unit @ unit.T).labels_
    order = np.lexsort((labels, -np.bincount(labels)[labels]))
    return np.append(order, np.arange(out, count_groups(out, rows) * rows)).reshape(-1, rows)


def retained_by(score, out_idx, sizes):
    """The share of the score that the best blocks of these row groups hold."""
    padded = np.concatenate([score, np.zeros((out_idx.size - score.shape[0], score.shape[1]), np.float32)])
    columns = padded[out_idx].sum(axis=1)
    layout = cut_columns(columns, out_idx.astype(np.int32), **sizes)
    group = np.repeat(np.arange(len(out_idx)), np.diff(layout.group_start))
    return columns[group[:, None], np.asarray(layout.in_idx)].sum() / score.sum()


@pytest.mark.parametrize(
    "sizes",
    [
        {"shape": (128, 1152), "block_shape": (8, 8), "num_blocks": 231},
        {"shape": (128, 128), "block_shape": (4, 4), "num_blocks": 103},
        {"shape": (100, 450), "block_shape": (8, 8), "num_blocks": 70},
    ],
    ids=["8x8", "4x4", "ragged"],
)
def test_retains_at_least_what_complete_linkage_and_the_groups_before_retain(sizes):
    shares = []
    for rank in RANKS:
        for seed in range(2):
            score, before = grown_score(seed, sizes, rank)
            layout = reblock(score, block_shape=sizes["block_shape"], num_blocks=sizes["num_blocks"])
            validate(layout)
            groupings = np.asarray(layout.out_idx), complete_linkage(score, sizes), before
            shares.append([retained_by(score, grouping, sizes) for grouping in groupings])
    ours, rival, before = np.transpose(shares)
    assert (ours >= rival - 5e-4).all()
    assert (ours >= before - 0.01).all()
    assert (ours - before).mean() >= -5e-4
