"""The verbs of diffusion targets: what methods, attacks and metrics may ask of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..base import Adversarial, Target
from ..diffusion import Cond, Soft


class Denoiser(Target):
    """A model that predicts noise (or v) and samples pictures."""

    latent_shape: tuple[int, int, int]
    scheduler: Any
    """the diffusers scheduler pictures are sampled with"""
    train_steps: int
    """noise levels of the training schedule, 1000 as a rule"""
    sampler: dict[str, Any]
    """defaults of ``sample``: {"steps", "guidance"}"""

    @abstractmethod
    def eps(self, x_t: Tensor, t: Any, cond: Cond) -> Tensor:
        """The network's raw prediction (noise, or v) for x_t (B, 4, h, w) at ``t`` (a number or (B,)); same shape."""

    @abstractmethod
    def goal(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What ``eps`` is trained to equal: the noise, or v = sqrt(a) noise - sqrt(1 - a) x_0."""

    @abstractmethod
    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise; all (B, 4, h, w), ``t`` (B,)."""

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
        batch: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] on the CPU, one for each prompt and seed; the same on any batch size up to rounding."""


class TextToImage(Denoiser):
    """A denoiser conditioned on text."""

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
    def replay(self, proposals: Sequence[Adversarial], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W) for adversarial inputs, at the level each one gives."""

    @abstractmethod
    def spell(self, adversarial: Adversarial) -> str:
        """How a report writes an adversarial input."""
