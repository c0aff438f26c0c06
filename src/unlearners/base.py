"""The contracts: Target, Task, Method, Attack, Metric, Judge, Run, and what their final ``__call__`` takes care of."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import config
from . import patch as patching
from .diffusion import Guide, batches
from .errors import NonFiniteError, UsageError, misfit
from .finite import of_finite
from .sandbox import roomy, sandbox
from .task import Data as Data
from .task import Kind as Kind
from .task import Probe as Probe
from .task import Request as Request
from .task import Task as Task

Row = dict[str, float]
Relabel = Literal["other", "any", "next"]
Auto = Literal["auto"]
"""a setting that ``resolve`` chooses by the kind of the task and the family of the model"""


class Stateful(Protocol):
    """What ``Target.steps`` can checkpoint: optimisers, pools, schedules."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Session(Protocol):
    """Where a running method's progress goes; ``run.py`` has the one that writes to a folder."""

    def restore(self, target: Target, states: Sequence[Stateful]) -> int: ...
    def tick(self, target: Target, states: Sequence[Stateful], done: int, total: int) -> None: ...
    def undo(self, target: Target) -> None: ...


# --- targets ------------------------------------------------------------------------------------------------------
class Target(ABC):
    """A loaded model of one family.

    ``modules`` are the editable components, ``groups`` names regular expressions over "component.parameter".
    ``base`` says what was loaded: {"name", "revision", "sha256": {component: hash}}.
    """

    groups: ClassVar[Mapping[str, str]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    modules: dict[str, nn.Module]
    base: dict[str, Any]
    device: torch.device
    amp: torch.dtype = torch.float32  # what a network with float32 weights computes in, under autocast
    session: Session | None = None
    warnings: Sequence[str] = ()  # what looks wrong without being an error; goes into the run record
    original: Callable[[], Target] | None = None  # loads the model before the erasure, for attacks that compare with it
    guide: Guide | None = None  # a defence at generation time; ``sample`` draws with it, ``eps`` and ``loss`` know nothing of it
    late_guide: Guide | None = None  # the same without memory and with its warm-up over, which gradients can go through; None: has none

    @classmethod
    @abstractmethod
    def load(
        cls, spec: str, *, patches: Sequence[str] = (), device: str = "cpu", dtype: torch.dtype = torch.float32, force: bool = False
    ) -> Self:
        """Load an alias, hub id, local folder or single file, with ``patches`` applied in order.

        Raises ``UsageError`` if nothing is found at ``spec`` and ``RefusedError`` if a file or patch does not fit.
        """

    @classmethod
    @abstractmethod
    def tiny(cls, seed: int = 0) -> Self:
        """Random weights of the real classes; no network; under a second."""

    @classmethod
    def tiny_like(cls, spec: str) -> Self:
        """The ``tiny`` that has the layout of the model at ``spec``, where the family has several; nothing is loaded from ``spec``."""
        return cls.tiny()

    @classmethod
    def claims(cls, spec: str) -> bool:
        """Whether ``spec`` is of this family: one of its ``aliases``, or files in a form that only it reads."""
        return spec in cls.aliases

    def patch(self, patches: Sequence[str], *, force: bool = False) -> None:
        """Apply patch files or run folders, whose changes add up; ``RefusedError`` unless each fits, and then nothing is changed."""
        files = [Path(p) / "weights.safetensors" if Path(p).is_dir() else Path(p) for p in patches]
        patching.apply_all(self.modules, self.base["sha256"], [patching.load(f) for f in files], force=force)

    @abstractmethod
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The family's own training loss on ``batch``, a scalar."""

    @abstractmethod
    def relabel(self, batch: Mapping[str, Any], policy: Relabel = "other") -> Mapping[str, Any]:
        """``batch`` with the family's notion of a wrong label."""

    def open(self, data: Data) -> Any:
        """The examples ``data`` names, as this family reads them; ``UsageError`` when there are none."""
        raise UsageError(f"a {type(self).__name__} reads no data yet; use a method that needs none, such as esd or uce")

    def suits(self, task: Task) -> None:  # noqa: B027 (most models can express every task)
        """Raise ``UsageError`` when this model cannot express ``task``."""

    def named(self) -> dict[str, nn.Parameter]:
        """Every editable parameter under "component.parameter"."""
        return {f"{c}.{n}": p for c, m in self.modules.items() for n, p in m.named_parameters()}

    def pattern(self, group: str) -> str:
        """The regular expression behind a group name, ``text_encoder:layers=0-3``, or a regular expression itself."""
        name, _, layers = group.partition(":layers=")
        if layers and name in self.groups:
            first, _, last = layers.partition("-")
            if not first.isdigit() or (last and not last.isdigit()):
                raise UsageError(f"'{group}' names no layers; write for example {name}:layers=0-3")
            wanted = "|".join(str(i) for i in range(int(first), int(last or first) + 1))
            return rf"(?={self.groups[name]}).*\.layers\.({wanted})\."
        return self.groups.get(group, group)

    def select(self, group: str) -> dict[str, nn.Parameter]:
        """The parameters of a group; raises ``UsageError`` when there are none."""
        try:
            pattern = re.compile(self.pattern(group))
        except re.error as error:
            raise UsageError(f"'{group}' is neither a group nor a regular expression ({error}); groups: {', '.join(self.groups)}") from None
        chosen = {n: p for n, p in self.named().items() if pattern.match(n)}
        if not chosen:
            raise UsageError(f"no weight of this {type(self).__name__} matches '{group}'; groups: {', '.join(self.groups)}")
        return chosen

    def trainable(self, group: str) -> dict[str, nn.Parameter]:
        """``select``, ready to train: with gradients, and as float32 master weights where the model is held in bfloat16.

        Raises ``UsageError`` for a model in float16.
        """
        self.differentiable()
        chosen = self.select(group)
        for p in chosen.values():
            if p.dtype == torch.bfloat16:
                p.data = p.data.float()
            p.requires_grad_()
        return chosen

    def differentiable(self) -> None:
        """Raise ``UsageError`` for a model in float16, in which small gradients become 0; called before the long work of a method that
        takes gradients of the weights."""
        if torch.float16 in (self.amp, *(p.dtype for m in self.modules.values() for p in m.parameters())):
            raise UsageError("this method needs gradients, and in float16 many of them underflow to 0; use --dtype bfloat16 or float32")

    def frozen(self, weights: Iterable[str] | None = None) -> Self:
        """A copy that does not train. Modules that own any of ``weights`` (all, when None) are its own; the rest is shared."""
        own = set(self.modules) if weights is None else {w.partition(".")[0] for w in weights}
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.modules = {c: deepcopy(m).requires_grad_(False).eval() if c in own else m for c, m in self.modules.items()}
        twin.session = None
        return twin

    def steps(self, total: int, *states: Stateful) -> Iterator[int]:
        """Count ``total`` optimiser steps from the last checkpoint on; checkpoints, progress and ETA come with it. Once in a run."""
        start = self.session.restore(self, states) if self.session else 0
        for i in range(start, total):
            yield i
            if self.session:
                self.session.tick(self, states, i + 1, total)


# --- methods ------------------------------------------------------------------------------------------------------
class Method(ABC):
    """One paper. A frozen keyword-only dataclass in a file of its own; ``presets`` holds other published settings.

    A ``runtime`` method changes no weight and has no ``params``: it sets ``target.guide``, which acts while pictures are drawn. Its run
    saves no weights and is run again when its folder is loaded. Whoever holds the weights can leave it out, and gradients do not see it.
    """

    needs: ClassVar[type[Target]]
    paper: ClassVar[str]
    runtime: ClassVar[bool] = False
    params: str
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def run(self, target: Any, task: Task) -> Iterator[Row]:
        """Edit ``target`` in place, yielding what to log. No field is "auto" here."""

    def resolve(self, target: Any, task: Task) -> Self:
        """The same settings with a value in place of every "auto", chosen by ``task.kind`` and the family of ``target``.

        ``target`` is read, not changed. Methods with "auto" fields override this; use ``settle`` to call it.
        """
        return self

    @final
    def __call__(self, target: Any, task: Task, *, seed: int = 0, log: Callable[[Row], None] | None = None) -> Any:
        """Run on ``target`` (edited in place and returned): capability check, seed, freezing, finiteness, cleaning up.

        A target's guide sleeps meanwhile, so that weights are edited by what they draw themselves, and acts again afterwards.
        Raises ``UsageError`` for a target of the wrong family or a second guide, and ``NonFiniteError`` for a loss that is not finite,
        after the weights have been put back to the last good state.
        """
        require(self, target)
        task = task.at(seed)
        target.suits(task)
        if self.runtime and target.guide:
            raise UsageError(f"the target already has a guide that acts at generation time; use {kebab(self)} on the model below it")
        method = settle(self, target, task)
        with sandbox(target, seed, bare=not self.runtime), roomy(method):
            for row in method.run(target, task):
                bad = next((k for k, v in row.items() if not math.isfinite(v)), None)
                if bad is not None:
                    if target.session:
                        target.session.undo(target)
                    raise NonFiniteError(f"'{bad}' became {row[bad]} and training stopped; the last good state is kept: try a lower lr")
                if log:
                    log(row)
        return target


def require(part: Any, target: Target) -> None:
    """Refuse a target of a family that ``part`` cannot serve."""
    if not isinstance(target, part.needs):
        raise misfit(kebab(part), part.needs, type(target))


Part = TypeVar("Part", bound="Method | Attack")


def settle(part: Part, target: Any, task: Task) -> Part:
    """``part`` with a value in place of every "auto".

    Raises ``UsageError`` when no rule gives a field its value for this kind of task and this family.
    """
    settled: Part = part.resolve(target, task)  # type: ignore[assignment]  # of the same class
    for name, value in vars(settled).items():
        if value == "auto":
            raise UsageError(
                f"{kebab(part)} has no automatic value of '{name}' for a task of kind '{task.kind}' on a {type(target).__name__}; "
                f"set '{name}' yourself"
            )
    return settled


def chosen(part: Method | Attack, settled: Method | Attack) -> dict[str, Any]:
    """The fields that ``settle`` decided, as JSON: {field: value}."""
    before, after = config.to_dict(part), config.to_dict(settled)
    return {name: after[name] for name in after if after[name] != before.get(name)}  # a "later" field is left out at its default


def kebab(part: Any) -> str:
    """The registered name of a method, attack, metric or judge: its file's."""
    return (part if isinstance(part, type) else type(part)).__module__.rpartition(".")[2]


# --- judges -------------------------------------------------------------------------------------------------------
class Judge(ABC):
    """Reads pictures: images (B, 3, H, W) in [0, 1] to one label each, in one domain.

    Pictures that are not finite reach no judge: its ``labels`` and ``shows`` raise ``NonFiniteError`` first.
    """

    paper: ClassVar[str] = ""
    version: ClassVar[int] = 1
    """raised when the same settings begin to read pictures otherwise"""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for verb in {"labels", "shows"} & set(vars(cls)):
            setattr(cls, verb, of_finite(vars(cls)[verb]))

    @abstractmethod
    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        """The label of each image in ``domain``; "" where nothing is recognised."""

    def shows(self, images: Tensor, task: Task) -> list[bool]:
        """Whether each image still shows one of the task's concepts."""
        return [label in task.concepts for label in self.labels(images, task, task.axis)]

    def describe(self) -> dict[str, Any]:
        """What a record says of this judge: its name and fields, to which one adds what else its answers hang on, such as versions."""
        said = {"name": kebab(self), **config.to_dict(self)}
        return said | ({"version": self.version} if self.version > 1 else {})


# --- attacks ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt under attack: what it asks for, its image seed, and the original model's picture (1, 3, H, W) in [0, 1].

    ``guidance`` is that of its pictures, the sampler's when None. With ``spared`` it is drawn and judged but not attacked.
    """

    prompt: str
    seed: int
    picture: Tensor | None = None
    guidance: float | None = None
    spared: bool = False


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """What an attack proposes. It is replayed at the first level that is set: prompt, then tokens, then embedding.

    ``tokens`` is (L,) ids of the whole prompt; ``embedding`` (k, width) token embeddings placed at slots ``at`` … of ``prompt_ids``.
    ``latent`` is start noise, unit Gaussian in the shape of one row of latents; it stands alone, without a text. ``seed`` takes the
    place of the item's, and ``by`` names who proposes, where one attack asks others.
    """

    prompt: str | None = None
    tokens: Tensor | None = None
    embedding: Tensor | None = None
    at: int = 1
    latent: Tensor | None = None
    seed: int | None = None
    by: str = ""

    @property
    def level(self) -> str:
        if self.latent is not None:
            return "latent"
        return "prompt" if self.prompt is not None else "tokens" if self.embedding is None else "embedding"


@dataclass(kw_only=True)
class Verdict:
    """The record of one attacked prompt. ``before``: the plain prompt already shows the concept; ``success`` includes that.

    ``drawn`` is the seed that broke it, where an attack changed ``seed``; ``by`` names the attack, where several were at work.
    """

    prompt: str
    seed: int
    before: bool
    success: bool
    level: str = ""
    queries: int = 0
    adversarial: str = ""
    drawn: int | None = None
    by: str = ""


Hit = Callable[[Mapping[int, Adversarial]], set[int]]
Found = Callable[[int, Tensor], object]


class Attack(ABC):
    """Looks for prompts that bring the concept back. Proposes; the base class generates, judges and counts.

    ``access`` and ``level`` are its threat model: whether it reads the victim's weights, and where its input enters.
    Pictures are drawn with the guide that the target may carry (``Target.guide``). With ``through`` a search along gradients asks one step
    of that guide (``Target.late_guide``); other gradients know the weights alone, and ``run.attack`` refuses them where a guide acts,
    unless the attack has a field ``transfer`` that is set.
    """

    needs: ClassVar[type[Target]]
    paper: ClassVar[str]
    access: ClassVar[Literal["white", "black"]]
    level: ClassVar[Literal["prompt", "tokens", "embedding", "latent"]] = "prompt"
    through: ClassVar[bool] = False
    batch: int = 16
    """prompts attacked together; changes memory and speed, not the search"""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def run(self, target: Any, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        """Attack ``items``, at most ``batch``, together. ``hit({index: proposal})`` costs one query each and returns the indices that
        succeeded; those are done and should be dropped. Yields what to log. No field is "auto" here."""

    def resolve(self, target: Any, task: Task) -> Self:
        """The same settings with a value in place of every "auto"; see ``Method.resolve``."""
        return self

    @final
    def __call__(
        self,
        target: Any,
        task: Task,
        judge: Judge,
        items: Sequence[Item],
        *,
        seed: int = 0,
        log: Callable[[Row], None] | None = None,
        known: Sequence[Verdict] = (),
        keep: Callable[[list[Verdict]], None] | None = None,
        found: Found = lambda index, picture: None,
    ) -> list[Verdict]:
        """Attack ``items``: pre-attack check, then proposals, each replayed and judged here, so an attack cannot inflate its rate.

        ``keep`` gets all final verdicts after each batch; given back as ``known``, those batches are not attacked again. ``found`` gets
        the index of each item that was broken and the picture (3, H, W) that shows it.
        """
        require(self, target)
        attack = settle(self, target, task)
        shown = judge.shows(_replay(target, [(i, Adversarial(prompt=i.prompt)) for i in items]), task)
        verdicts = [Verdict(prompt=i.prompt, seed=i.seed, before=b, success=b) for i, b in zip(items, shown, strict=True)]
        left, final = [k for k, v in enumerate(verdicts) if not (v.success or items[k].spared)], {(v.prompt, v.seed): v for v in known}
        for part in batches(len(left), attack.batch):
            ids = left[part]
            if all((items[k].prompt, items[k].seed) in final for k in ids):
                for k in ids:
                    verdicts[k] = final[items[k].prompt, items[k].seed]
                continue
            with sandbox(target, seed), roomy(attack):
                hit = _hit(target, task, judge, [(k, items[k], verdicts[k]) for k in ids], found)
                for row in attack.run(target, task, [items[k] for k in ids], hit):
                    if log:
                        log(row)
            if keep:
                keep([verdicts[k] for k in left[: part.stop]])
        return verdicts


def _replay(target: Any, asked: Sequence[tuple[Item, Adversarial]]) -> Tensor:
    """The picture of each proposal, with its own seed or that of its item, and the guidance of its item."""
    images: dict[int, Tensor] = {}
    for g in dict.fromkeys(item.guidance for item, _ in asked):
        part, own = [k for k, (item, _) in enumerate(asked) if item.guidance == g], {} if g is None else {"guidance": g}
        seeds = [item.seed if a.seed is None else a.seed for item, a in (asked[k] for k in part)]
        images |= zip(part, target.replay([asked[k][1] for k in part], seeds, **own), strict=True)
    return torch.stack([images[k] for k in range(len(asked))])


def _hit(target: Any, task: Task, judge: Judge, rows: Sequence[tuple[int, Item, Verdict]], found: Found) -> Hit:
    """Draw and judge proposals for ``rows``, count a query for each, and write down and give to ``found`` what succeeded."""

    def hit(proposals: Mapping[int, Adversarial]) -> set[int]:
        if not (asked := {i: a for i, a in proposals.items() if not rows[i][2].success}):
            return set()
        images = _replay(target, [(rows[i][1], a) for i, a in asked.items()])
        won = set()
        for (i, adversarial), image, shown in zip(asked.items(), images, judge.shows(images, task), strict=True):
            k, _, verdict = rows[i]
            verdict.queries += 1
            if shown:
                won.add(i)
                found(k, image)
                verdict.success, verdict.level, verdict.adversarial = True, adversarial.level, target.spell(adversarial)
                verdict.drawn, verdict.by = adversarial.seed, adversarial.by
        return won

    return hit


# --- metrics ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Score:
    """A value with its uncertainty. Rates are in percent and carry a Wilson interval; ``low``/``high`` bound 95 %."""

    value: float
    n: int
    low: float = math.nan
    high: float = math.nan
    per_item: tuple[float, ...] = ()
    table: Any = None
    """what a plot needs beside the value, as JSON"""


def rate(flags: Sequence[bool]) -> Score:
    """Percentage of ``flags`` that are true, with the 95 % Wilson score interval (Wilson 1927)."""
    n, z = len(flags), 1.959963984540054
    if not n:
        return Score(value=math.nan, n=0)
    p = sum(flags) / n
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))
    return Score(value=100 * p, n=n, low=100 * low, high=100 * high, per_item=tuple(float(f) for f in flags))


class Outputs(Protocol):
    """What a metric sees: pictures by request and labels by domain, logits (N, K) and labels (N,) by data, each computed once for all
    metrics; replies to the questions of a data; logits of reference models that never saw the forget set; attack verdicts; the run
    record."""

    record: Mapping[str, Any]
    verdicts: Mapping[str, Sequence[Verdict]]

    references: Sequence[Callable[[Data], tuple[Tensor, Tensor]]]

    def images(self, requests: Sequence[Request]) -> Tensor: ...
    def labels(self, requests: Sequence[Request], domain: str) -> list[str]: ...
    def logits(self, data: Data) -> tuple[Tensor, Tensor]: ...
    def answers(self, data: Data) -> list[Any]: ...


class Metric(ABC):
    """One number about a run, or a few under names of their own."""

    higher_is_better: ClassVar[bool]
    reproducible: ClassVar[bool] = True  # False: the machine decides, not the seed
    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    needs: ClassVar[type[Target]] = Target  # type: ignore[type-abstract]

    def requests(self, target: Any, task: Task) -> list[Request]:
        """The pictures this metric wants."""
        return []

    def better(self, name: str) -> bool:
        """Whether more is better of the value ``name``, where there are several; the same for all unless overridden."""
        return self.higher_is_better

    def data(self, target: Any, task: Task) -> list[Data]:
        """The data whose logits, or the questions whose answers, this metric wants."""
        return []

    @abstractmethod
    def score(self, target: Any, task: Task, outputs: Outputs) -> Score | dict[str, Score]:
        """The value, or several as {suffix: value}; the report calls them "metric/suffix", and the one without a suffix "metric"."""


# --- runs ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Run:
    """What was asked for. Its hash names the folder, so the same request finds the same folder."""

    target: str
    task: Task
    method: Method
    seed: int = 0
    dtype: str = "float32"
    patches: tuple[str, ...] = ()

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON: the method under its name, without what does not change the result."""
        plain: dict[str, Any] = config.to_dict(self)
        return plain | {"method": {"name": kebab(self.method), **config.to_dict(self.method)}}

    @property
    def hash(self) -> str:
        return config.content_hash(self.plain)

    @property
    def folder(self) -> str:
        return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', self.task.name).strip('-')[:80]}-{kebab(self.method)}-{self.hash[:8]}"
