"""The two sides of SLUG on every family: whose gradients are taken, of which weights, on which examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .. import config, keep, latents, patch, saliency, single_layer
from ..base import Target, Task
from ..data import Examples
from ..errors import UsageError
from ..latents import Asked
from ..targets import load
from ..targets.base import Chat, DualEncoder, Learner, TextToImage

KNOWN = dict.fromkeys(("canvas", "canvas-finetuned", "canvas-llava"), "canvas-clip") | dict.fromkeys(("tiny", "tiny-llava"), "tiny-clip")
"""the CLIP whose towers the package's own models hold"""
SMALLEST = 1e-4  # a retain loss below this has no gradient to speak of


class Answers:
    """A model that answers, as the source of its own gradients: its loss on what it now says when ``task.question`` is asked."""

    def __init__(self, target: Chat, task: Task) -> None:
        self.target, self.question = target, task.question
        self.device, self.modules, self.named, self.base = target.device, target.modules, target.named, target.base

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        asked = [self.question] * len(batch["x"])
        said = self.target.answer(batch["x"], asked)
        found: Tensor = self.target.loss({"x": batch["x"], "prompt": asked, "answer": said})
        return found

    forgetting = loss

    def forgotten(self, task: Task, asked: Asked) -> Examples:
        found: Examples = self.target.open(task.forget)
        return found

    def retained(self, task: Task, asked: Asked) -> Examples:
        found: Examples = self.target.open(task.retain)
        return found


@dataclass
class Sides:
    """What gradients are taken of. ``theta`` has the names of the target and, where that holds one tower, the CLIP's tensors."""

    target: Any
    source: Any
    task: Task
    theta: dict[str, Tensor]
    pictures: int
    pairs: int

    @property
    def towers(self) -> list[str]:
        return sorted({n.partition(".")[0] for n in self.theta})

    def forget(self, task: Task) -> Examples:
        """The examples of one concept; a pipeline draws them where the task has none."""
        if isinstance(self.target, TextToImage) and not task.forget.source:
            return self._drawn(task.said, self.pictures)
        return self._some(self.source.forgotten(task, Asked(pictures=self.pictures)))

    def kept(self) -> Examples:
        """The retained examples."""
        if isinstance(self.target, TextToImage) and not self.task.retain.source:
            return self._drawn(latents.staying(self.task, Asked()), 2 * self.pictures)
        return self._some(self.source.retained(self.task, Asked()))

    def _some(self, found: Examples) -> Examples:
        """At most ``pairs`` of them, if that is not 0."""
        if not 0 < self.pairs < len(found):
            return found
        return found.only(torch.randperm(len(found))[: self.pairs].sort().values)

    def _drawn(self, prompts: tuple[str, ...], n: int) -> Examples:
        said = [prompts[i % len(prompts)] for i in range(n)]
        pairs: Examples = self.source.pairs(self.target.sample(said, range(latents.SEED, latents.SEED + n)), said)
        return pairs

    def retained(self, batch: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """r_l of every candidate, from the cache where this model and data were seen before, and {"cached_seconds"} then.

        Raises ``UsageError`` for captions that are all alike and for a loss so small that its gradient is rounding.
        """
        D_r = self.kept()
        if isinstance(self.source, DualEncoder) and len(set(D_r.texts)) < 2:
            raise UsageError("the retained pictures all have the same caption, so nothing can be told apart; give captions of their own")
        about = [patch.fingerprint(self.source.modules), D_r.digest, D_r.indices.tolist(), list(self.theta), batch]
        key = config.content_hash([*about, self.source.question] if isinstance(self.source, Answers) else about)
        path, started, total = keep.place("gradients", key), perf_counter(), [0.0, 0]
        if (found := keep.read(path, key)) is not None:
            tensors, noted = found
            return {n: t.to(self.source.device) for n, t in tensors.items()}, {"cached_seconds": float(noted["seconds"])}

        def loss(b: Mapping[str, Any]) -> Tensor:
            value: Tensor = self.source.loss(b)
            total[0] += value.item() * len(b["x"])
            total[1] += len(b["x"])
            return value

        r = saliency.mean(self.theta, loss, D_r.batches(batch))
        if (mean := total[0] / total[1]) < SMALLEST:
            raise UsageError(
                f"the loss of the retained examples is {mean:.1g}, so its gradient says nothing; raise batch, or give more of them"
            )
        keep.write(path, key, {n: t.cpu().contiguous() for n, t in r.items()}, seconds=str(perf_counter() - started))
        return r, {}


def sides(target: Target, task: Task, clip: str, params: str, *, loss: str = "clip", norms: bool, pictures: int, pairs: int) -> Sides:
    """The sides of ``target``: its own, or for a pipeline or LLaVA those of the CLIP that its tower is from, unless ``loss`` is answers.

    Raises ``UsageError`` when no CLIP is known, when it has other weights than the target's tower, and when no candidate is left.
    """
    lends = isinstance(target, TextToImage | Chat)
    if not lends and not isinstance(target, Learner):
        raise UsageError(f"slug needs examples with labels or texts, and a {type(target).__name__} reads none; use another method")
    source: Any = target
    if isinstance(target, Chat) and loss == "answers":
        source = Answers(target, task)
    elif lends:
        source = load(_clip(target, clip), device=str(target.device))
    own = {patch.hub_key(n): p for n, p in source.named().items()}
    used = target.reached if isinstance(target, Chat) else None
    theta: dict[str, Tensor] = {}
    for n, p in target.select(params).items():
        if (lends and not n.startswith(("text_encoder.", "vision_tower."))) or (used is not None and n not in used):
            continue
        twin = own.get(patch.hub_key(n))
        if twin is not None and twin.shape != p.shape:
            raise UsageError(
                f"'{n}' is {tuple(p.shape)} here and {tuple(twin.shape)} in {source.base['name']}; give the CLIP it is from as clip"
            )
        if twin is not None:
            theta[n] = twin
    names = single_layer.candidates(theta, norms=norms)
    if not names:
        raise UsageError(
            f"'{params}' leaves no weight that this model uses and that may be edited; name a group such as full, text or vision"
        )
    for n in names:
        theta[n].requires_grad_()
    return Sides(target, source, task, {n: theta[n] for n in names}, pictures, pairs)


def _clip(target: Any, clip: str) -> str:
    if clip or (known := KNOWN.get(target.base["name"], "")):
        return clip or known
    if isinstance(target, Chat):
        return "openai/clip-vit-large-patch14-336"
    width = target.modules["text_encoder"].config.hidden_size
    found = {768: "openai/clip-vit-large-patch14", 1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}.get(width)
    if found is None:
        raise UsageError("it is not known which CLIP this text encoder is from; give its folder or hub id as clip")
    return found


def each(task: Task) -> list[Task]:
    """A task for each concept: its own rows, of "caption=a,b" or "class=a,b", and its own prompts."""
    if len(task.concepts) == 1:
        return [task]
    key, _, value = task.forget.rows.partition("=")
    rows = [v.strip() for v in value.split(",")] if value else []
    if task.forget.source and len(rows) != len(task.concepts):
        raise UsageError(f"{len(task.concepts)} concepts need as many kinds of rows; write for example caption={','.join(task.concepts)}")
    out = []
    for i, c in enumerate(task.concepts):
        forget = replace(task.forget, rows=f"{key}={rows[i]}") if rows else task.forget
        prompts = tuple(p for p in task.prompts if c in p)
        anchors = (task.anchor(i),) if task.anchors else ()
        out.append(replace(task, concepts=(c,), anchors=anchors, prompts=prompts, forget=forget))
    return out
