"""Influence unlearning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import saliency
from ..base import Method, Row, Task
from ..data import Examples
from ..errors import UsageError
from ..targets.base import Trainable
from ._mask import Masked


@dataclass(frozen=True, kw_only=True)
class IU(Method, Masked):
    """Influence unlearning (Koh & Liang, ICML 2017; as in Jia et al., NeurIPS 2023): one Newton step that undoes the forget set.

    Idea: a second-order expansion says where the optimum moves when D_f is taken out of the training data; the Hessian is estimated
    by the empirical Fisher matrix of m retained examples (WoodFisher; Singh & Alistarh, NeurIPS 2020).

        v = 1 / (n_f + n_r) sum over D_f of grad L - n_f / ((n_f + n_r) n_r) sum over D_r of grad L
        F = lambda I + 1/m sum_i g_i g_i',    theta <- theta_0 + alpha F^-1 v

    g_i is the gradient of one example. WoodFisher's recursion over i and the Woodbury identity give the same F^-1 v; the latter is
    used, since it needs only the m × m products of the gradients, G the m × d matrix of them:
        F^-1 v = (v - G' (m lambda I + G G')^-1 G v) / lambda

    With ``mask=saliency`` (SalUn's, as an option: IU + SalUn of its paper) the step is multiplied by the mask.

    Logged: ``change`` is ||theta - theta_0|| / ||theta_0||, ``cosine`` that of the step and v (1: the Fisher matrix did nothing),
    ``gradient`` is ||v||; with a mask also ``mask_seconds``, and the first two are of the masked step.

    Deviations from the authors' code:
    1. The Fisher matrix is used. The recursion of the release (of SalUn, and of Jia et al.) never takes in the gradient at hand, so
       its step is v up to a multiple of one example's gradient: plain ascent along v, which is preset ``release``.
    2. alpha and lambda: the paper of SalUn searches alpha in 1 … 20 and names no choice. The release's recursion begins at the
       identity, that is lambda 1; a smaller one follows the Fisher matrix more and makes a longer step.
    3. The retained examples are drawn at random. The products are added up in float64.
    """

    paper: ClassVar[str] = "arXiv:2304.04934"
    needs: ClassVar[type] = Trainable
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "release": {"fisher": "identity"}}

    params: str = "full"
    """weights to change"""
    alpha: float = 10.0
    """length of the step"""
    fisher: Literal["woodfisher", "identity"] = "woodfisher"
    """the estimate of the Hessian; identity is plain ascent along v"""
    samples: int = 1000
    """m, retained examples of the Fisher matrix; all of them if there are fewer"""
    lamb: float = 1.0
    """lambda, the damping"""
    batch: int = 256
    """examples in each gradient of v; does not change it"""
    gigabytes: float = 4.0
    """memory for gradients; those that do not fit are computed again"""

    def __post_init__(self) -> None:
        if min(self.samples, self.batch) < 1 or min(self.lamb, self.gigabytes) <= 0:
            raise UsageError("samples and batch must be at least 1, and lamb and gigabytes above 0")
        self.masking()

    def run(self, target: Trainable, task: Task) -> Iterator[Row]:
        D_f, D_r = target.open(task.forget), target.open(task.retain)
        w = target.trainable(self.params)  # theta
        freeze, spent = self.freeze(target, lambda: D_f, w, self.batch)
        mean_f = saliency.mean(w, target.loss, D_f.batches(self.batch))
        mean_r = saliency.mean(w, target.loss, D_r.batches(self.batch))
        share = len(D_f) / (len(D_f) + len(D_r))
        v = share * torch.cat([(mean_f[n] - mean_r[n]).flatten() for n in w])  # (d,)
        step = self.alpha * (v if self.fisher == "identity" else self.inverse(self.gradient(target, D_r, w), len(D_r), v))
        for _ in target.steps(1):
            size = torch.cat([p.detach().flatten() for p in w.values()]).norm()
            for p, part in zip(w.values(), step.split([p.numel() for p in w.values()]), strict=True):
                p.grad = part.view(p.shape)
            freeze.gradients()  # the step, times the mask: what it sees are views of the step
            with torch.no_grad():
                for p, part in zip(w.values(), step.split([p.numel() for p in w.values()]), strict=True):
                    p.add_(part.view(p.shape))
            freeze.restore()
            cosine = torch.nn.functional.cosine_similarity(step, v, dim=0)
            yield {"change": (step.norm() / size).item(), "cosine": cosine.item(), "gradient": v.norm().item(), **spent}

    def gradient(self, target: Trainable, D_r: Examples, w: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """The gradient (d,) of one example, given its row; the same whenever it is asked for."""
        seed = torch.initial_seed()

        def of(row: Tensor) -> Tensor:
            with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
                torch.manual_seed(seed + 1 + int(row))  # a diffusion model's loss draws noise
                grads = torch.autograd.grad(target.loss(D_r.batch(row[None])), list(w.values()), materialize_grads=True)
            return torch.cat([g.flatten() for g in grads])

        return of

    def inverse(self, gradient: Callable[[Tensor], Tensor], n: int, v: Tensor) -> Tensor:
        """F^-1 v (d,) by the Woodbury identity, holding as many gradients at a time as fit."""
        rows = torch.randperm(n)[: self.samples]
        m, held = len(rows), max(1, int(self.gigabytes * 1e9 / (v.numel() * v.element_size())))
        blocks = [slice(i, min(i + held, m)) for i in range(0, m, held)]
        GG, Gv = torch.zeros(m, m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
        G = v.new_empty(min(held, m), v.numel())
        for block in blocks:
            g = self.fill(G, gradient, rows[block])  # (held, d)
            GG[block, block], Gv[block] = _products(g, g), _products(g, v[None])[:, 0]
            for j in range(block.stop, m):
                GG[block, j] = GG[j, block] = _products(g, gradient(rows[j])[None])[:, 0]
        c = torch.linalg.solve(m * self.lamb * torch.eye(m, dtype=torch.float64) + GG, Gv).to(v)  # (m,)
        fixed = torch.zeros_like(v)  # G' c; the last block's gradients are still there
        for block in reversed(blocks):
            g = G[: len(rows[block])] if block is blocks[-1] else self.fill(G, gradient, rows[block])
            fixed += c[block] @ g
        return (v - fixed) / self.lamb

    def fill(self, G: Tensor, gradient: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """The gradients of ``rows``, written into the first rows of ``G``."""
        for i, row in enumerate(rows):
            G[i] = gradient(row)
        return G[: len(rows)]


def _products(A: Tensor, B: Tensor) -> Tensor:
    """A B' for rows of gradients, float64 on the CPU; the sum over the long side is taken in pieces, which float64 adds up."""
    pieces = zip(A.split(1 << 14, dim=1), B.split(1 << 14, dim=1), strict=True)
    total: Tensor = sum(((a @ b.T).double() for a, b in pieces), start=torch.zeros((), dtype=torch.float64, device=A.device))
    return total.cpu()
