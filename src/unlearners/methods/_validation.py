"""How much a model still knows of what it is to forget, and of the rest: the two numbers that SLUG's step is searched by, and a third
that tells steps apart which the second finds alike.

Measured on pictures that no reported number is measured on: a validation split, drawings from other seeds, or the given pairs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import judges
from ..banks import forgotten
from ..base import Data, Target, Task
from ..data import Examples
from ..diffusion import batches
from ..errors import UsageError
from ..latents import Asked
from ..metrics._answers import says
from ..single_layer import Behind, Edit, Point, stepping
from ..targets.base import Chat, DualEncoder, Learner, TextToImage

FORGET, KEEP, TEXTS = 256, 512, 100
"""pictures of each side, and texts they are told from, where only pairs are given"""
ROWS = 256  # pictures that go through a tower together
FIRST = 5_000_000  # the first image seed, far from those that are reported


Found = tuple[float, float, float]
"""forget accuracy and utility in percent, and a finer measure of the utility, higher is better"""


class Scorer(ABC):
    """Forget accuracy and utility of a target, in percent, and how much of the rest is kept."""

    def __init__(self, target: Any) -> None:
        self.target = target

    @abstractmethod
    def now(self) -> Found:
        """Those of the target as it is now."""

    def before(self) -> Found:
        """Those of the target as it was given."""
        return self.now()

    def steps(self, edit: Edit, alphas: Sequence[float]) -> list[Point]:
        """What each step of ``edit`` would do; the weights are as before afterwards."""
        weights, out = self.target.named(), []
        for a in alphas:
            with edit.at(weights, a), torch.no_grad():
                out.append(Point(a, *self.after(edit)))
        return out

    def after(self, edit: Edit) -> Found:
        """Those while ``edit`` is applied."""
        return self.now()


def scorer(target: Target, task: Task, top: int, pictures: int) -> Scorer:
    """The scorer of a target's family; ``top``: an answer counts when it is among the first ``top`` names."""
    if isinstance(target, DualEncoder):
        return Dual(target, task, top)
    if isinstance(target, TextToImage):
        return Drawn(target, task, pictures)
    if isinstance(target, Chat):
        return Asking(target, task)
    return Labelled(target, task)


def doubt(task: Task, p: Point, ta: float, tolerance: float) -> str:
    """What the run record says of a step that forgets too little or costs too much."""
    return (
        f"no step forgot {', '.join(task.concepts)} at a cost of at most {tolerance:g} points: the best leaves a forget "
        f"accuracy of {p.fa:.0f} % and takes utility from {ta:.1f} to {p.ta:.1f} %; try a higher top, evaluations or tolerance"
    )


# --- dual encoders ------------------------------------------------------------------------------------------------
@dataclass
class Shown:
    """Pictures, the texts they are told from (F ways to say each of K names), and which name is right."""

    x: Tensor
    """uint8 (n, 3, side, side)"""
    names: list[list[str]]
    y: Tensor
    """(n,)"""
    forget: bool
    seen: Tensor = field(init=False)
    """what the vision tower pools of them (n, W) before any edit"""
    read: Tensor = field(init=False)
    """what the text tower pools of the names (K F, W)"""
    V: Tensor = field(init=False)
    """embeddings (n, D) before any edit"""
    T: Tensor = field(init=False)
    """of the names (K, D)"""


class Dual(Scorer):
    """Zero-shot naming, or, where only pairs are given, finding a picture's text among others.

    Finer is 100 times the mean cosine of the pictures that stay with their own text: it falls long before another text is nearer.
    """

    def __init__(self, target: Any, task: Task, top: int) -> None:
        super().__init__(target)
        self.top, self.sets = top, [*self._named(task)] or [*self._paired(task)]
        with torch.no_grad():
            for s in self.sets:
                s.seen, s.read = self._seen(s), self._read(s)
                s.V, s.T = self._projected(s, s.seen, s.read)

    def _named(self, task: Task) -> list[Shown]:
        if not task.holdout.source:
            return []
        held = replace(task.holdout, split="validation")
        out = []
        for data in (held, *(replace(u, split="validation") for u in task.utility)):
            found: Examples = self.target.open(replace(data, rows=""))
            forms = found.forms or self.target.forms
            names = [[f.format(c.replace("_", " ")) for f in forms] for c in (*found.classes, *found.extra)]
            gone = torch.tensor(forgotten(found.classes, task))[found.labels]
            for forget in (True, False):
                rows = (gone == forget).nonzero().flatten()
                if len(rows):
                    x, y = found.raw(rows)
                    out.append(Shown(x, names, y.cpu(), forget))
        return out

    def _paired(self, task: Task) -> list[Shown]:
        forget, retain = self.target.forgotten(task, Asked()), self.target.retained(task, Asked())
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(retain), generator=generator)[:KEEP]
        texts = list(dict.fromkeys(retain.texts[i] for i in rows.tolist()))[:TEXTS]
        rows = torch.tensor([i for i in rows.tolist() if retain.texts[i] in texts])
        gone = torch.randperm(len(forget), generator=generator)[:FORGET]
        said, known = [[c] for c in task.concepts], [[t] for t in texts]
        which = [_which(forget.texts[i], task.concepts) for i in gone.tolist()]
        x_f, x_r = forget.raw(gone)[0], retain.raw(rows)[0]
        own = torch.tensor([texts.index(retain.texts[i]) for i in rows.tolist()])
        return [
            Shown(x_f, [*said, *known], torch.tensor(which), True),
            Shown(x_r, known, own, False),
        ]

    def before(self) -> Found:
        return self._percent([s.V for s in self.sets], [s.T for s in self.sets])

    def now(self) -> Found:
        return self._percent(*zip(*(self._projected(s, self._seen(s), self._read(s)) for s in self.sets), strict=True))

    def after(self, edit: Edit) -> Found:
        """A tower that is left alone pools what it did before."""
        vision, text = (any(n.startswith(f"{t}.") for n in edit.names) for t in ("vision_tower", "text_encoder"))
        both = (self._projected(s, self._seen(s) if vision else s.seen, self._read(s) if text else s.read) for s in self.sets)
        return self._percent(*zip(*both, strict=True))

    def _seen(self, s: Shown) -> Tensor:
        return torch.cat([self.target.seen(s.x[part].float() / 255) for part in batches(len(s.x), ROWS)])

    def _read(self, s: Shown) -> Tensor:
        read: Tensor = self.target.read([t for ways in s.names for t in ways])
        return read

    def _projected(self, s: Shown, seen: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        return self.target.project("visual", seen), self._mean(self.target.project("text", read), s)

    def steps(self, edit: Edit, alphas: Sequence[float]) -> list[Point]:
        at = re.match(r"(vision_tower|text_encoder)\.(.*encoder)\.layers\.(\d+)\.(.+)\.weight$", edit.names[0])
        module = self.target.modules[at[1]].get_submodule(f"{at[2]}.layers.{at[3]}.{at[4]}") if at else None
        if at is None or len(edit.names) > 1 or not isinstance(module, nn.Linear):
            return super().steps(edit, alphas)
        behind = Behind(self.target.modules[at[1]].get_submodule(at[2]), int(at[3]))
        unit, a = edit.units[edit.names[0]], torch.tensor(list(alphas))
        with torch.no_grad():
            run = self._pictures if at[1] == "vision_tower" else self._texts
            found = [run(s, behind, module, unit, a) for s in self.sets]  # (K alphas, …, D) of each set
        out = []
        for i, alpha in enumerate(alphas):
            V = [f[i] for f in found] if at[1] == "vision_tower" else [s.V for s in self.sets]
            T = [s.T for s in self.sets] if at[1] == "vision_tower" else [f[i] for f in found]
            out.append(Point(alpha, *self._percent(V, T)))
        return out

    def _pictures(self, s: Shown, behind: Behind, module: nn.Linear, unit: Tensor, a: Tensor) -> Tensor:
        """Embeddings (A, n, D) of the pictures under each step."""
        rows = []
        for part in batches(len(s.x), max(1, ROWS // len(a))):
            x = s.x[part].float() / 255
            states, n = behind.record(partial(self.target.images, x)), len(x)
            with behind.skipping(states.repeat(len(a), 1, 1)), stepping(module, unit, a.repeat_interleave(n)):
                found = self.target.images(x[:1].expand(n * len(a), *x.shape[1:]))
            rows.append(found.view(len(a), n, -1))
        return torch.cat(rows, 1)

    def _texts(self, s: Shown, behind: Behind, module: nn.Linear, unit: Tensor, a: Tensor) -> Tensor:
        """Embeddings (A, K, D) of the names under each step."""
        said = [t for ways in s.names for t in ways]
        rows = []
        for part in batches(len(said), max(1, ROWS // len(a))):
            ids = {k: v.to(self.target.device) for k, v in self.target.tokenize(said[part]).items()}
            n = len(said[part])
            tower: Any = self.target.modules["text_encoder"]
            states = behind.record(partial(tower, **ids))
            with behind.skipping(states.repeat(len(a), 1, 1)), stepping(module, unit, a.repeat_interleave(n)):
                pooled = tower(**{k: v.repeat(len(a), 1) for k, v in ids.items()}).pooler_output
            rows.append(self.target.project("text", pooled).view(len(a), n, -1))
        found = torch.cat(rows, 1)
        return torch.stack([self._mean(f, s) for f in found])

    def _mean(self, found: Tensor, s: Shown) -> Tensor:
        """One embedding (K, D) for each name from those of all ways to say it."""
        return F.normalize(found.view(len(s.names), -1, found.shape[-1]).mean(1), dim=-1)

    def _percent(self, V: Sequence[Tensor], T: Sequence[Tensor]) -> Found:
        gone: list[float] = []
        kept: list[float] = []
        near: list[float] = []
        for s, v, t in zip(self.sets, V, T, strict=True):
            cosines = (v @ t.T).cpu()  # (n, K)
            first = cosines.topk(min(self.top if s.forget else 1, len(t)), dim=1).indices
            (gone if s.forget else kept).append((first == s.y[:, None]).any(1).float().mean().item() * 100)
            if not s.forget:
                near.append(100 * cosines.gather(1, s.y[:, None]).mean().item())
        if not kept or not gone:
            raise UsageError("there are no pictures to tell by whether the concept is gone and the rest is not; give pictures of both")
        return sum(gone) / len(gone), sum(kept) / len(kept), sum(near) / len(near)


def _which(text: str, concepts: Sequence[str]) -> int:
    return next((i for i, c in enumerate(concepts) if c.lower() in text.lower()), 0)


# --- models that draw, answer or classify -----------------------------------------------------------------------------
class Drawn(Scorer):
    """What the task's judge finds in pictures drawn from seeds of their own, half as many of the concept as of the rest.

    The prompts are those that forgetting is reported on. Finer is 100 times 1 less the mean distance of the rest's pixels from those
    before the edit.
    """

    first: Tensor | None = None
    """the pictures of the rest before any edit (m, 3, H, W)"""

    def __init__(self, target: TextToImage, task: Task, pictures: int) -> None:
        super().__init__(target)
        self.task, self.judge = task, judges.load(task.judge)
        asked = [p for p in task.probes if task.names_concept(p)]
        others = [p for p in task.probes if not task.names_concept(p) and task.axis in p.truth]
        if not asked or not others:
            raise UsageError(f"task '{task.name}' has no prompts of the concept, or none of its neighbours; add probes of both")
        n, m = max(1, pictures // 3), max(1, pictures - pictures // 3)
        self.probes = [asked[i % len(asked)] for i in range(n)] + [others[i * len(others) // m] for i in range(m)]

    def now(self) -> Found:
        seeds = range(FIRST, FIRST + len(self.probes))
        images = self.target.sample([p.prompt for p in self.probes], seeds, steps=min(10, self.target.sampler["steps"]))
        rest = images[[i for i, p in enumerate(self.probes) if not self.task.names_concept(p)]]
        self.first = rest if self.first is None else self.first
        domains = {d: self.judge.labels(images, self.task, d) for d in {d for p in self.probes for d in p.truth}}
        gone = [domains[self.task.axis][i] == p.truth[self.task.axis] for i, p in enumerate(self.probes) if self.task.names_concept(p)]
        kept = [domains[d][i] == t for i, p in enumerate(self.probes) if not self.task.names_concept(p) for d, t in p.truth.items()]
        near = 100 * (1 - (rest - self.first).abs().mean().item())
        return 100 * sum(gone) / len(gone), 100 * sum(kept) / len(kept), near


class Asking(Scorer):
    """Whether the names of what is shown are in the answers to ``task.question``. There is no finer measure."""

    def __init__(self, target: Chat, task: Task) -> None:
        super().__init__(target)
        if not task.holdout.source:
            raise UsageError("a model that answers is asked about named pictures; give a folder of one folder per name, with --test")
        found = target.open(replace(task.holdout, split="validation", rows=""))
        self.names = [found.classes[i] for i in found.labels.tolist()]
        self.images, self.task = found.images.float() / 255, task

    def now(self) -> Found:
        said = self.target.answer(self.images, [self.task.question] * len(self.names))
        right = [says(text, [name], substring=False) for name, text in zip(self.names, said, strict=True)]
        gone = [r for r, n in zip(right, self.names, strict=True) if n in self.task.concepts]
        kept = [r for r, n in zip(right, self.names, strict=True) if n not in self.task.concepts]
        return 100 * sum(gone) / max(1, len(gone)), 100 * sum(kept) / max(1, len(kept)), 0.0


class Labelled(Scorer):
    """A classifier's accuracy on what is to be forgotten and, as far as it goes, on pictures it did not train on.

    Finer is the mean probability of the right class of the latter, in percent.
    """

    def __init__(self, target: Any, task: Task) -> None:
        super().__init__(target)
        held = task.retain if not task.retain.validation else replace(task.retain, split="validation")
        self.parts = [self._some(target, task.forget, FORGET), self._some(target, held, KEEP)]

    def _some(self, target: Learner, data: Data, n: int) -> Examples:
        found: Any = target.open(data)
        some: Examples = found.only(torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:n])
        return some

    def now(self) -> Found:
        found = [self.target.predict(p) for p in self.parts]
        fa, ta = (100 * (logits.argmax(1) == y).float().mean().item() for logits, y in found)
        logits, y = found[1]
        return fa, ta, 100 * logits.float().softmax(1).gather(1, y[:, None]).mean().item()
