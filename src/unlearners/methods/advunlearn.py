"""AdvUnlearn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .. import neighbours, pool, retain
from ..base import Auto, Method, Row, Task
from ..config import later
from ..errors import UsageError
from ..targets.base import TextToImage
from ._soft import Deltas, Latest, Place, Spot, attack, encode, placed


@dataclass(frozen=True, kw_only=True)
class AdvUnlearn(Method):
    """AdvUnlearn (Zhang et al., NeurIPS 2024): erase against the worst prompt found, and hold everyday prompts where they were.

    Equation (paper, eq. 5-7): in every iteration the attacker moves delta, then the defender moves theta,
        delta* = argmin over delta of || eps_theta(x_t, t, c + delta) - eps_0(x_t, t, c) ||^2
        L(theta) = || eps_theta(x_t, t, c + delta*) - e_0 + eta (e_c - e_0) ||^2 + gamma || eps_theta(x~_t, t, c~) - eps_0(x~_t, t, c~) ||^2
    with e_0 = eps_0(x_t, t, ""), e_c = eps_0(x_t, t, c), c the concept, c~ retain prompts and delta token embeddings beside c's.
    Training the text encoder (the paper's choice), x_t and all targets are independent of theta: they are sampled once into a pool
    that is kept on disk, and no second network is needed. ``retain=none`` is AT-ESD; ``attack_steps=0`` is ESD with retaining.

    Logged: ``loss``; ``erase`` and ``retain`` are its two terms; ``attack`` the attacker's loss at its last step (low: the concept
    is still there). The first row has ``pool_seconds``, and ``cached_seconds`` of them when another run had built the pool.

    Deviations from the authors' code:
    1. x_t comes from the frozen model's trajectories, whose every state is used; the code samples one state at a time. With the
       UNet in training theirs is of the model in training.
    2. The slips of the code are off and named in ``slips``: the network is told a time some 48 steps noisier than x_t is (time);
       the concept's length is counted in words, so "nudity" loses its second token (words); delta is from before the last step
       (stale); the attack's gradients add up over steps (sum).
    3. ``params`` trains the layers it names; in the code layer 1 includes 10 and 11.
    4. ``adam`` is what the code calls pgd; ``pgd`` takes sign steps (at most attack_steps * attack_lr away), ``fgsm`` one of them.
    5. Retain prompts are our list without what is near the concept, and people too where nudity or harm goes; theirs are 243 of COCO by a
       language model (give the release's coco_object_retain.csv as ``retain_set``, with nearest 0). ``null_share`` of them are "", which
       guidance uses in every step; theirs never are (null_share 0).
    6. The warm-up on the clean concept is the code's; the paper does not mention it.
    7. With ``attack_every`` above 1 a concept's delta serves until the next attack, and every update deals its own retain prompts.
    Preset canvas is not the paper's setting: eta 4, lr 8e-4, 120 updates, 3 sign steps on 2 tokens.
    Of the release are not offered: sign gradients written in place, condition embeddings.
    """

    needs: ClassVar[type] = TextToImage
    paper: ClassVar[str] = "arXiv:2405.15234"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "fast": {"attack": "fgsm"},
        "release": {"retain": "iter", "gamma": 1.0, "init": "latest", "slips": ("time", "words", "stale", "sum")},
        "nudity": {"gamma": 0.3},
        "style": {"gamma": 0.5},
        "object": {"gamma": 0.5},
        "canvas": {
            "retain_set": "canvas+preserve", "nearest": 0.0, "eta": 4.0, "steps": 120, "lr": 8e-4, "batch": 4, "retain_batch": 12,
            "warmup": 20, "attack": "pgd", "attack_steps": 3, "attack_lr": 0.01, "attack_batch": 2, "k": 2,
            "sampler_steps": 10, "trajectories": 48, "gamma": 0.3, "null_share": "listed",
        },
    }  # fmt: skip

    params: str = "text_encoder"
    """weights to train: text_encoder, some of its layers (text_encoder:layers=0-3), a group of the UNet, a regular expression"""
    steps: int = 1000
    """outer iterations"""
    lr: float = 1e-5
    """learning rate of Adam"""
    eta: float = 1.0
    """negative guidance; 0 teaches the unconditional prediction"""
    batch: int = 1
    """states x_t of the concept in each update"""
    retain: Literal["reg", "iter", "none"] = "reg"
    """reg: one loss; iter: an update of its own, without gamma (the release); none: AT-ESD"""
    gamma: float | Auto = "auto"
    """weight of retaining; auto is the paper's: 0.3 for nsfw (nudity), 0.5 for styles, objects and, by our choice, all else"""
    retain_batch: int = 5
    """retain prompts in each update"""
    retain_set: str = "auto"
    """several joined by +: everyday, people, scenes, styles (our lists), preserve (the task's neighbours), canvas, coco_object, imagenet,
    hub:NAME (class names), a file with a prompt in each line or a CSV column; auto: everyday, + people or styles by kind"""
    null_share: float | Literal["listed"] = 0.2
    """share of the retain rows that are the empty prompt, which guidance starts from; listed: as often as any other prompt of the list"""
    filtered: bool = later(True)
    """leave out retain prompts that name the concept or are nearest to it; false is the paper's ablation without a filter"""
    nearest: float = 0.08
    """share of the retain prompts, those most like the concept, that is left out (the paper's language model: 14 to 22 of 243)"""
    attack: Literal["adam", "pgd", "fgsm"] = "adam"
    """how delta moves: Adam, sign steps, or a single sign step"""
    attack_steps: int = 30
    """K, steps of the attack; 0: no attack"""
    attack_lr: float = 1e-3
    """length of its steps"""
    attack_batch: int = 1
    """states x_t in each of its steps"""
    restarts: int = 1
    """attacks from different starts at once; the one with the lowest loss is used"""
    place: Place = "prefix"
    """where delta goes: before the concept, after it, instead of it, or onto its own embeddings"""
    k: int = 1
    """tokens of delta; add has as many as the concept"""
    init: Literal["random", "latest"] = "random"
    """where delta starts: at random tokens, or where it last was"""
    attack_every: int = later(1)
    """updates from one attack to the next (the code's adv_prompt_update_step)"""
    warmup: int = 200
    """first iterations, without an attack"""
    guidance: float = 3.0
    """classifier-free guidance while sampling x_t"""
    sampler_steps: int = 50
    """steps of a whole trajectory"""
    time: Literal["grid", "bucket"] = later("grid")
    """the times that the network is told: x_t's own, of which there are sampler_steps, or uniform within half a sampler step around it,
    so that all times of the schedule are met (the authors' code); bucket takes one more evaluation for each state of the pool"""
    trajectories: int = 64
    """of the concept in the pool; each retain prompt has one"""
    pool_gb: float = 2.0
    """size of the pool; fewer states of each trajectory are kept when all would be larger"""
    slips: tuple[Literal["time", "words", "stale", "sum"], ...] = ()
    """slips of the official code to repeat"""

    def __post_init__(self) -> None:
        batches = (self.batch, self.retain_batch, self.attack_batch)
        counts = (self.steps, *batches, self.restarts, self.k, self.sampler_steps, self.trajectories, self.attack_every)
        gamma, share = 0 if self.gamma == "auto" else self.gamma, 0 if self.null_share == "listed" else self.null_share
        if min(counts) < 1 or min(self.attack_steps, self.warmup, gamma, self.nearest, share) < 0 or self.nearest >= 1 or share > 1:
            bounds = "attack_steps, warmup, gamma, nearest and null_share at least 0, nearest below 1 and null_share at most 1"
            raise UsageError(f"counts must be at least 1, {bounds}")

    def resolve(self, target: TextToImage, task: Task) -> Self:
        gamma, kept = 0.3 if task.kind == "nsfw" else 0.5, neighbours.lists(task)
        named = kept if self.retain_set == "auto" else self.retain_set
        return replace(self, gamma=gamma if self.gamma == "auto" else self.gamma, retain_set=named)

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        target.differentiable()
        said, holds = list(task.said), self.retain == "iter" or (self.retain == "reg" and float(self.gamma) > 0)
        k = self.k if self.attack_steps else 0
        spots = [placed(target, c, self.place, k, words="words" in self.slips) for c in said]
        kept = retain.prompts(target, task, self.retain_set, self.nearest, filtered=self.filtered) if holds else []
        how = {"steps": self.sampler_steps, "guidance": self.guidance, "trajectories": self.trajectories, "gb": self.pool_gb}
        states, spent = pool.opened(target, said, kept, pool.Recipe(**how, told="late" if "time" in self.slips else self.time))  # type: ignore[arg-type]
        plain, c_, B = target.tokens([*said, *kept]), range(len(said), len(said) + len(kept)), self.batch
        w = target.trainable(self.params)  # theta
        opt, latest = torch.optim.Adam(w.values(), lr=self.lr), Latest()

        for i in target.steps(self.steps, opt, states, latest):
            c = int(torch.randint(len(said), ()))
            attacked = i >= self.warmup and self.attack_steps > 0
            fresh = attacked and ((i - self.warmup) % self.attack_every == 0 or c not in latest.delta)
            if fresh:
                latest.delta[c], found = self.attacked(target, states, c, spots[c], latest.delta.get(c))
            others = self.dealt(states, c_, i) if holds and self.retain == "reg" else []
            x_t, t, e_c, e_0 = states.draw([c] * B + others)  # B + R rows
            goal = torch.cat([e_0 - self.eta * (e_c[:B] - e_0), e_c[B:]]).float()
            if attacked:
                prompts = encode(target, spots[c], latest.delta[c], self.place, plain[others])
            else:
                prompts = target.encode(plain[[c, *others]])
            e = target.eps(x_t, t, prompts[[0] * B + list(range(1, 1 + len(others)))]).float()
            row = {"erase": (loss := F.mse_loss(e[:B], goal[:B]))}
            if others:
                row["retain"] = F.mse_loss(e[B:], goal[B:])
                loss = loss + float(self.gamma) * row["retain"]
            _update(opt, loss)
            if self.retain == "iter":
                others = self.dealt(states, c_, i)
                x_t, t, e_c, _ = states.draw(others)
                row["retain"] = F.mse_loss(target.eps(x_t, t, target.encode(plain[others])).float(), e_c.float())
                _update(opt, row["retain"])
            row = {"loss": loss, **row, **({"attack": found} if fresh else {})}
            values = torch.stack([v.detach() for v in row.values()]).tolist()  # the device is waited for once
            yield dict(zip(row, values, strict=True)) | (spent.row if i == 0 else {})

    def dealt(self, states: pool.Pool, c_: range, i: int) -> list[int]:
        """Which retain prompts the update ``i`` holds: the empty one, first of ``c_``, as often as its share says, and the next others."""
        if self.null_share == "listed":
            return states.deal(self.retain_batch, c_)
        rows = self.retain_batch * self.null_share
        empty = int(round((i + 1) * rows, 6)) - int(round(i * rows, 6))  # what is owed so far, less what was held
        return [c_[0]] * empty + states.deal(self.retain_batch - empty, c_[1:])

    def attacked(self, target: TextToImage, states: pool.Pool, c: int, spot: Spot, start: Deltas | None) -> tuple[Deltas, Tensor]:
        """delta* of concept ``c``, (k, D) for each text encoder, and the attacker's loss, a scalar."""
        drawn, old = partial(states.draw, [c] * self.attack_batch), start if self.init == "latest" else None
        descent = self.attack, self.attack_steps, self.attack_lr, self.slips
        return attack(target, spot, self.place, drawn, *descent, restarts=self.restarts, start=old)


def _update(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    opt.step()
