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

from .. import diffusion, patch
from ..base import Relabel
from ..data import Augment
from ..diffusion import Cond, Soft
from ..errors import RefusedError, UsageError, unknown
from ..zoo import canvas
from .base import Denoiser, Trainable, described

PIPELINES = ("DDPMPipeline", "DDIMPipeline")


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

    augmentation: ClassVar[Augment] = "flip"

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
        self.train_steps = scheduler.config.num_train_timesteps
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

    def reset(self) -> None:
        unet: Any = self.modules["unet"]
        unet.load_state_dict(type(unet).from_config(unet.config).state_dict())

    # --- training -------------------------------------------------------------------------------------------------
    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean squared error of the noise on {"x": (B, 3, side, side) in [0, 1], "y": (B,)}, noise levels uniform in antithetic pairs.

        One label in ten is dropped (the null class). With "toward" (B,), which ``relabel`` adds, the goal is not the noise but what
        the model itself, without gradient, says of the same x_t under that class (SalUn's forgetting loss for generation).
        """
        x_0, y = 2 * batch["x"] - 1, batch["y"]
        b = len(x_0)
        t = torch.randint(self.train_steps, ((b + 1) // 2,), device=self.device)
        t = torch.cat([t, self.train_steps - 1 - t])[:b]  # (B,)
        noise = torch.randn_like(x_0)
        x_t = self.add_noise(x_0, noise, t)
        if "toward" in batch:
            with torch.no_grad():
                goal = self.eps(x_t, t, _cond(batch["toward"]))
        else:
            goal = self.goal(x_0, noise, t)
            if self.null_class is not None:
                y = y.masked_fill(torch.rand(b, device=self.device) < 0.1, self.null_class)
        return F.mse_loss(self.eps(x_t, t, _cond(y)), goal)

    def relabel(self, batch: Mapping[str, Any], policy: Relabel = "other") -> Mapping[str, Any]:
        """``batch`` with "toward", the class whose prediction is to take the place of its own."""
        return {**batch, "toward": self.wrong(batch["y"], policy)}

    # --- diffusion ------------------------------------------------------------------------------------------------
    def eps(self, x_t: Tensor, t: Any, cond: Cond) -> Tensor:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32):
            out: Tensor = self.modules["unet"](x_t, t, class_labels=cond.states[:, 0].long(), return_dict=False)[0]
        return out.float()

    def goal(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        x_t: Tensor = self.scheduler.add_noise(x_0, noise, t)
        return x_t

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
        batch: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        steps, guidance = steps or self.sampler["steps"], self.sampler["guidance"] if guidance is None else guidance
        cond = prompts if isinstance(prompts, Cond) else self.encode(prompts)
        images = []
        for part in diffusion.batches(len(seeds), batch):
            c = cond[part]
            x = diffusion.noise(seeds[part], self.latent_shape, self.device, torch.float32)
            null = c if guidance == 1 else self.encode([""]).repeat(len(c))
            how = {"scheduler": self.scheduler, "steps": steps, "guidance": guidance, "guide": self.guide}
            z = diffusion.denoise(self, x, c, null, **how)[-1][1]
            images.append((z.float() / 2 + 0.5).clamp(0, 1).cpu())
            if progress:
                progress(len(c))
        return torch.cat(images)


def _cond(y: Tensor) -> Cond:
    """Class numbers (B,) as conditioning; floats, since a sampler takes its dtype from them."""
    return Cond(y[:, None].float())
