"""Scalable, precise and efficient concept erasure in the null space of what is preserved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from typing_extensions import Self

from .. import closed_form, neighbours
from ..base import Auto, Method, Row, Task
from ..config import later
from ..errors import UnlearnError, UsageError
from ..targets.base import TextToImage

NAMED: Mapping[str, Any] = {"retain": (), "guide": ()}
VALUES = r"unet\..*\.attn2\.to_v\."


@dataclass(frozen=True, kw_only=True)
class SPEED(Method):
    """SPEED (Li et al., ICLR 2026): send concepts to their anchors by a step that what is preserved cannot feel.

    For every value projection W of the cross-attention, with concepts C_1, anchors C_*, the projector P on the null space of the
    preserved vectors, and invariants C_2 (columns are vectors), the step is
        Delta P = W (C_* C_1' - C_1 C_1') P Q M,   M = (C_1 C_1' P + rho I)^-1,   Q = I - M C_2 (C_2' P M C_2)^-1 C_2' P,
    so that Delta P C_2 = 0 exactly and Delta P c = 0 for every preserved c with P c = 0. P is spanned by the eigenvectors of the
    preserved vectors' mean outer product whose eigenvalues are below ``null``. Preserved are, for each W,
    - those vectors that the unconstrained step W (C_* C_1' - C_1 C_1') (C_1 C_1' + I)^-1 would move at least as far as their mean
      ("influence-based filtering"),
    - and ``augment`` copies of each with standard noise along the smallest singular direction of W, filtered alike.
    The invariants are the start token and three cluster centres of the empty prompt's other positions.

    Logged: over all edited matrices together, ``change`` ||Delta P|| / ||W||; ``erased`` ||(W + Delta P) c - W c_*|| / ||W c - W c_*||
    (0 = the concept became its anchor); ``moved`` ||Delta P c|| / ||W c|| of all preserved vectors, the filtered ones too; ``fixed`` the
    same of C_2; ``free`` the mean dimension of the null space, as a share; ``used`` the share of preserved vectors that pass.

    Deviations from the authors' code:
    1. float64 and linear solves in place of float32 and inverses. C_2' P M C_2 gets a pseudo-inverse: it is singular where an
       invariant is preserved already.
    2. Sums over concepts; the code (``average=True``) takes means, which is rho times the number of concepts.
    3. An empty anchor's vector is its end token. The code takes the start token there, which C_2 holds fixed.
    4. Preserved are the task's list and ``retain`` as bare phrases, each by its last token, or without any the positions of the empty
       prompt after the first. The code reads hundreds of phrases from files; give many, or little is protected.
    5. The code takes all positions after the first for nudity alone: preset ``nudity``. Here ``all`` begins at the last token.
    6. A task that names no neighbours gets ours (``retain``), and the mean of some of them as its anchor (``guide``), see ``neighbours``.
       Presets never choose.
    """

    paper: ClassVar[str] = "arXiv:2503.07392"
    needs: ClassVar[type] = TextToImage
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": NAMED,
        "release": {**NAMED, "average": True},
        "nudity": {**NAMED, "tokens": "all"},
        "canvas": {**NAMED, "tokens": "all"},
    }

    params: str = VALUES
    """matrices to edit; xattn-kv edits the keys too"""
    tokens: Literal["all", "last"] = "last"
    """of a concept and its anchor: the last token alone, or every position from there through the padding"""
    null: float = 0.1
    """eigenvalues below this count as null space"""
    rho: float = 1.0
    """how much Delta is held small"""
    augment: int = 10
    """noisy copies of each preserved vector; 0 for none"""
    filtered: bool = True
    """preserve only what the unconstrained step would move most"""
    invariants: int = 3
    """cluster centres of the empty prompt that are held fixed beside its start token"""
    average: bool = False
    """means over concepts in place of sums"""
    strength: float = 1.0
    """share of the step that is taken; 0 changes nothing"""
    templates: tuple[str, ...] = ("{}",)
    """phrases with {} for the concept; empty chooses them by the kind of concept"""
    retain: tuple[str, ...] | Auto = "auto"
    """phrases to preserve beside the task's; auto chooses them where the task names no neighbours"""
    guide: tuple[str, ...] | Auto = later("auto")
    """words of the concept's kind whose mean is the anchor; auto chooses them where the task names none; empty: the task's anchor"""

    def resolve(self, target: TextToImage, task: Task) -> Self:
        if self.retain != "auto" or neighbours.named(task, "preserve"):
            none: dict[str, Any] = {name: () for name in NAMED if getattr(self, name) == "auto"}
            return replace(self, **none)
        around = neighbours.choose(target, task)
        guide = (() if neighbours.named(task, "anchors") else around.guide) if self.guide == "auto" else self.guide
        return replace(self, retain=(*around.own, *around.other), guide=guide)

    def __post_init__(self) -> None:
        if self.null <= 0 or self.rho <= 0 or self.augment < 0 or self.invariants < 1:
            raise UsageError("null and rho must be above 0, invariants at least 1 and augment at least 0")
        closed_form.check_templates(self.templates)

    @torch.no_grad()
    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        w = target.select(self.params)
        says = self.templates or closed_form.TEMPLATES[task.kind]
        if self.guide:
            c, g = closed_form.toward(target, task, says, self.guide, self.tokens)  # (n, d), (n, d)
        else:
            c, g = closed_form.aligned(target, closed_form.phrases(task, says)[0], self.tokens)
        closed_form.check_matrices("SPEED", w, c.shape[1], VALUES)
        empty = closed_form.read(target, [""])[""][0]  # (L, d)
        retain = [*task.preserve, *self.retain]
        r = closed_form.kept(target, retain, "last") if retain else empty[1:]  # (m, d)
        C_2 = torch.cat([empty[:1], centres(empty[1:], self.invariants)])  # (k, d)
        share = 1 / len(task.concepts) if self.average else 1.0
        A, D = share * c.T @ c, share * (g - c).T @ c  # C_1 C_1', C_* C_1' - C_1 C_1'; (d, d)
        eye = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
        naive = torch.linalg.solve(A + eye, D, left=False)  # of the unconstrained step
        size, free, used = dict.fromkeys(("change", "of", "left", "gap", "drift", "kept", "fixed", "held"), 0.0), 0.0, 0.0
        for _ in target.steps(1):
            for matrix in w.values():
                W = matrix.double()  # (out, d)
                near = felt(W @ naive, r) if self.filtered else torch.ones(len(r), dtype=torch.bool, device=r.device)
                P = null_space(self.enriched(W, W @ naive, r[near]), self.null)
                step = self.strength * W @ constrained(A, D, P, C_2, self.rho)  # Delta P
                if not torch.isfinite(step).all():
                    raise UnlearnError("the step is not finite; raise rho")
                parts = {"change": step, "of": W, "left": c @ (W + step).T - g @ W.T, "gap": (c - g) @ W.T}
                parts |= {"drift": r @ step.T, "kept": r @ W.T, "fixed": C_2 @ step.T, "held": C_2 @ W.T}
                size = {k: s + parts[k].square().sum().item() for k, s in size.items()}
                free, used = free + P.trace().item() / len(P), used + near.double().mean().item()
                if self.strength:
                    matrix.copy_(W + step)
            ratios = {"change": ("change", "of"), "erased": ("left", "gap"), "moved": ("drift", "kept"), "fixed": ("fixed", "held")}
            row = {k: (size[a] / size[b]) ** 0.5 if size[b] else 0.0 for k, (a, b) in ratios.items()}
            yield {**row, "free": free / len(w), "used": used / len(w)}

    def enriched(self, W: Tensor, step: Tensor, r: Tensor) -> Tensor:
        """``r`` (m, d) and its noisy copies along the smallest singular direction of ``W`` that ``step`` moves most ("directed prior
        augmentation")."""
        if not self.augment:
            return r
        v = torch.linalg.svd(W, full_matrices=False)[2][-1]  # (d,)
        noise = torch.randn(self.augment * len(r), 1, dtype=torch.float64).to(r)
        copies = r.repeat(self.augment, 1) + noise * v
        return torch.cat([r, copies[felt(step, copies)]])


def felt(step: Tensor, x: Tensor) -> Tensor:
    """Which rows of ``x`` (m, d) ``step`` moves at least as far as the mean: bool (m,), of which one at least is true."""
    far = (x @ step.T).norm(dim=1)
    moved: Tensor = far >= far.mean() * (1 - 1e-9)  # equal ones all count
    return moved


def null_space(x: Tensor, below: float) -> Tensor:
    """Projector P (d, d) on the eigenvectors of the mean outer product of the rows of ``x`` whose eigenvalues are below ``below``."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    U = vectors[:, values < below]
    P: Tensor = U @ U.T
    return P


def constrained(A: Tensor, D: Tensor, P: Tensor, C_2: Tensor, rho: float) -> Tensor:
    """(C_* C_1' - C_1 C_1') P Q M (d, d), with A = C_1 C_1', D = C_* C_1' - C_1 C_1', and the invariants as rows of ``C_2`` (k, d)."""
    back = A @ P + rho * torch.eye(len(A), dtype=A.dtype, device=A.device)  # M^-1
    MC = torch.linalg.solve(back, C_2.T)  # M C_2, (d, k)
    CP = C_2 @ P  # C_2' P, (k, d)
    inner = CP @ MC  # C_2' P M C_2, (k, k); symmetric
    scale = float(C_2.square().sum() / rho)
    DP = D @ P
    DPQ = DP - DP @ MC @ torch.linalg.pinv((inner + inner.T) / 2, atol=1e-10 * scale, hermitian=True) @ CP
    step: Tensor = torch.linalg.solve(back, DPQ, left=False)
    return step


def centres(x: Tensor, k: int) -> Tensor:
    """k-means centres (k, d) of ``x`` (n, d), the best of ten fixed starts."""
    found = KMeans(k, n_init=10, random_state=0).fit(x.cpu().numpy()).cluster_centers_
    return torch.from_numpy(found).to(x)
