"""ScissorHands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import optim, saliency
from ..base import Auto, Method, Row, Task
from ..data import Loader
from ..errors import UsageError
from ..latents import Asked
from ..targets.base import Denoiser, Learner, TextToImage, Trainable
from . import _gradients as gradients
from ._learn import least

LATE = r"net\.(layer3|layer4|fc)\.|unet\.up_blocks\.[12]\.attentions\.1\..*\.attn1\."


@dataclass(frozen=True, kw_only=True)
class Scissorhands(Method):
    """Scissorhands (Wu & Harandi, ECCV 2024): trim the weights that the forget set is most sensitive to, then repair the rest.

    Trim: the floor((1 - sparsity) N) of the N weights with the largest connection sensitivity (SNIP) start anew,
        s_j = |theta_j sum_b dL(theta; b) / dtheta_j|   over prune_num batches b of D_f,
    weights drawn from the Kaiming-uniform distribution with a = sqrt(5), biases 0; gains and biases of norm layers are never trimmed.

    Repair: steps on L_r - lambda L_f, whose gradient g is kept from lowering L_f. g_m = grad (-L_f) of memory_num batches, taken anew at
    the start of each epoch. Where <g, g_m> < 0 for any m, the step follows g + sum_m v_m g_m with the solution of GEM's dual problem
        min over v >= margin of v' (G G' + ridge I) v / 2 + v' G g;   for one memory v = max(margin, -<g, g_1> / (||g_1||^2 + ridge)).

    L is the family's own training loss: cross-entropy, or denoising under the concept's prompt or class. L_f of a dual encoder is the
    mean of 1 - cos over pairs.

    Logged: ``loss`` is L_r - lambda L_f, ``retain`` and ``forget`` its parts; ``cosine`` the smallest cos(g, g_m) before the projection,
    ``projected`` 1 where there was one. The first row has ``trimmed``, how many weights.

    Deviations from the authors' code:
    1. s_j has |sum of gradients|, as SNIP. The code sums |gradients| over the batches (``statistic=sum_abs``; preset ``release``).
    2. N counts the weights that may be trimmed, so that exactly that share is. The code ranks all weights of the network and trims those
       above the threshold in a few layers alone, the default here too: layer3, layer4 and fc of a ResNet, on Stable Diffusion the
       self-attention in up_blocks.1.attentions.1 and up_blocks.2.attentions.1.
    3. On Stable Diffusion the code draws truncated normal weights (std .02) and takes s_j from a prediction with guidance 7.5.
    4. Batches are drawn without replacement; the code starts the loader anew for each.
    5. The margin 0.5 bounds v as in the code: a projected step raises L_f even where g hardly lowers it. 0 is GEM's own bound.
    6. The projection covers the weights that may be trimmed, as on the code's classifiers.
    7. Settings of class-conditional diffusion and dual encoders, and the presets fast and canvas, are ours.
    """

    paper: ClassVar[str] = "arXiv:2401.06187"
    needs: ClassVar[type] = Learner
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "release": {"statistic": "sum_abs"},
        "fast": {"epochs": 2},
        "canvas": {"epochs": 1, "steps": 60, "sparsity": 0.9, "lamb": 0.06, "batch": 16, "lr": 1e-4, "pictures": 96},
    }

    params: str = "full"
    """weights to train"""
    trim: str = "auto"
    """weights that may be trimmed, a group or regular expression; empty: all in params. auto: those of deviation 2, else all"""
    sparsity: float | Auto = "auto"
    """share of the weights that is left alone. auto: .97 on classifiers, .999 on generative models (.995 for the kind nsfw)"""
    statistic: saliency.Statistic = "abs_sum"
    """of the batches' gradients in s_j: abs_sum |sum g| (SNIP's), sum_abs |g| summed (the release's), sum_sq g^2 summed"""
    prune_num: int | Auto = "auto"
    """batches of D_f that s_j is computed on. auto: 1 on classifiers, else 10"""
    lamb: float | Auto = "auto"
    """lambda, weight of L_f; larger values forget more. auto: .05 on classifiers, else .1"""
    project: bool | Auto = "auto"
    """whether g is projected. auto: yes on classifiers, else no (the release's)"""
    memory_num: int = 1
    """batches of D_f whose gradients g_m bound the step, at most 12"""
    margin: float = 0.5
    """smallest v; larger values push further along -L_f"""
    ridge: float = 1e-3
    """added to the diagonal of the dual problem"""
    epochs: int | Auto = "auto"
    """auto: 10 passes over D_r on classifiers, with L_r alone where D_f is used up; else 3 passes over D_f (5 for the kind nsfw)"""
    steps: int = 0
    """steps in each epoch; 0: one pass"""
    batch: int | Auto = "auto"
    """images of each set in each step. auto: 8 on Stable Diffusion (16 for the kind nsfw), 256 on classifiers, else 128"""
    lr: float | Auto = "auto"
    """learning rate. auto: .005 on classifiers, 2e-5 on Stable Diffusion (1e-5 for the kind nsfw), else 1e-4"""
    optimizer: Literal["auto", "sgd", "adam", "adamw"] = "auto"
    """auto: sgd with momentum .9 and weight decay 5e-4 on classifiers, else adam"""
    norm: Literal["update", "freeze"] = "update"
    """whether batch normalization uses and updates its batch statistics, or keeps the original's"""
    pictures: int = 800
    """images of each side that a text-to-image model generates itself when the task names none"""

    def __post_init__(self) -> None:
        if least(self.epochs, self.batch, self.pictures, self.prune_num, self.memory_num) < 1:
            raise UsageError("epochs, batch, pictures, prune_num and memory_num must be at least 1")
        if least(self.steps, self.lamb, self.margin) < 0 or self.ridge <= 0 or self.memory_num > 12:
            raise UsageError("steps, lamb and margin must be at least 0, ridge above 0, and memory_num at most 12")
        if not isinstance(self.sparsity, str) and not 0 <= self.sparsity <= 1:
            raise UsageError(f"sparsity is {self.sparsity} but is a share of the weights; give a number from 0 to 1")

    def resolve(self, target: Any, task: Task) -> Self:
        text, nsfw = isinstance(target, TextToImage), task.kind == "nsfw"
        sees = isinstance(target, Trainable) and not isinstance(target, Denoiser)  # a classifier
        known: dict[str, Any] = {
            "trim": LATE if any(re.match(LATE, n) for n in target.select(self.params)) else "",
            "sparsity": 0.97 if sees else 0.995 if nsfw else 0.999,
            "prune_num": 1 if sees else 10,
            "lamb": 0.05 if sees else 0.1,
            "project": sees,
            "epochs": 10 if sees else 5 if nsfw else 3,
            "batch": 256 if sees else (16 if nsfw else 8) if text else 128,
            "lr": 5e-3 if sees else (1e-5 if nsfw else 2e-5) if text else 1e-4,
            "optimizer": "sgd" if sees else "adam",
        }
        return replace(self, **{k: v for k, v in known.items() if getattr(self, k) == "auto"})

    def run(self, target: Learner, task: Task) -> Iterator[Row]:
        asked, batch = Asked(pictures=self.pictures), int(self.batch)
        forget, retain = target.forgotten(task, asked), target.retained(task, asked)
        D_f, D_r = forget.loader(batch), retain.loader(batch)
        w = target.trainable(self.params)  # theta
        late = self.trimmable(target, w)
        sees = isinstance(target, Trainable) and not isinstance(target, Denoiser)  # as in ``resolve``
        decay = 5e-4 if self.optimizer == "sgd" else 0.0
        opt = optim.make(self.optimizer, w.values(), lr=float(self.lr), weight_decay=decay)  # type: ignore[arg-type]
        epoch, lam, memory = self.steps or len(D_r if sees else D_f), float(self.lamb), _Memory()

        for i in target.steps(int(self.epochs) * epoch, opt, D_f, D_r, memory):
            first: Row = {"trimmed": float(self.cut(target, forget.loader(batch), late))} if i == 0 else {}
            if i % epoch == 0 and self.project:
                for module in target.modules.values():
                    module.eval()
                memory.g = [gradients.of(-target.forgetting(D_f.draw()), late) for _ in range(self.memory_num)]
            target.train(self.norm)
            L_r = target.loss(D_r.draw())
            row = {"loss": L_r.item(), "retain": L_r.item()}
            if sees and i % epoch >= len(D_f):  # D_f is used up
                g = dict(zip(w, gradients.of(L_r, w), strict=True))
            else:
                L_f = target.forgetting(D_f.draw())
                g = dict(zip(w, gradients.of(L_r - lam * L_f, w), strict=True))
                row |= {"loss": L_r.item() - lam * L_f.item(), "forget": L_f.item()}
                if self.project:
                    own, told = self.projected([g[n] for n in late], memory.g)
                    g |= zip(late, own, strict=True)
                    row |= told
            gradients.put(tuple(g.values()), w)
            opt.step()
            yield row | first

    def trimmable(self, target: Learner, w: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those of ``w`` that may be trimmed."""
        inside = target.select(self.trim) if self.trim else w
        norms = {f"{c}.{n}." for c, net in target.modules.items() for n, m in net.named_modules() if "Norm" in type(m).__name__}
        fits = {n: p for n, p in w.items() if n in inside and (p.dim() > 1 or n.endswith("bias"))}
        found = {n: p for n, p in fits.items() if f"{n.rpartition('.')[0]}." not in norms}
        if not found:
            raise UsageError(f"'{self.trim or self.params}' leaves no weight that may be trimmed, for norm layers never are; name others")
        return found

    def cut(self, target: Learner, D_f: Loader, late: Mapping[str, nn.Parameter]) -> int:
        """Trim; returns how many weights start anew."""
        s = saliency.measure(late, target.forgetting, (D_f.draw() for _ in range(int(self.prune_num))), self.statistic)
        s = {n: late[n].detach().abs() ** (2 if self.statistic == "sum_sq" else 1) * s[n] for n in late}
        chosen = saliency.choose(s, float(1 - Fraction(repr(self.sparsity))))
        with torch.no_grad():
            for n, p in late.items():
                p.copy_(torch.where(chosen[n], fresh(p), p))
        return sum(int(m.sum()) for m in chosen.values())

    def projected(self, g: Sequence[Tensor], memories: Sequence[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Row]:
        """g, projected where it lowers the L_f of any memory, and what is logged of it."""
        cosine = min(gradients.cosine(g, m) for m in memories)
        step = gradients.project(g, memories, self.margin, self.ridge)[0] if cosine < 0 else tuple(g)
        return step, {"cosine": cosine, "projected": float(cosine < 0)}


def fresh(p: Tensor) -> Tensor:
    """New values for a weight, drawn on the CPU: Kaiming-uniform with a = sqrt(5), or 0 for a bias."""
    made = torch.zeros(p.shape, dtype=p.dtype)
    return (made if p.dim() < 2 else nn.init.kaiming_uniform_(made, a=5**0.5)).to(p.device)


class _Memory:  # the gradients g_m of an epoch
    g: Sequence[tuple[Tensor, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        return {"g": self.g}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.g = state["g"]
