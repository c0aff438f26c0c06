"""The two sides of SLUG on every family: whose gradients are taken, of which weights, on which examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
WIDTHS = {
    768: "openai/clip-vit-large-patch14",
    1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    1280: "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
"""the CLIP that a text encoder of this width is from: of Stable Diffusion 1 and XL's first, of Stable Diffusion 2, of XL's second"""
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
class Side:
    """One source of gradients, and what of the target it is for. ``theta`` has the target's names and, where the target holds only one
    tower, the CLIP's tensors."""

    target: Any
    source: Any
    task: Task
    theta: dict[str, Tensor]
    pictures: int
    pairs: int
    drawn: dict[tuple[str, ...], Tensor]
    """pictures that the target drew of prompts; the sides of one target share them"""

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
        said = tuple(prompts[i % len(prompts)] for i in range(n))
        if said not in self.drawn:
            self.drawn[said] = self.target.sample(list(said), range(latents.SEED, latents.SEED + n))
        pairs: Examples = self.source.pairs(self.drawn[said], said)
        return pairs

    def forgotten(self, task: Task, batch: int) -> dict[str, Tensor]:
        """g_l of every candidate."""
        return saliency.mean(self.theta, self.source.forgetting, self.forget(task).batches(batch))

    def retained(self, batch: int, shuffles: int) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
        """r_l of every candidate, once for each way the data are put into batches, and what that took: {"cached_seconds"} where this
        model and data were seen before.

        Only a loss that compares within its batch hangs on who is in it. Its data are shuffled ``shuffles`` times, by the seed of the
        run: in their own order, like would stand beside like, and the loss would mostly tell twins apart.

        Raises ``UsageError`` for captions that are all alike and for a loss so small that its gradient is rounding.
        """
        D_r, seed = self.kept(), torch.initial_seed()
        compares = isinstance(self.source, DualEncoder) and len(D_r) > batch
        if isinstance(self.source, DualEncoder) and len(set(D_r.texts)) < 2:
            raise UsageError("the retained pictures all have the same caption, so nothing can be told apart; give captions of their own")
        about = [patch.fingerprint(self.source.modules), D_r.digest, D_r.indices.tolist(), D_r.texts, list(self.theta), batch]
        about += [shuffles, seed] if compares else []
        key = config.content_hash([*about, self.source.question] if isinstance(self.source, Answers) else about)
        path, started, total = keep.place("gradients", key), perf_counter(), [0.0, 0]
        if (found := keep.read(path, key)) is not None:
            held, noted = found
            tensors = {n: t.to(self.source.device) for n, t in held.items()}
            r = [{n: tensors[f"{k}/{n}"] for n in self.theta} for k in range(len(held) // len(self.theta))]
            return r, {"cached_seconds": float(noted["seconds"])}

        def loss(b: Mapping[str, Any]) -> Tensor:
            value: Tensor = self.source.loss(b)
            total[0] += value.item() * len(b["x"])
            total[1] += len(b["x"])
            return value

        generator = torch.Generator().manual_seed(seed)
        orders = [D_r.only(torch.randperm(len(D_r), generator=generator)) for _ in range(shuffles)] if compares else [D_r]
        r = [saliency.mean(self.theta, loss, ordered.batches(batch)) for ordered in orders]
        if (mean := total[0] / total[1]) < SMALLEST:
            raise UsageError(
                f"the loss of the retained examples is {mean:.1g}, so its gradient says nothing; raise batch, or give more of them"
            )
        held = {f"{k}/{n}": t.cpu().contiguous() for k, found_k in enumerate(r) for n, t in found_k.items()}
        keep.write(path, key, held, seconds=str(perf_counter() - started))
        return r, {}


@dataclass
class Sides:
    """All sources of a target: one, or a CLIP for each text encoder of a pipeline."""

    of: tuple[Side, ...]

    @property
    def theta(self) -> dict[str, Tensor]:
        """Every candidate."""
        return {n: p for side in self.of for n, p in side.theta.items()}

    @property
    def towers(self) -> list[str]:
        return _towers(self.theta)

    def forgotten(self, task: Task, batch: int) -> dict[str, Tensor]:
        """See ``Side.forgotten``."""
        return {n: g for side in self.of for n, g in side.forgotten(task, batch).items()}

    def retained(self, batch: int, shuffles: int) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
        """See ``Side.retained``."""
        found = [side.retained(batch, shuffles) for side in self.of]
        r = [{n: t for part, _ in found for n, t in part[k % len(part)].items()} for k in range(max(len(part) for part, _ in found))]
        cached = [spent["cached_seconds"] for _, spent in found if spent]
        return r, {"cached_seconds": sum(cached)} if cached else {}


def sides(target: Target, task: Task, clip: str, params: str, *, loss: str = "clip", norms: bool, pictures: int, pairs: int) -> Sides:
    """The sides of ``target``: its own, or for a pipeline or LLaVA those of the CLIPs that its towers are from, unless ``loss`` is answers.

    Raises ``UsageError`` when no CLIP is known, when it has other shapes than the target's tower, and when no candidate is left.
    """
    if not isinstance(target, TextToImage | Chat | Learner):
        raise UsageError(f"slug needs examples with labels or texts, and a {type(target).__name__} reads none; use another method")
    used = _used(target)
    chosen = {n: p for n, p in target.select(params).items() if n in used}
    wanted = {n: chosen[n] for n in single_layer.candidates(chosen, norms=norms)}
    if not wanted:
        raise UsageError(
            f"'{params}' leaves no weight that this model uses and that may be edited; name a group such as full, text or vision"
        )
    sources: dict[str, Any] = {"": target}
    if not isinstance(target, TextToImage | Chat) or loss == "answers":  # else the gradients are those of a CLIP in float32
        target.differentiable()
    if isinstance(target, Chat) and loss == "answers":
        sources = {"": Answers(target, task)}
    elif isinstance(target, TextToImage | Chat):
        named = dict(zip(_towers(chosen), clips(target, clip, params).split(","), strict=True))
        loaded = {spec: load(spec, device=str(target.device)) for spec in dict.fromkeys(named.values())}
        target.warnings = [*target.warnings, *(w for s in loaded.values() for w in s.warnings)]
        sources = {tower: loaded[spec] for tower, spec in named.items()}
    drawn: dict[tuple[str, ...], Tensor] = {}
    found = [Side(target, s, task, _twins(s, tower, wanted), pictures, pairs, drawn) for tower, s in sources.items()]
    for p in (p for side in found for p in side.theta.values()):
        p.requires_grad_()
    return Sides(tuple(side for side in found if side.theta))


def _twins(source: Any, tower: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's own tensors for those of ``wanted`` that are of ``tower``; all where that is ""."""
    own = {patch.hub_key(n): p for n, p in source.named().items()}
    theta: dict[str, Tensor] = {}
    for n, p in wanted.items():
        component, _, rest = patch.hub_key(n).partition(".")
        if tower not in ("", component):
            continue
        if tower:
            component = "vision_tower" if component == "vision_tower" else "text_encoder"
            component = "projections" if rest == "text_projection.weight" else component
        if (twin := own.get(f"{component}.{rest}")) is None or twin.shape != p.shape:
            has = "none" if twin is None else str(tuple(twin.shape))
            raise UsageError(f"'{n}' is {tuple(p.shape)} here and {has} in {source.base['name']}; give the CLIP it is from as clip")
        theta[n] = twin
    return theta


def _used(target: Any) -> frozenset[str]:
    """The weights that count among those that a CLIP could lend; all of a model that is its own source."""
    if isinstance(target, Chat):
        return target.reached
    return reached(target) if isinstance(target, TextToImage) else frozenset(target.named())


def reached(target: TextToImage) -> frozenset[str]:
    """The text encoders' weights that the conditioning depends on, as autograd sees it.

    Stable Diffusion XL reads the last layer but one of both encoders, and of the second also what it pools.
    """
    weights = {n: p for n, p in target.named().items() if n.startswith("text_encoder")}
    trained = {n: p.requires_grad for n, p in weights.items()}
    for p in weights.values():
        p.requires_grad_()
    with torch.enable_grad():
        cond = target.encode([""])
    for n, p in weights.items():
        p.requires_grad_(trained[n])
    todo: list[Any] = [t.grad_fn for t in (cond.states, cond.pooled) if t is not None]
    seen, leaves = set(todo), set[int]()
    while todo:
        node = todo.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        behind = {f for f, _ in node.next_functions if f is not None} - seen
        seen |= behind
        todo += behind
    return frozenset(n for n, p in weights.items() if id(p) in leaves)


def _towers(names: Iterable[str]) -> list[str]:
    return sorted({n.partition(".")[0] for n in names})


def clips(target: Any, clip: str, params: str) -> str:
    """The CLIP of each of the towers of a pipeline or LLaVA, separated by commas; "auto" and "" stand for the known ones.

    Raises ``UsageError`` when none is known, and for another number of names than of towers.
    """
    used = _used(target)
    towers = _towers(n for n in target.select(params) if n in used)
    given = [c.strip() for c in clip.split(",")]
    given = given * len(towers) if given[0] in ("", "auto") and len(given) == 1 else given
    if len(given) != len(towers):
        raise UsageError(
            f"clip names {len(given)} and '{params}' chooses from {len(towers)} ({', '.join(towers) or 'no tower of a CLIP'}); name one "
            "for each, separated by commas (auto for the known one), or choose the weights of one with params"
        )
    return ",".join(_known(target, t) if c in ("", "auto") else c for t, c in zip(towers, given, strict=True))


def _known(target: Any, tower: str) -> str:
    if known := KNOWN.get(target.base["name"], ""):
        return known
    if isinstance(target, Chat):
        return "openai/clip-vit-large-patch14-336"
    width = target.modules[tower].config.hidden_size
    if width not in WIDTHS:
        raise UsageError(f"it is not known which CLIP the {tower} of this model is from; give its folder or hub id as clip")
    return WIDTHS[width]


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
