"""The losses: exact cases, a slow reference, invariances and edges."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from nidl_dcl import DCLLoss, DCLWLoss
from nidl_dcl.models import losses as loss_module

VECTORS = Path(os.environ.get("NIDL_DCL_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))


def reference(z1, z2, temperature=0.1, sigma=None):
    """The definition as two loops, in double precision."""
    z1, z2 = z1.double(), z2.double()
    z = torch.cat([z1, z2])
    n = len(z1)

    def similarity(i, j):
        lengths = z[i].norm() * z[j].norm()
        return (z[i] @ z[j]) / lengths if lengths > 0 else z[i] @ z[j]

    weight = torch.ones(n, dtype=torch.float64)
    if sigma is not None:
        pairs = torch.stack([similarity(i, i + n) for i in range(n)])
        weight = 2 - n * torch.softmax(pairs / sigma, 0)
    terms = []
    for i in range(2 * n):
        positive = weight[i % n] * similarity(i, (i + n) % (2 * n)) / temperature
        negatives = [similarity(i, j) / temperature for j in range(2 * n) if j % n != i % n]
        terms.append(torch.logsumexp(torch.stack(negatives), 0) - positive)
    return torch.stack(terms).mean()


def pair(n=6, d=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, d, generator=g, dtype=dtype, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("sigma", [None, 0.1, 0.5, 10.0])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
def test_equals_the_slow_reference_with_gradients(temperature, sigma):
    ours = DCLLoss(temperature) if sigma is None else DCLWLoss(sigma, temperature)
    a, b = pair()
    got = ours(a, b)
    want = reference(a, b, temperature, sigma)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for x, y in zip(
        torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (a, b)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_vectors(dtype):
    if not VECTORS.is_dir():
        pytest.skip("the exact cases are not at hand")
    arrays = np.load(VECTORS / "dcl_vectors.npz")
    for case in json.loads((VECTORS / "dcl_vectors.json").read_text()):
        name = case["name"]
        z = [torch.tensor(arrays[f"{name}/z{k}"], dtype=dtype, requires_grad=True) for k in (1, 2)]
        for kind, ours in (
            ("dcl", DCLLoss(case["temperature"])),
            ("dclw", DCLWLoss(case["sigma"], case["temperature"])),
        ):
            value = ours(*z)
            want = case[f"loss_{kind}"]
            close = 1e-10 if dtype is torch.float64 else 3e-5
            assert abs(value.item() - want) <= close * max(1, abs(want)), name
            for k, grad in enumerate(torch.autograd.grad(value, z), 1):
                exact = torch.tensor(arrays[f"{name}/grad_{kind}_z{k}"])
                length = z[k - 1].detach().double().norm(dim=1, keepdim=True)
                error = ((grad.double() - exact) * length).abs().max()
                largest = 1.0 if case["grad_is_zero"] else (exact * length).abs().max()
                tolerance = 1e-10 if dtype is torch.float64 else 3e-4
                assert error <= tolerance * largest, name


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 9),
    d=st.integers(1, 7),
    seed=st.integers(0, 99),
    sigma=st.sampled_from([None, 0.5]),
)
def test_invariances(n, d, seed, sigma):
    ours = DCLLoss(0.2) if sigma is None else DCLWLoss(sigma, 0.2)
    with torch.no_grad():
        a, b = pair(n, d, seed)
        value = ours(a, b)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        scale = torch.rand(n, 1, dtype=a.dtype) + 0.1
        turn = torch.linalg.qr(torch.randn(d, d, dtype=a.dtype))[0]
        for same in (
            ours(b, a),
            ours(a[order], b[order]),
            ours(a * scale, b),
            ours(a @ turn, b @ turn),
        ):
            torch.testing.assert_close(same, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_full_collapse_is_log_of_the_negatives_minus_the_positive(n):
    z = torch.ones(n, 4, dtype=torch.float64)
    value = DCLLoss(1.0)(z, z)
    assert value.item() == pytest.approx(math.log(2 * n - 2), abs=1e-12)
    assert DCLLoss(0.1)(z, z).item() == pytest.approx(math.log(2 * n - 2), abs=1e-10)


def test_infonce_is_softplus_of_each_anchors_term():
    a, b = pair()
    anchors = [DCLLoss(0.3)(a, b, rows=slice(i, i + 1)) for i in range(6)]
    u = torch.nn.functional.normalize(torch.cat([a, b]))
    s = (u @ u.T / 0.3).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    infonce = torch.logsumexp(s, 1) - s[torch.arange(12), (torch.arange(12) + 6) % 12]
    both = [reference_anchor(s, i) for i in range(12)]
    torch.testing.assert_close(softplus(torch.stack(both)), infonce)
    halves = torch.stack(both)
    torch.testing.assert_close(torch.stack(anchors), (halves[:6] + halves[6:]) / 2)


def reference_anchor(s, i):
    keep = [j for j in range(12) if j % 6 != i % 6]
    return torch.logsumexp(s[i, keep], 0) - s[i, (i + 6) % 12]


def test_blocks_give_the_same_as_one_piece(monkeypatch):
    a, b = pair(20, 8)
    whole = DCLLoss()(a, b)
    grads = torch.autograd.grad(whole, (a, b))
    monkeypatch.setattr(loss_module, "_BLOCK_VALUES", 3 * 40)
    pieces = DCLLoss()(a, b)
    torch.testing.assert_close(pieces, whole)
    for x, y in zip(torch.autograd.grad(pieces, (a, b)), grads, strict=True):
        torch.testing.assert_close(x, y)


def test_rows_of_all_processes_add_up_to_the_whole():
    a, b = pair(7, 4)
    whole = DCLLoss()(a, b)
    parts = [DCLLoss()(a, b, rows=s) * k / 7 for s, k in ((slice(0, 3), 3), (slice(3, 7), 4))]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("loss", [DCLLoss(), DCLWLoss()])
def test_one_sample_drops_the_log_term_and_says_so(loss):
    a, b = pair(1, 5)
    with pytest.warns(UserWarning, match="no negatives"):
        value = loss(a, b)
    cosine = torch.nn.functional.cosine_similarity(a, b)
    assert value.item() == pytest.approx(-cosine.item() / 0.1)


def test_zero_rows_have_similarity_and_gradient_zero():
    a, b = (x.detach().clone() for x in pair())
    a[2] = 0
    a.requires_grad_()
    value = DCLLoss()(a, b)
    torch.testing.assert_close(value, reference(a, b))
    grad = torch.autograd.grad(value, a)[0]
    assert torch.equal(grad[2], torch.zeros(5, dtype=torch.float64))
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_lengths_do_not_matter_in_single_precision(scale):
    a, b = (x.detach().float() for x in pair())
    torch.testing.assert_close(DCLLoss()(a * scale, b), DCLLoss()(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    a, b = (x.detach().to(dtype) for x in pair())
    value = DCLLoss(0.01)(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, DCLLoss(0.01)(a.float(), b.float()))


def test_autocast_does_not_lower_the_precision():
    a, b = (x.detach().float() for x in pair(300, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = DCLLoss()(a, b)
    torch.testing.assert_close(inside, DCLLoss()(a, b))


def test_nan_stays_visible():
    a, b = (x.detach() for x in pair())
    a[0, 0] = torch.nan
    assert torch.isnan(DCLLoss()(a, b))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DCLLoss(0),
        lambda: DCLLoss(-1),
        lambda: DCLLoss(math.nan),
        lambda: DCLLoss(math.inf),
        lambda: DCLWLoss(sigma=0),
        lambda: DCLWLoss(temperature=0),
        lambda: DCLLoss(pos_weight_fn="no"),
    ],
)
def test_wrong_arguments_are_value_errors(make):
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize(
    "shapes",
    [
        *(((3, 4), (2, 4)), ((3, 4), (3, 5)), ((0, 4), (0, 4)), ((4,), (4,))),
        *(((3, 2, 4), (3, 4, 4)), ((0, 2, 4), (0, 2, 4)), ((3, 0, 4), (3, 0, 4))),
        *(((3, 2, 4), (3, 4)), ((3, 2, 2, 4), (3, 2, 2, 4))),
    ],
)
def test_unequal_or_empty_views_are_value_errors(shapes):
    with pytest.raises(ValueError, match="one shape"):
        DCLLoss()(*(torch.ones(s) for s in shapes))


def test_argument_order_of_the_weighted_loss():
    assert DCLWLoss(0.7, 0.2).sigma == 0.7
    assert DCLWLoss(0.7, 0.2).temperature == 0.2


def test_alike_views_cost_no_more_than_others():
    a, b = (x.detach() for x in pair())
    assert DCLLoss()(a, a) <= DCLLoss()(a, b)


def test_losses_pickle():
    a, b = (x.detach() for x in pair())
    for ours in (DCLLoss(), DCLWLoss()):
        assert pickle.loads(pickle.dumps(ours))(a, b) == ours(a, b)


def test_own_weighting_function():
    a, b = (x.detach() for x in pair())
    with warnings.catch_warnings():
        doubled = DCLLoss(pos_weight_fn=lambda z1, z2: torch.full((len(z1),), 2.0))(a, b)
    cosine = torch.nn.functional.cosine_similarity(a, b).mean() / 0.1
    torch.testing.assert_close(doubled, DCLLoss()(a, b) - cosine)


@pytest.mark.parametrize("block_values", [2**21, 2 * 14**2, 3 * 14])
@pytest.mark.parametrize("rows", [None, slice(1, 3)])
@pytest.mark.parametrize("sigma", [None, 0.5])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_the_loss_of_regions_is_the_mean_of_that_of_each(
    temperature, sigma, rows, block_values, monkeypatch
):
    ours = DCLLoss(temperature) if sigma is None else DCLWLoss(sigma, temperature)
    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(7, 5, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in "ab"
    )
    each = torch.stack([ours(a[:, k], b[:, k], rows=rows) for k in range(5)]).mean()
    wanted = torch.autograd.grad(each, (a, b))
    monkeypatch.setattr(loss_module, "_BLOCK_VALUES", block_values)
    together = ours(a, b, rows=rows)
    torch.testing.assert_close(together, each, rtol=1e-12, atol=1e-12)
    for x, y in zip(torch.autograd.grad(together, (a, b)), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_one_region_is_as_none_in_single_precision():
    a, b = (x.detach().float() for x in pair(300, 8))
    torch.testing.assert_close(DCLLoss()(a[:, None], b[:, None]), DCLLoss()(a, b))


def test_a_weighting_function_gets_one_region_at_a_time():
    seen = []

    def weigh(z1, z2):
        seen.append((z1, z2))
        return torch.full((len(z1),), float(len(seen)))

    a, b = torch.randn(2, 6, 3, 4).unbind()
    DCLLoss(pos_weight_fn=weigh)(a, b)
    assert len(seen) == 3
    for k, (z1, z2) in enumerate(seen):
        torch.testing.assert_close(z1, a[:, k], check_dtype=False)
        torch.testing.assert_close(z2, b[:, k], check_dtype=False)


def test_one_sample_of_several_regions_drops_the_log_term():
    a, b = torch.randn(2, 1, 3, 4).unbind()
    with pytest.warns(UserWarning, match="no negatives"):
        value = DCLLoss()(a, b)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=2).mean()
    assert value.item() == pytest.approx(-cosine.item() / 0.1, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted in other units there")
def test_memory_grows_with_the_batch_and_not_with_its_square() -> None:
    script = (
        "import resource, torch\n"
        "from nidl_dcl import DCLLoss\n"
        "def rise(*shape):\n"
        "    z1, z2 = (torch.randn(shape, requires_grad=True) for _ in range(2))\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    DCLLoss()(z1, z2).backward()\n"
        "    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024\n"
        "rise(300, 128)  # what libraries take at their first call\n"
        "print(rise(8192, 128))\n"
        "print(rise(1024, 64, 16))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    alone, regional = map(float, done.stdout.split())
    assert alone < 150  # MB; one matrix of similarities would take 1024
    assert regional < 150  # the matrices of all regions would take 1024


@pytest.mark.parametrize("regions", [None, 3])
@pytest.mark.parametrize(
    "weigh",
    [
        lambda a, b: (a * b).sum(1, keepdim=True),
        lambda a, b: a @ b.T,
        lambda a, b: torch.ones(2 * len(a)),
        lambda a, b: torch.ones(1),
        lambda a, b: torch.ones(()),
        lambda a, b: 2.0,
        lambda a, b: np.ones(len(a)),
        lambda a, b: None,
    ],
)
def test_weights_of_another_shape_are_refused_with_what_came(weigh, regions):
    shape = (6, 4) if regions is None else (6, regions, 4)
    a, b = torch.randn(2, *shape).unbind()
    with pytest.raises(ValueError, match=r"tensor of shape \(6,\), got"):
        DCLLoss(pos_weight_fn=weigh)(a, b)


def dense(a, b, temperature, sigma=None):
    """The definition as matrices, from which any derivative follows."""
    u1, u2 = (torch.nn.functional.normalize(z) for z in (a, b))
    n, u = len(a), torch.cat([u1, u2])
    s = u @ u.T / temperature
    own = torch.eye(n, dtype=torch.bool).tile(2, 2)
    positive = (u1 * u2).sum(1)
    weight = 1 if sigma is None else 2 - n * torch.softmax(positive / sigma, 0)
    negatives = torch.logsumexp(s.masked_fill(own, -torch.inf), 1)
    return negatives.mean() - (weight * positive / temperature).mean()


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("value", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("n", [6, 300])
def test_a_learned_temperature_gets_its_gradient(n, value, shape):
    a, b = pair(n, 5)
    ours, known = (
        torch.nn.Parameter(torch.full(shape, value, dtype=torch.float64)) for _ in range(2)
    )
    got = torch.autograd.grad(DCLLoss(ours)(a, b), (a, b, ours))
    want = torch.autograd.grad(dense(a, b, known.reshape(())), (a, b, known))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_a_learned_temperature_in_blocks_by_rows_and_regions(monkeypatch):
    temperature = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    a, b = torch.randn(2, 7, 3, 4, dtype=torch.float64).unbind()
    loss = DCLLoss(temperature)
    each = sum(loss(a[:, k], b[:, k], rows=slice(2, 5)) for k in range(3)) / 3
    want = torch.autograd.grad(each, temperature)
    monkeypatch.setattr(loss_module, "_BLOCK_VALUES", 3 * 14)
    got = torch.autograd.grad(loss(a, b, rows=slice(2, 5)), temperature)
    torch.testing.assert_close(got, want)


def test_a_learned_temperature_and_sigma_of_the_weighted_loss():
    a, b = pair()
    t, s = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.2, 0.7))
    got = torch.autograd.grad(DCLWLoss(s, t)(a, b), (a, t, s))
    want = torch.autograd.grad(dense(a, b, t, s), (a, t, s))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_a_temperature_in_single_precision_keeps_its_type():
    temperature = torch.nn.Parameter(torch.tensor(0.1))
    DCLLoss(temperature)(*torch.randn(2, 6, 4).unbind()).backward()
    assert temperature.grad.dtype == torch.float32


def test_a_temperature_that_is_several_numbers_is_refused():
    with pytest.raises(ValueError, match="temperature must be"):
        DCLLoss(torch.full((3,), 0.1))


@pytest.mark.parametrize("rows", [None, slice(1, 3)])
@pytest.mark.parametrize("sigma", [None, 0.5])
@pytest.mark.parametrize("learned", [False, True])
def test_second_derivatives_are_right(learned, sigma, rows):
    a, b = pair(4, 3)
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(a, b, t):
        t = t if learned else 0.5
        made = DCLLoss(t) if sigma is None else DCLWLoss(sigma, t)
        return made(a, b, rows=rows)

    assert torch.autograd.gradcheck(loss, (a, b, t))
    assert torch.autograd.gradgradcheck(loss, (a, b, t))


def test_a_gradient_penalty_is_differentiated_and_zero_rows_stay_finite():
    a, b = pair()
    with torch.no_grad():
        a[2] = 0

    def penalty(loss):
        (grad,) = torch.autograd.grad(loss, b, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (a, b))

    got, want = penalty(DCLLoss(0.3)(a, b)), penalty(dense(a, b, 0.3))
    assert all(torch.isfinite(x).all() for x in got)
    torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=1e-10)


def test_a_gpu_gets_larger_blocks_and_the_meta_device_shows_it():
    sizes = []
    for device in ("cpu", "meta"):
        u = torch.empty(8192, 2, device=device)
        first = next(loss_module._similarities(u, torch.arange(8192, device=device), 0.1))
        sizes.append(first[3].shape[0])
    assert sizes == [256, 4096]
