"""Class-conditional pixel diffusion: a diffusers ``UNet2DModel`` with class embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .. import diffusion, noise_process, patch, schedulers
from ..base import Relabel
from ..diffusion import Cond, Soft
from ..errors import RefusedError, UsageError, unknown
from ..files import write_json
from ..zoo import canvas
from .base import Denoiser, Trainable, described

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
DDPM_CIFAR = "ddpm_cifar"
"""the network that ``fresh`` makes: DDPM's for CIFAR-10 (Ho et al. 2020, B), with classes; "ddpm_cifar:width=64" is a narrower one"""


class DDPM(Trainable, Denoiser):
    """A UNet from noisy pictures (B, 3, side, side) in [-1, 1], noise level and class to the noise in them.

    The last class embedding is the null class, "no class", which classifier-free guidance needs (Ho & Salimans 2022), unless the
    checkpoint names as many classes as it has embeddings. Prompts are class names; "" is the null class.
    """

    aliases: ClassVar[Mapping[str, str]] = {"canvas-ddpm": str(canvas.FOLDER / "ddpm"), "tiny-ddpm": ""}
    groups: ClassVar[Mapping[str, str]] = {
        "full": r"unet\.",
        "attn": r"unet\..*attentions\.",
        "xattn": r"unet\.(class_embedding|.*time_emb_proj)\.",  # where the class enters, as the text does in cross-attention
    }

    augmentation: ClassVar[str] = "flip"
    recipe: ClassVar[str] = "ddpm"
    training: ClassVar[Mapping[str, Any]] = {
        "steps": 1000, "epochs": 1, "batch": 128, "forget_batch": 128, "lr": 1e-4, "optimizer": "adam", "weight_decay": 0.0, "clip": 1.0,
        "labels": "next", "alpha": 1.0,
    }  # fmt: skip

    def __init__(self, unet: Any, scheduler: Any, about: Mapping[str, Any], name: str, device: str, dtype: torch.dtype) -> None:
        embeddings = unet.config.num_class_embeds or 0
        if embeddings < 2:
            raise UsageError(f"{name} has no class embedding, so no class can be named; use a UNet2DModel with num_class_embeds")
        self.device, self.amp, self.scheduler = torch.device(device), dtype, scheduler
        self.modules = {"unet": unet.to(self.device).to(memory_format=torch.channels_last).requires_grad_(False).eval()}
        labels = about.get("id2label") or {}
        self.classes = tuple(labels[str(i)] for i in range(len(labels))) or tuple(str(i) for i in range(embeddings - 1))
        self.null_class = embeddings - 1 if len(self.classes) < embeddings else None
        self.trained_on, self.warnings = dict(about.get("trained_on") or {}), []
        self.side = unet.config.sample_size
        self.latent_shape = (unet.config.in_channels, self.side, self.side)
        self.process = noise_process.of_scheduler(scheduler, pixels=True)
        self.train_steps = self.process.train_steps
        self.sampler = dict(about.get("sampler") or {"steps": 50, "guidance": 3.0})
        self.base = {"name": name, "revision": "", "sha256": patch.base_hash(self.modules)}

    # --- loading --------------------------------------------------------------------------------------------------
    @classmethod
    def claims(cls, spec: str) -> bool:
        """An alias, or a folder of a ``DDPMPipeline`` or ``DDIMPipeline``."""
        return spec in cls.aliases or described(Path(spec, "model_index.json")).get("_class_name") in PIPELINES

    @classmethod
    def load(
        cls, spec: str, *, patches: Sequence[str] = (), device: str = "cpu", dtype: torch.dtype = torch.float32, force: bool = False
    ) -> Self:
        """See ``Target.load``. ``model_index.json``, as DiT's does, or an ``about.json`` beside it may name the classes as ``id2label``;
        the latter also holds the default ``sampler`` and the data it was ``trained_on``."""
        if spec in ("tiny", "tiny-ddpm"):
            target = cls.tiny()
            target.amp = dtype
        else:
            from diffusers import DDIMScheduler, UNet2DModel

            folder = Path(cls.aliases.get(spec, spec))
            files = [f for f in (folder / "model_index.json", folder / "about.json") if f.is_file()]
            about = {k: v for f in files for k, v in json.loads(f.read_text(encoding="utf-8")).items()}
            try:
                unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, torch_dtype=torch.float32)
                scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
            except Exception as error:  # what is wrong with a file can surface as anything
                said = str(error).splitlines()[0]
                raise RefusedError(f"the pipeline in {spec} cannot be read ({said}); copy or download it again") from error
            target = cls(unet, scheduler, about, spec, device, dtype)
        if patches:
            target.patch(patches, force=force)
        return target

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        from diffusers import DDIMScheduler, UNet2DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet: Any = UNet2DModel(
                sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=5,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            )  # fmt: skip
            torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
        about = {"id2label": dict(zip("0123", "abcd", strict=True)), "sampler": {"steps": 2, "guidance": 2.0}}
        return cls(unet, DDIMScheduler(), about, "tiny-ddpm", "cpu", torch.float32)

    @classmethod
    def fresh(
        cls, architecture: str, classes: Sequence[str], *, side: int = 32, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Random weights from the global generator: widths 1, 2, 2, 2 × 128, two blocks each, attention at half the size, dropout 0.1,
        beta from 1e-4 to 0.02, sampled as SalUn's with guidance 3 (their w = 2)."""
        from diffusers import DDIMScheduler, UNet2DModel

        width = int(architecture.partition("width=")[2] or 128)
        unet: Any = UNet2DModel(
            sample_size=side, block_out_channels=(width, 2 * width, 2 * width, 2 * width), layers_per_block=2, dropout=0.1,
            norm_num_groups=min(32, width), num_class_embeds=len(classes) + 1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        about = {"id2label": {str(i): c for i, c in enumerate(classes)}, "sampler": {"steps": 100, "guidance": 3.0}}
        return cls(unet, scheduler, about, architecture, device, dtype)

    def save(self, folder: Path, *, trained_on: Mapping[str, Any] | None = None) -> None:
        """Write a ``DDIMPipeline``'s folder with ``about.json``, which ``load`` reads."""
        unet: Any = self.modules["unet"]
        unet.save_pretrained(folder / "unet", safe_serialization=True)
        self.scheduler.save_pretrained(folder / "scheduler")
        index = {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
        labels = {str(i): c for i, c in enumerate(self.classes)}
        about = {"id2label": labels, "sampler": self.sampler, "trained_on": dict(trained_on or self.trained_on)}
        write_json(folder / "about.json", about)
        write_json(folder / "model_index.json", index)

    def reset(self) -> None:
        unet: Any = self.modules["unet"]
        unet.load_state_dict(type(unet).from_config(unet.config).state_dict())

    # --- training -------------------------------------------------------------------------------------------------
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean squared error of the noise on {"x": (B, 3, side, side) in [0, 1], "y": (B,)}, noise levels uniform in antithetic pairs.

        One label in ten is dropped (the null class). With "toward" (B,), which ``relabel`` adds, the goal is not the noise but what
        the model itself, without gradient, says of the same x_t under that class (SalUn's forgetting loss for generation). Then no label
        is dropped, unless "drop" is True: labels drop in both predictions, each by itself, as in SalUn's release.
        """
        x_0, y = 2 * batch["x"] - 1, batch["y"]
        b = len(x_0)
        t = self.process.draw((b + 1) // 2, device=self.device)
        t = torch.cat([t, self.train_steps - 1 - t])[:b]  # (B,)
        noise = torch.randn_like(x_0)
        x_t = self.add_noise(x_0, noise, t)
        if "toward" in batch:
            drop, toward = bool(batch.get("drop")), batch["toward"]
            with torch.no_grad():
                goal = self.eps(x_t, t, _cond(self._dropped(toward) if drop else toward))
        else:
            drop, goal = True, self.goal(x_0, noise, t)
        return F.mse_loss(self.eps(x_t, t, _cond(self._dropped(y) if drop else y)), goal)

    def _dropped(self, y: Tensor) -> Tensor:
        """Classes (B,) with one in ten replaced by the null class, where there is one."""
        return y if self.null_class is None else y.masked_fill(torch.rand(len(y), device=self.device) < 0.1, self.null_class)

    def relabel(self, batch: Mapping[str, Any], policy: Relabel = "other") -> Mapping[str, Any]:
        """``batch`` with "toward", the class whose prediction is to take the place of its own."""
        return {**batch, "toward": self.wrong(batch["y"], policy)}

    # --- diffusion ------------------------------------------------------------------------------------------------
    def eps(self, x_t: Tensor, t: Any, cond: Cond) -> Tensor:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32):
            out: Tensor = self.modules["unet"](x_t, t, class_labels=cond.states[:, 0].long(), return_dict=False)[0]
        return out.float()

    def encode(self, prompts: Any, soft: Soft | None = None) -> Cond:
        """Class names, or "" for the null class, to ``Cond`` with states (B, 1): class numbers."""
        return _cond(torch.tensor([self._class(p) for p in prompts], device=self.device))

    def _class(self, name: str) -> int:
        if name in self.classes:
            return self.classes.index(name)
        if name:
            raise unknown("class of this model", name, self.classes)
        if self.null_class is None:
            raise UsageError("this model has no null class, which the empty prompt stands for; sample it with guidance 1")
        return self.null_class

    @torch.no_grad()
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
        steps, guidance = steps or self.sampler["steps"], self.sampler["guidance"] if guidance is None else guidance
        cond = prompts if isinstance(prompts, Cond) else self.encode(prompts)
        images, sampler = [], schedulers.named(self, scheduler)
        for part in diffusion.batches(len(seeds), batch):
            c, rows = cond[part], diffusion.generators(seeds[part])
            x = diffusion.noise(rows, self.latent_shape, self.device, torch.float32)
            null = c if guidance == 1 else self.encode([""]).repeat(len(c))
            how: dict[str, Any] = {"scheduler": sampler, "steps": steps, "guidance": guidance, "guide": self.guide, "generators": rows}
            images.append(self.shown(diffusion.denoise(self, x, c, null, **how)[-1][1], seeds[part]))
            if progress:
                progress(len(c))
        return torch.cat(images)


def _cond(y: Tensor) -> Cond:
    """Class numbers (B,) as conditioning; floats, since a sampler takes its dtype from them."""
    return Cond(y[:, None].float())
