r"""The decoupled contrastive losses DCL and DCLW, exact, with memory linear in the batch.

For anchor :math:`i` among the 2N views of N samples, with cosine similarity :math:`s`, positive
similarity :math:`s_i^+` and temperature :math:`\tau`,

.. math:: L_i = -w_i\, s_i^+ / \tau + \log \sum_j \exp(s_{ij} / \tau),

where :math:`j` runs over both views of the other N-1 samples (Yeh et al., ECCV 2022, eq. 6 and 7).
With several regions, it is the mean over regions of the loss in each (Chaitanya et al., NeurIPS 2020).
Gathering from several processes is left to the caller, who passes global views and its own rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK_VALUES = 2**21
"""Similarities held at a time on a CPU: 8 MB in single precision, about the size of its caches."""

_BLOCK_VALUES_OF_ACCELERATOR = 2**25
"""The same on a GPU: 128 MB, enough work for each of its calls.

A constant and not a share of the free memory, so that no rounding differs from one run to the next.
"""

_ONE_SCALE = 40.0
"""Range of exponents that share one scale: what underflows is below 1e-20."""

_DOUBLE_ROWS = 256
"""Largest batch that is computed in double precision."""


class DCLLoss(nn.Module):
    """Decoupled contrastive loss: InfoNCE without the positive pair in the denominator.

    Parameters
    ----------
    temperature : float or Tensor, default=0.1
        Divides the cosine similarities; positive. A tensor of one value, such as an
        ``nn.Parameter``, gets its gradient if it requires one.
    pos_weight_fn : callable or None, default=None
        Takes both views, each of shape (n, d), returns the weight of each positive pair, a tensor of
        shape (n,). With regions it is called for each region, with the views of that region.

    Raises
    ------
    ValueError
        If `temperature` is not a positive number or `pos_weight_fn` is not callable.

    Notes
    -----
    Gradients can be differentiated again (``create_graph=True``); that holds the similarities of all
    pairs at once, while the gradient alone holds a block of them.

    References
    ----------
    Yeh, C.-H. et al. Decoupled contrastive learning. ECCV 2022.

    Examples
    --------
    >>> import torch
    >>> from nidl_dcl import DCLLoss
    >>> z = torch.eye(3)
    >>> round(DCLLoss(temperature=1.0)(z, z).item(), 4)  # log 4 - 1
    0.3863
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        pos_weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        _check_positive("temperature", temperature)
        if pos_weight_fn is not None and not callable(pos_weight_fn):
            raise ValueError(f"pos_weight_fn must be callable or None, got {pos_weight_fn!r}.")
        self.temperature = temperature
        self.pos_weight_fn = pos_weight_fn

    def forward(self, z1: Tensor, z2: Tensor, rows: slice | None = None) -> Tensor:
        """Return the mean loss over the anchors.

        Parameters
        ----------
        z1, z2 : Tensor of shape (n, d) or (n, regions, d)
            The two views, row i of one being the positive of row i of the other. A region is
            compared with the same region of the other samples alone. Half precision is computed in
            single precision; zero rows have similarity 0 and gradient 0.
        rows : slice, optional
            Samples whose anchors count (both views of each); all samples by default. Negatives
            always come from the whole batch.

        Returns
        -------
        Tensor
            A scalar, the mean over the 2n anchors and over regions. With one sample there are no
            negatives: the log term is dropped and a warning says so.

        Raises
        ------
        ValueError
            If the views are not of one such shape with at least one row and one region, or
            `pos_weight_fn` returns another shape than (n,).
        """
        if z1.ndim not in (2, 3) or z1.shape != z2.shape or 0 in z1.shape[:-1]:
            raise ValueError(
                "The views must be two tensors of one shape (n, d) or (n, regions, d) with n and "
                f"regions >= 1, got {tuple(z1.shape)} and {tuple(z2.shape)}."
            )
        if z1.ndim == 3:
            z1, z2 = z1.transpose(0, 1), z2.transpose(0, 1)
        with torch.autocast(z1.device.type, enabled=False):
            single = torch.promote_types(torch.promote_types(z1.dtype, z2.dtype), torch.float32)
            # Nearly equal samples at a low temperature cancel to the fourth digit of single
            # precision; in a batch this small double precision costs next to nothing.
            small = z1.shape[-2] <= _DOUBLE_ROWS and z1.device.type in ("cpu", "cuda")
            inner = torch.float64 if small else single
            loss = self._mean(z1.to(inner), z2.to(inner), slice(None) if rows is None else rows)
            return loss.to(single)

    def _mean(self, z1: Tensor, z2: Tensor, rows: slice) -> Tensor:
        """Return the loss of views of shape (n, d) or (regions, n, d)."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            learned = temperature.requires_grad
            temperature = temperature.reshape(()) if learned else float(temperature)
        u1, u2 = unit_rows(z1), unit_rows(z2)
        positive = (u1 * u2).sum(-1) / temperature
        if self.pos_weight_fn is not None:
            if z1.ndim == 2:
                weight = self._weight(z1, z2)
            else:
                weight = torch.stack(list(map(self._weight, z1, z2)))
            positive = positive * weight
        positive = positive[..., rows]
        n = z1.shape[-2]
        if n == 1:
            warnings.warn(
                "The batch holds one sample, so there are no negatives and the log term of DCL is "
                "dropped. Use batches of at least 2 (drop_last=True).",
                stacklevel=3,
            )
            return -positive.mean()
        samples = torch.arange(n, device=z1.device)[rows]
        anchors = torch.cat([samples, samples + n])
        u = torch.cat([u1, u2], dim=-2)
        negatives = _NegativesLogSumExp.apply(u, anchors, temperature)
        return negatives.mean() - positive.mean()

    def _weight(self, z1: Tensor, z2: Tensor) -> Tensor:
        assert self.pos_weight_fn is not None
        weight: Any = self.pos_weight_fn(z1, z2)
        # Another shape would be broadcast: (n, 1) to a weight of each positive by every sample.
        if not isinstance(weight, Tensor) or weight.shape != z1.shape[:1]:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(
                "pos_weight_fn must return the weight of each positive pair, a tensor of shape "
                f"({len(z1)},), got {got}."
            )
        return weight

    def extra_repr(self) -> str:
        """Return the parameters, for ``repr``."""
        return f"temperature={self.temperature}, pos_weight_fn={self.pos_weight_fn}"


class DCLWLoss(DCLLoss):
    """DCL whose positive pairs are weighted by a negative von Mises-Fisher function.

    The weight of pair i is ``2 - n * softmax(s / sigma)_i`` over the pairs of the batch: the less
    similar its two views, the more a pair counts. The weight is not detached.

    Parameters
    ----------
    sigma : float, default=0.5
        Divides the similarities in the softmax; positive.
    temperature : float, default=0.1
        Divides the cosine similarities; positive.

    Raises
    ------
    ValueError
        If `sigma` or `temperature` is not a positive number.

    References
    ----------
    Yeh, C.-H. et al. Decoupled contrastive learning. ECCV 2022, eq. 7.

    Examples
    --------
    >>> import torch
    >>> from nidl_dcl import DCLWLoss
    >>> z = torch.eye(3)
    >>> round(DCLWLoss(sigma=0.5, temperature=1.0)(z, z).item(), 4)  # equal pairs: weights of 1
    0.3863
    """

    def __init__(self, sigma: float = 0.5, temperature: float = 0.1) -> None:
        _check_positive("sigma", sigma)
        super().__init__(temperature=temperature, pos_weight_fn=_VonMisesFisher(sigma))
        self.sigma = sigma


class _VonMisesFisher:
    """The weighting function of `DCLWLoss`; a class so that it pickles."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, z1: Tensor, z2: Tensor) -> Tensor:
        similarity = (unit_rows(z1) * unit_rows(z2)).sum(1)
        return 2 - len(z1) * torch.softmax(similarity / self.sigma, dim=0)

    def __repr__(self) -> str:
        return f"von_mises_fisher(sigma={self.sigma})"


def _check_positive(name: str, value: Any) -> None:
    number = value.detach() if isinstance(value, Tensor) else value
    one = not isinstance(number, Tensor) or number.numel() == 1
    if not (one and number > 0 and not math.isinf(number)):
        raise ValueError(f"{name} must be a positive number, got {value!r}.")


def unit_rows(z: Tensor) -> Tensor:
    """Return the rows of `z`, shape (…, d), at length 1; rows of zeros stay zero, gradient included.

    Any finite length works: rows are scaled by their largest value before squaring.
    """
    largest = z.detach().abs().amax(dim=-1, keepdim=True)
    filled = largest != 0
    z = z / torch.where(filled, largest, 1)
    length = z.norm(dim=-1, keepdim=True)
    return torch.where(filled, z / torch.where(filled, length, 1), 0)


class _NegativesLogSumExp(torch.autograd.Function):
    """log sum exp of similarity / temperature over an anchor's negatives, by blocks of anchors.

    `u` has the shape (rows, d) or (regions, rows, d). The backward pass computes each block of
    similarities again instead of keeping it.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, anchors: Tensor, temperature: float | Tensor) -> Tensor:
        out = u.new_empty(*u.shape[:-2], len(anchors))
        for _, at, _, s in _similarities(u, anchors, temperature):
            largest = s.amax(dim=-1, keepdim=True)
            out[at] = s.sub_(largest).exp_().sum(-1).log_().add_(largest[..., 0])
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(u, anchors, out, *([temperature] if ctx.temperature is None else []))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        u, anchors, out, *kept = ctx.saved_tensors
        temperature = kept[0] if kept else ctx.temperature
        # Operations that have gradients themselves, where someone asks for second derivatives.
        gradient = _whole_gradient if torch.is_grad_enabled() else _gradient_by_blocks
        grad_u = gradient(u, anchors, out, grad, temperature)
        if not ctx.needs_input_grad[2]:
            return grad_u, None, None
        # Scaling u by c and the temperature by c² changes nothing, so one derivative follows from
        # the other (Euler's theorem).
        grad_temperature = -(u * grad_u).sum() / (2 * temperature)
        return grad_u, None, grad_temperature.to(temperature)


def _gradient_by_blocks(
    u: Tensor, anchors: Tensor, out: Tensor, grad: Tensor, temperature: float | Tensor
) -> Tensor:
    tempered, total = grad / temperature, u.shape[-2]
    # With every sample an anchor, what i does to j and j to i is one product, if the exponentials
    # of all similarities fit one scale. (What a tensor holds is not asked for: it may be on a GPU.)
    narrow = not isinstance(temperature, Tensor) and 2 / temperature + math.log(total) <= _ONE_SCALE
    if len(anchors) == total and narrow:
        top = out.amax()
        factor = tempered * (top - out).exp_()
        grad_u = torch.empty_like(u)
        for of, at, _, s in _similarities(u, anchors, temperature):
            s.sub_(top).exp_().mul_(factor[at][..., None] + factor[of][..., None, :])
            torch.matmul(s, u[of], out=grad_u[at])
        return grad_u
    grad_u = torch.zeros_like(u)
    for of, at, block, s in _similarities(u, anchors, temperature):
        s.sub_(out[at][..., None]).exp_().mul_(tempered[at][..., None])
        part = grad_u[of]
        (part.addmm_ if u.ndim == 2 else part.baddbmm_)(s.mT, u[of][..., block, :])
        part.index_add_(-2, block, s @ u[of])
    return grad_u


def _whole_gradient(
    u: Tensor, anchors: Tensor, out: Tensor, grad: Tensor, temperature: float | Tensor
) -> Tensor:
    of_anchors, total = u[..., anchors, :], u.shape[-2]
    columns = torch.arange(total, device=u.device)
    own = (columns - anchors[:, None]) % (total // 2) == 0
    s = (of_anchors @ u.mT / temperature).masked_fill(own, -torch.inf)
    weights = torch.softmax(s, -1) * (grad / temperature)[..., None]
    return (weights.mT @ of_anchors).index_add(-2, anchors, weights @ u)


def _similarities(u: Tensor, anchors: Tensor, temperature: float | Tensor) -> Any:
    """Yield index of regions, index of their anchors, anchors, similarities / temperature (own: -inf).

    All blocks are computed in one buffer, which the allocator would not reuse by itself. A block has
    anchors of one region, or all anchors of several.
    """
    total = u.shape[-2]
    values = _BLOCK_VALUES if u.device.type == "cpu" else _BLOCK_VALUES_OF_ACCELERATOR
    size = min(len(anchors), max(1, values // total))
    many = max(1, values // (total * len(anchors)))
    regions = [(slice(k, k + many),) for k in range(0, len(u), many)] if u.ndim == 3 else [()]
    buffer = u.new_empty(*u[regions[0]].shape[:-2], size, total)
    for of in regions:
        part = u[of]
        for number, block in enumerate(anchors.split(size)):
            held = buffer[: len(part)] if u.ndim == 3 else buffer
            s = torch.matmul(part[..., block, :], part.mT, out=held[..., : len(block), :])
            s.div_(temperature)
            line = torch.arange(len(block), device=u.device)
            s[..., line, block] = -torch.inf
            s[..., line, (block + total // 2) % total] = -torch.inf
            yield of, (*of, slice(number * size, number * size + len(block))), block, s
