from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from nidl_dcl.models import metrics
from nidl_dcl.models.metrics import alignment, effective_rank, knn_accuracy, uniformity


def test_alignment_is_zero_for_the_same_and_four_for_opposite_views() -> None:
    h = torch.randn(6, 3)
    assert alignment(h, 2 * h) == pytest.approx(0, abs=1e-12)
    assert alignment(h, -h) == pytest.approx(4, rel=1e-6)


def test_uniformity_is_zero_at_collapse_and_falls_as_rows_move_apart() -> None:
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(apart) == pytest.approx(-8, rel=1e-5)
    assert uniformity(torch.ones(1, 3)) == 0


def test_effective_rank_counts_directions() -> None:
    orthogonal = torch.cat([torch.eye(4), -torch.eye(4)])
    assert effective_rank(orthogonal) == pytest.approx(4, rel=1e-6)
    line = torch.arange(5.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    assert effective_rank(line) == pytest.approx(1, rel=1e-6)
    assert effective_rank(torch.full((7, 3), 0.1)) == 0


@pytest.mark.parametrize("shape", [(50, 20), (20, 50)])
@pytest.mark.parametrize("decay", [0.0, 0.3, 3.0])
def test_effective_rank_is_that_of_the_singular_values(
    shape: tuple[int, int], decay: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(shape, generator=draw) * torch.exp(-decay * torch.arange(shape[1]))
    centered = h.double() - h.double().mean(0)
    shares = torch.linalg.svdvals(centered)
    shares = shares[shares > 0] / shares.sum()
    assert effective_rank(h) == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)


def test_nearest_neighbors_vote_as_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 40)
    h = rng.normal(size=(40, 5)) + y[:, None] * [1, 0, 0, 1, 0]
    for k in (1, 3, 5):
        model = KNeighborsClassifier(k, metric="cosine")
        expected = cross_val_score(model, h, y, cv=LeaveOneOut()).mean()
        assert knn_accuracy(h, y, k=k) == pytest.approx(expected)
    assert knn_accuracy(h, [f"site{i}" for i in y]) == knn_accuracy(torch.from_numpy(h), y)


@pytest.mark.parametrize(
    ("k", "y", "match"),
    [
        (0, range(4), "from 1 to 3"),
        (4, range(4), "from 1 to 3"),
        (1, range(3), "4 embeddings"),
        (1, np.ones((4, 1)), "4 embeddings"),
    ],
)
def test_neighbors_that_cannot_be_counted_are_refused(k: int, y: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        knn_accuracy(np.eye(4), y, k=k)


def test_measures_take_arrays_and_half_precision() -> None:
    a, b = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).unbind()
    assert alignment(a.numpy(), b.numpy()) == alignment(a, b)
    assert uniformity(a.numpy()) == uniformity(a)
    assert effective_rank(a.numpy()) == effective_rank(a)
    assert effective_rank(a.bfloat16()) == pytest.approx(effective_rank(a), rel=0.01)


@pytest.mark.parametrize("name", ["alignment", "uniformity", "effective_rank", "knn_accuracy"])
def test_what_is_no_matrix_is_refused(name: str) -> None:
    given = {"alignment": 2, "knn_accuracy": 2}.get(name, 1)
    with pytest.raises(ValueError, match="matrix"):
        getattr(metrics, name)(*[torch.ones(3, 2, 4)] * given)
    with pytest.raises(ValueError, match="one shape"):
        alignment(torch.ones(3, 2), torch.ones(1, 2))
