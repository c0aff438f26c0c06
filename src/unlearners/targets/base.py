"""The verbs of trainable and of diffusion targets: what methods, attacks and metrics may ask of one."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..base import Adversarial, Data, Relabel, Target, Task
from ..data import Examples, open_data
from ..diffusion import Cond, Soft
from ..errors import UnlearnError, UsageError
from ..latents import Asked, Latents
from ..noise_process import NoiseProcess


def described(file: Path) -> dict[str, Any]:
    """What a JSON file says of a model; {} when it is missing or damaged, so that no family claims it by this file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Names(Target):
    """A model that ties what it sees or draws to names: a classifier, a dual encoder, one that draws texts or answers questions."""


class Recogniser(Names):
    """A model that tells pictures by name: a classifier or a dual encoder."""


@lru_cache(maxsize=64)
def hub_config(spec: str, name: str = "config.json") -> dict[str, Any]:
    """``described`` of a file of a local folder, or of a hub repository when ``spec`` is the id of one; {} where it has none."""
    if Path(spec).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        return described(Path(spec, name))
    from huggingface_hub import hf_hub_download

    try:
        return described(Path(hf_hub_download(spec, name)))
    except Exception:  # not there, no network, no access: then no family claims it by this file
        return {}


def tiny_tokenizer(folder: Path) -> Any:
    """A ``CLIPTokenizer`` of single characters, 24 positions; its files are written to ``folder``."""
    from transformers import CLIPTokenizer

    alphabet = [chr(c) for c in range(33, 127)]
    words = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24, pad_token="<|endoftext|>")
    tokenizer.model_max_length = 24
    return tokenizer


class Learner(Target):
    """A model that can be taught from examples: right ones by ``loss``, wrong ones by ``loss`` of ``relabel``."""

    recipe: ClassVar[str] = ""
    """the preset in which a method keeps what is published for this family: "classifier", "ddpm", "sd", "clip" …"""
    training: ClassVar[Mapping[str, Any]] = {}
    """the value of an "auto" field ("batch", "lr", "optimizer" …) where that preset has none; a field that is missing has to be set"""

    @abstractmethod
    def open(self, data: Data) -> Examples | Latents:
        """The examples ``data`` names, as this family reads them; ``UsageError`` when there are none."""

    def forgetting(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss that ascent raises to forget, a scalar: ``loss``, unless a family has another."""
        return self.loss(batch)

    def forgotten(self, task: Task, asked: Asked) -> Examples | Latents:
        """The examples to forget. A family that draws may make what the task does not name, as ``asked`` says."""
        return self.open(task.forget)

    def retained(self, task: Task, asked: Asked) -> Examples | Latents:
        """The examples that stay; see ``forgotten``."""
        return self.open(task.retain)

    def train(self, norm: Literal["update", "freeze"] = "update") -> None:
        """Training mode; with ``norm="freeze"`` batch normalisation goes on using its running statistics and keeps them."""
        for module in self.modules.values():
            module.train()
            for m in module.modules():
                if norm == "freeze" and isinstance(m, _BatchNorm):
                    m.eval()


class Trainable(Learner):
    """A model of labelled pictures: a classifier or class-conditional diffusion."""

    classes: tuple[str, ...]
    """the names of its classes, in order"""
    augmentation: ClassVar[str] = "crop-flip"
    """of training batches, where neither the data nor the model's record says another: a classifier is to stand shifts, and a generator
    would learn to draw their borders"""
    side: int
    """height and width of its pictures"""
    trained_on: Mapping[str, Any]
    """{"source", "digest", "seed", "validation", "subset", "augment"} of its training; empty when nobody wrote it down"""
    amp: torch.dtype
    """what the network computes in, under autocast; its weights are float32"""
    warnings: list[str]

    @abstractmethod
    def reset(self) -> None:
        """Put fresh random weights in place of the trained ones, drawn from the global generator."""

    def open(self, data: Data) -> Examples:
        """The pictures ``data`` names, on the model's device, with the subset and the augmentation it was trained with unless ``data`` says
        others.

        Raises ``UsageError`` when there are none or when they have classes that the model has not. Notes it in ``warnings`` when
        the training pictures are not those that the model says it was trained on, or are divided otherwise.
        """
        examples = open_data(data, self.side, self.device, self.augmentation)
        if len(examples.classes) > len(self.classes):
            raise UsageError(
                f"{data.source} labels pictures 0 to {len(examples.classes) - 1} and this model has classes 0 to {len(self.classes) - 1}; "
                "give the data it was trained on"
            )
        known = self.trained_on.get("digest")
        if data.split == "train" and known and known != examples.digest:
            said = f"{data.source} is not the data that this model was trained on (their hashes differ), so it may know nothing of it"
            self._warn(said)
        return self._as_trained(data, examples) if data.split == "train" and known == examples.digest else examples

    def _as_trained(self, data: Data, examples: Examples) -> Examples:
        """``examples`` of the very pictures the model was trained on, with the subset and the augmentation of its training."""
        known = self.trained_on
        if known.get("subset") and not data.subset:
            data = replace(data, subset=int(known["subset"]))
            examples = open_data(data, self.side, self.device, self.augmentation)
        if data.augment == "auto":  # a record without an entry is of a time when the family alone decided
            examples = replace(examples, augmentation=str(known.get("augment", self.augmentation)))
        asked, was = (_split(d.get("validation", 0), d.get("subset", 0), d.get("seed", 0)) for d in (vars(data), known))
        if "validation" in known and asked != was:
            self._warn(
                f"the model was trained on another part of {data.source} ({was}) than the task divides ({asked}), so it never saw some of "
                "the pictures; give the task the model's seed, validation share and subset"
            )
        return examples

    def _warn(self, said: str) -> None:
        if said not in self.warnings:
            self.warnings.append(said)

    def relabel(self, batch: Mapping[str, Any], policy: Relabel = "other") -> Mapping[str, Any]:
        """``batch`` with wrong labels. other: uniform over y' != y (SalUn's paper); any: uniform over all, so 1 in K stays right
        (its code); next: y + 1 modulo K."""
        return {**batch, "y": self.wrong(batch["y"], policy)}

    def wrong(self, y: Tensor, policy: Relabel) -> Tensor:
        """Labels (B,) for labels (B,)."""
        k = len(self.classes)
        if policy == "any":
            return torch.randint(k, y.shape).to(y.device)
        shift = torch.ones(y.shape, dtype=torch.long) if policy == "next" else torch.randint(1, k, y.shape)
        return (y + shift.to(y.device)) % k


def _split(validation: float, subset: int, seed: int) -> str:
    """How training pictures are divided; the seed plays no part where all are taken."""
    return f"validation {validation:g}, subset {subset}, seed {seed}" if validation or subset else "all of it"


class Denoiser(Target):
    """A model that predicts noise (or v) and samples pictures."""

    latent_shape: tuple[int, int, int]
    process: NoiseProcess
    """how it was taught to see noise; training, inversion and attacks use this and never the sampler"""
    scheduler: Any
    """the diffusers scheduler pictures are sampled with, unless ``sampler`` names another"""
    train_steps: int
    """noise levels of the training schedule, 1000 as a rule"""
    sampler: dict[str, Any]
    """defaults of ``sample``: {"steps", "guidance"}, and "scheduler" where another than the model's own is asked for"""

    @abstractmethod
    def eps(self, x_t: Tensor, t: Any, cond: Cond) -> Tensor:
        """The network's raw prediction (noise, or v) for x_t (B, 4, h, w) at ``t`` (a number or (B,)); same shape."""

    def goal(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What ``eps`` is trained to equal, as the noise process has it: the noise, or v = a noise - s x_0."""
        return self.process.goal(x_0, noise, t)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a(t) x_0 + s(t) noise; all (B, 4, h, w), ``t`` (B,). The sampler in use has no part in it."""
        return self.process.noised(x_0, noise, t)

    def null(self, n: int = 1) -> Cond:
        """Unconditional conditioning (n rows), which guidance starts from: the empty prompt, unless a family has another."""
        return self.encode([""]).repeat(n)

    @abstractmethod
    def encode(self, prompts: Any, soft: Soft | None = None) -> Cond:
        """Conditioning of prompts (strings) or of token ids (B, L), with ``soft`` embeddings put in; differentiable."""

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[str] | Cond,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        batch: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] on the CPU, one for each prompt and seed; the same on any batch size up to rounding.

        ``scheduler`` names a sampler ("lms", "euler" …) in place of the model's own. Raises ``UnlearnError`` when a picture is not finite.
        """

    def shown(self, out: Tensor, seeds: Sequence[int]) -> Tensor:
        """Pictures in [-1, 1], as a decoder gives them, in [0, 1] on the CPU; ``UnlearnError`` when one is not finite."""
        if bad := (~torch.isfinite(out).flatten(1).all(1)).nonzero().flatten().tolist():
            raise UnlearnError(
                f"the picture of seed {seeds[bad[0]]} is not finite in {str(out.dtype).removeprefix('torch.')} and cannot be judged; "
                "use --dtype float32 or bfloat16, or check the model's weights"
            )
        return (out.float() / 2 + 0.5).clamp(0, 1).cpu()


class TextToImage(Denoiser, Names):
    """A text-to-image pipeline such as Stable Diffusion: a denoiser conditioned on text."""

    special: set[int]
    """ids of start, end and padding tokens"""
    vocabulary: int
    """number of token ids"""

    @abstractmethod
    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Padded token ids (B, L) of the first text encoder."""

    @abstractmethod
    def decode(self, ids: Tensor) -> str:
        """The text of token ids, without special tokens."""

    @abstractmethod
    def embed(self) -> Tensor:
        """The token-embedding table (V, D) of the first text encoder."""

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Scaled posterior mean (B, 4, h, w) of pictures (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def replay(self, proposals: Sequence[Adversarial], seeds: Sequence[int], *, guidance: float | None = None) -> Tensor:
        """Pictures (B, 3, H, W) for adversarial inputs, at the level each one gives; with the sampler's guidance when None.

        Start noise is denoised along the noise process (DDIM) without a text, in as many steps as ``sampler`` says: the conditioning is
        ``null``, so guidance has nothing to guide.
        """

    @abstractmethod
    def spell(self, adversarial: Adversarial) -> str:
        """How a report writes an adversarial input."""


class DualEncoder(Learner, Recogniser):
    """A model of pictures and texts in one space: CLIP and its kin."""

    side: int
    """height and width of its pictures"""

    @abstractmethod
    def open(self, data: Data) -> Examples:
        """The pictures ``data`` names with a text for each; ``UsageError`` when there are none."""

    @abstractmethod
    def images(self, x: Tensor) -> Tensor:
        """Unit embeddings (B, D) of pictures (B, 3, H, W) in [0, 1]; differentiable."""

    @abstractmethod
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings (B, D) of texts; differentiable."""

    @abstractmethod
    def predict(self, examples: Examples, batch: int = 256) -> tuple[Tensor, Tensor]:
        """Cosines (n, K) of each picture with each class and then each of ``examples.extra``, and labels (n,), on the CPU; (n, 1) with its
        own text where classes have no names."""


class Chat(Names):
    """A model that answers questions about a picture, such as LLaVA."""

    side: int
    """height and width of its pictures"""

    @property
    @abstractmethod
    def reached(self) -> frozenset[str]:
        """The vision tower's weights, as "vision_tower.parameter", that answers depend on."""

    @abstractmethod
    def answer(self, images: Tensor, questions: Sequence[str], *, tokens: int = 16, batch: int = 32) -> list[str]:
        """Its answer to each question about each picture (B, 3, H, W) in [0, 1]: greedy, at most ``tokens`` new tokens."""
