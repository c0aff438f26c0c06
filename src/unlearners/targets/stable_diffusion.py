"""Stable Diffusion 1.x, 2.x and SDXL, from any form a user has it in."""

from __future__ import annotations

import json
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import Self

from .. import diffusion, imports, latents, noise_process, patch, schedulers
from ..base import Adversarial, Data, Relabel, Task
from ..diffusion import Cond, Soft
from ..errors import RefusedError, UnlearnError, UsageError
from ..files import quiet
from ..latents import Asked, Latents
from ..zoo import canvas
from .base import Learner, TextToImage, hub_config, tiny_tokenizer

ALIASES = {
    "canvas": str(canvas.FOLDER / "sd"),
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
# alias: the alias of the pipeline below it, and the patch that was made by fine-tuning that pipeline
TUNED = {"canvas-finetuned": ("canvas", canvas.FOLDER / "sd-finetuned" / "weights.safetensors")}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
SINGLE_FILES = (".safetensors", ".ckpt", ".pt")
SINGLE_KINDS = ("v1", "v2", "xl_base")


class StableDiffusion(Learner, TextToImage):
    """A Stable Diffusion pipeline: UNet and text encoder(s) to edit, VAE, tokenizer(s) and scheduler to use.

    ``eps`` is the network's raw output, so v-prediction models work unchanged: guidance is linear in it.
    """

    recipe: ClassVar[str] = "sd"
    training: ClassVar[Mapping[str, Any]] = {
        "steps": 0, "epochs": 5, "batch": 8, "forget_batch": 8, "lr": 1e-5, "optimizer": "adam", "weight_decay": 0.0, "clip": 0.0,
        "labels": "next", "alpha": 0.5,
    }  # fmt: skip
    aliases: ClassVar[Mapping[str, str]] = {"tiny": "", **ALIASES, **{name: ALIASES[below] for name, (below, _) in TUNED.items()}}
    groups: ClassVar[Mapping[str, str]] = {
        "xattn": r"unet\..*\.attn2\.",
        "xattn-kv": r"unet\..*\.attn2\.to_[kv]\.",
        "noxattn": r"unet\.(?!.*\.attn2\.|conv_norm_out|conv_out|time_embedding|add_embedding)",
        "selfattn": r"unet\..*\.attn1\.",
        "attn": r"unet\..*\.attn[12]\.",
        "full": r"unet\.",
        "text_encoder": r"text_encoder(_2)?\..*(layers\.\d+|final_layer_norm)\.",
        "embedding": r"text_encoder(_2)?\..*token_embedding\.",
    }

    def __init__(self, pipe: Any, name: str, revision: str = "") -> None:
        self.pipe, self.device = pipe, torch.device(pipe.device)
        self.dtype: torch.dtype = pipe.unet.dtype
        self.modules: dict[str, nn.Module] = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        self.tokenizers, self.vae, self.scheduler = [pipe.tokenizer], pipe.vae, pipe.scheduler
        self.xl = getattr(pipe, "text_encoder_2", None) is not None
        if self.xl:
            self.modules["text_encoder_2"] = pipe.text_encoder_2
            self.tokenizers.append(pipe.tokenizer_2)
        for module in (*self.modules.values(), self.vae):
            module.requires_grad_(False).eval()
        config = pipe.unet.config
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.process = noise_process.of_scheduler(self.scheduler)
        self.train_steps = self.process.train_steps
        if self.dtype == torch.float16:  # where the checkpoint says so, activations of the VAE overflow in float16
            self.vae.to(torch.float32 if self.vae.config.get("force_upcast", False) else self.dtype)
        self.sampler = {"steps": 20, "guidance": 4.0} if config.sample_size <= 16 else {"steps": 50, "guidance": 7.5}
        tokenizer = self.tokenizers[0]
        self.special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self.vocabulary = len(tokenizer)
        self.base = {"name": name, "revision": revision, "sha256": patch.base_hash(self.modules)}

    # --- loading --------------------------------------------------------------------------------------------------
    @classmethod
    def load(
        cls, spec: str, *, patches: Sequence[str] = (), device: str = "cpu", dtype: torch.dtype = torch.float32, force: bool = False
    ) -> Self:
        """See ``Target.load``. A single file may name where its configuration comes from: ``model.safetensors@folder-or-hub-id``.

        The alias ``tiny`` is random weights, for trying things out. One of ``TUNED`` is a fine-tuned model: a base of its own, which
        patches for the pipeline below it fit only in the components that fine-tuning left alone.
        """
        pipe = _tiny(0) if spec == "tiny" else _pipeline(cls.aliases.get(spec, spec), dtype)
        if spec in TUNED:
            patch.apply({"unet": pipe.unet}, {}, patch.load(TUNED[spec][1]), force=True)  # by value, so it becomes the base
        target = cls(pipe.to(device) if pipe.unet.dtype == dtype else pipe.to(device, dtype), spec)
        target.patch(patches, force=force)
        return target

    @classmethod
    def tiny(cls, seed: int = 0, *, xl: bool = False, prediction: str = "epsilon") -> Self:
        """Random weights of the real classes, byte-level tokenizer, 16×16 pictures; ``xl`` gives an SDXL layout."""
        return cls(_tiny(seed, xl, prediction), "tiny")

    @classmethod
    def tiny_like(cls, spec: str) -> Self:
        index = hub_config(cls.aliases.get(spec, spec), "model_index.json")
        xl = index.get("_class_name") == PIPELINES[1] or spec in ("sdxl", ALIASES["sdxl"])  # the second: without a network
        return cls.tiny(xl=xl)

    def patch(self, patches: Sequence[str], *, force: bool = False) -> None:
        """See ``Target.patch``. Erased models and LoRA files of others are patches too; they do not say what they were made for."""
        files = [Path(p) / "weights.safetensors" if Path(p).is_dir() else Path(p) for p in patches]
        read = [imports.read(f, self.modules, self.base["sha256"]) for f in files]
        patch.apply_all(self.modules, self.base["sha256"], read, force=force)

    # --- training -------------------------------------------------------------------------------------------------
    def open(self, data: Data) -> Latents:
        """The pictures ``data`` names as latents, encoded once; the prompt of each is "an image of a" and its class."""
        return latents.opened(self, data)

    def forgotten(self, task: Task, asked: Asked) -> Latents:
        return latents.forgotten(self, task, asked)

    def retained(self, task: Task, asked: Asked) -> Latents:
        return latents.retained(self, task, asked)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Denoising MSE on {"image": (B, 3, H, W) in [0, 1], "prompt": [str]}, t uniform (Ho et al. 2020, eq. 14).

        "latent" (B, 4, h, w) may stand for the image. With "toward", prompts which ``relabel`` adds, the goal is not the noise but what
        the model itself, without gradient, says of the same x_t under those (SalUn's forgetting loss for generation).
        """
        x_0 = batch["latent"].to(self.device, self.dtype) if "latent" in batch else self.latents(batch["image"].to(self.device))
        noise, t = torch.randn_like(x_0), self.process.draw(len(x_0), device=self.device)
        x_t = self.add_noise(x_0, noise, t)
        if "toward" in batch:
            with torch.no_grad():
                goal = self.eps(x_t, t, self._each(batch["toward"]))
        else:
            goal = self.goal(x_0, noise, t)
        return F.mse_loss(self.eps(x_t, t, self._each(batch["prompt"])).float(), goal.float())

    def _each(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of ``prompts``, each different one encoded once."""
        unique = list(dict.fromkeys(prompts))
        return self.encode(unique)[[unique.index(p) for p in prompts]]

    def relabel(self, batch: Mapping[str, Any], policy: Relabel = "other") -> Mapping[str, Any]:
        """``batch`` with "toward": for each picture a prompt whose prediction is to take the place of its own's.

        It is one of the picture's "others", or of the batch's other prompts, from the next on, where it has none ("" if all are alike).
        other: uniform over them; any: uniform over them and its own; next: the first.
        """
        prompts = list(batch["prompt"])
        toward = []
        for i, own in enumerate(prompts):
            found = list(batch["others"][i]) if "others" in batch else []
            found = found or [p for p in prompts[i + 1 :] + prompts[:i] if p != own] or [""]
            if policy == "any":
                found = [*found, own]
            toward.append(found[0 if policy == "next" else int(torch.randint(len(found), ()))])
        return {**batch, "toward": toward}

    # --- text -----------------------------------------------------------------------------------------------------
    def tokens(self, prompts: Sequence[str]) -> Tensor:
        return self._ids(0, prompts)

    def suits(self, task: Task) -> None:
        for words in (*task.concepts, *task.said):
            for tokenizer, room in zip(self.tokenizers, self._lengths(), strict=True):
                n = len(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])
                if not n:
                    raise UsageError(f"the concept '{words}' has no token in this model's text encoder; name it in words")
                if n > room - 2:
                    raise UsageError(f"'{words[:60]}…' has {n} tokens and this model's text encoder reads {room - 2}; shorten it")

    def _lengths(self) -> list[int]:
        """Positions of each text encoder; a tokenizer's own limit is astronomic where no file gives it."""
        encoders: list[Any] = [self.modules[n] for n in ("text_encoder", "text_encoder_2") if n in self.modules]
        return [min(t.model_max_length, e.config.max_position_embeddings) for t, e in zip(self.tokenizers, encoders, strict=True)]

    def _ids(self, tower: int, prompts: Sequence[str]) -> Tensor:
        how: dict[str, Any] = {"padding": "max_length", "max_length": self._lengths()[tower], "truncation": True, "return_tensors": "pt"}
        padded = self.tokenizers[tower](list(prompts), **how)
        ids: Tensor = padded["input_ids"]
        return ids.to(self.device)

    def _padded(self, ids: Tensor) -> Tensor:
        """Ids of the first tokenizer (B, L) as the second has them: SDXL's share a vocabulary and pad differently after the end token."""
        ended = (ids == self.tokenizers[0].eos_token_id).cumsum(1) - (ids == self.tokenizers[0].eos_token_id).long() > 0
        return ids.masked_fill(ended, self.tokenizers[1].pad_token_id)

    def decode(self, ids: Tensor) -> str:
        return str(self.tokenizers[0].decode(ids, skip_special_tokens=True)).strip()

    def embed(self) -> Tensor:
        encoder: Any = self.modules["text_encoder"]
        table: Tensor = encoder.get_input_embeddings().weight
        return table[: self.vocabulary]

    def encode(self, prompts: Sequence[str] | Tensor, soft: Soft | None = None) -> Cond:
        ids = prompts if isinstance(prompts, Tensor) else self.tokens(prompts)
        if not self.xl:
            return Cond(self._text("text_encoder", ids, soft, 0).last_hidden_state, ids=ids)
        if soft is not None and not isinstance(soft.embeddings, tuple):
            raise UsageError("SDXL has two text encoders; give soft embeddings as a tuple with one tensor for each")
        second = self._padded(ids) if isinstance(prompts, Tensor) else self._ids(1, prompts)
        first = self._text("text_encoder", ids, soft, 0).hidden_states[-2]
        other = self._text("text_encoder_2", second, soft, 1)
        size = float(self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1))
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=self.device, dtype=first.dtype).repeat(len(ids), 1)
        return Cond(torch.cat([first, other.hidden_states[-2]], -1), other.text_embeds, time_ids, ids)

    def _text(self, component: str, ids: Tensor, soft: Soft | None, tower: int) -> Any:
        """One text encoder's output. Soft embeddings enter by a hook on the embedding layer, so the library's own forward does the rest."""
        encoder: Any = self.modules[component]
        if soft is None:
            with self.precision():
                return encoder(ids, output_hidden_states=self.xl)
        handle = encoder.get_input_embeddings().register_forward_hook(lambda _module, _inputs, out: soft.put(out, tower))
        try:
            with self.precision(), self._attention():
                return encoder(ids, output_hidden_states=self.xl)
        finally:
            handle.remove()

    def null(self, n: int = 1) -> Cond:
        """Unconditional conditioning (n rows): the empty prompt, or zeros where an SDXL pipeline asks for them."""
        cond = self.encode([""])
        if self.xl and self.pipe.config.get("force_zeros_for_empty_prompt", True):
            cond = Cond(torch.zeros_like(cond.states), torch.zeros_like(cond.pooled), cond.time_ids)  # type: ignore[arg-type]
        return cond.repeat(n)

    def precision(self) -> torch.autocast:
        """Autocast for models in half precision, whose weights in training are float32; nothing for float32 models."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    # --- denoising ------------------------------------------------------------------------------------------------
    def eps(self, x_t: Tensor, t: Any, cond: Cond) -> Tensor:
        extra = {"text_embeds": cond.pooled, "time_ids": cond.time_ids} if self.xl else None
        with self.precision(), self._attention():
            out: Tensor = self.modules["unet"](x_t, t, cond.states, added_cond_kwargs=extra, return_dict=False)[0]
        return out

    def _attention(self) -> Any:
        """Plain attention where a CPU is to differentiate in half precision: there the fused one's backward pass is ten times slower."""
        slow = self.device.type == "cpu" and self.dtype != torch.float32 and torch.is_grad_enabled()
        return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        x = (2 * images - 1).to(self.device, self.vae.dtype)
        z: Tensor = self.vae.encode(x).latent_dist.mean * self.vae.config.scaling_factor
        return z.to(self.pipe.unet.dtype)

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
        start: Tensor | None = None,
    ) -> Tensor:
        """See ``Denoiser.sample``. With ``start`` (B, 4, h, w), noise to begin with, the seeds do not count and the noise process is
        followed (DDIM), whatever the sampler."""
        sampler = schedulers.named(self, scheduler) if start is None else None
        steps, guidance = steps or self.sampler["steps"], self.sampler["guidance"] if guidance is None else guidance
        if isinstance(prompts, Cond):
            cond, row = prompts, list(range(len(prompts)))
        else:
            unique = list(dict.fromkeys(prompts))
            cond = Cond.cat([self.encode(unique[s]) for s in diffusion.batches(len(unique), batch)])
            row = [unique.index(p) for p in prompts]
        images = []
        for part in diffusion.batches(len(seeds), batch):
            c = cond[row[part]]
            rows = diffusion.generators(seeds[part])
            if start is None:
                x = diffusion.noise(rows, self.latent_shape, self.device, c.states.dtype)
            else:
                x = start[part].to(self.device, c.states.dtype)
            how: dict[str, Any] = {"scheduler": sampler, "steps": steps, "guidance": guidance, "guide": self.guide, "generators": rows}
            z = diffusion.denoise(self, x, c, self.null(len(c)), **how)[-1][1]
            images.append(self.shown(self.vae.decode(z.to(self.vae.dtype) / self.vae.config.scaling_factor).sample, seeds[part]))
            if progress:
                progress(len(c))
        return torch.cat(images)

    # --- attacks --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def replay(self, proposals: Sequence[Adversarial], seeds: Sequence[int], *, guidance: float | None = None) -> Tensor:
        """See ``TextToImage.replay``."""
        starts = [a.latent for a in proposals if a.latent is not None]
        if starts and len(starts) < len(proposals):  # start noise has a sampler of its own
            return torch.cat([self.replay([a], [s], guidance=guidance) for a, s in zip(proposals, seeds, strict=True)])
        if starts:
            guidance = guidance if self.guide else 1.0  # a defence may guide away from a text of its own; else guidance cancels out
            return self.sample(self.null(len(starts)), seeds, guidance=guidance, start=torch.stack(starts))
        conds = []
        for a in proposals:
            if a.level == "prompt":
                conds.append(self.encode([a.prompt or ""]))
                continue
            if a.tokens is None:
                raise UnlearnError("an adversarial input without a prompt needs token ids")
            soft = None if a.embedding is None else Soft.of(a.embedding[None].to(self.device), a.at, self.embed().shape[1])
            conds.append(self.encode(a.tokens[None].to(self.device), soft))
        return self.sample(Cond.cat(conds), seeds, guidance=guidance)

    def spell(self, adversarial: Adversarial) -> str:
        if adversarial.latent is not None:
            return "(start noise, without a text)"
        if adversarial.prompt is not None:
            return adversarial.prompt
        words = self.decode(adversarial.tokens) if adversarial.tokens is not None else ""
        return f"{words} (with embeddings)" if adversarial.embedding is not None else words


def split(spec: str) -> tuple[str, str]:
    """A single file and where its configuration is, from ``file@folder``; any other spec as it is, and ""."""
    found = re.match(rf"(.*?(?:{'|'.join(map(re.escape, SINGLE_FILES))}))@(.+)", spec)
    return (found[1], found[2]) if found else (spec, "")


def _pipeline(spec: str, dtype: torch.dtype) -> Any:
    """The diffusers pipeline at ``spec``, without a safety checker (evaluation must see what the weights draw)."""
    import diffusers

    path, config = split(spec)
    if Path(path).suffix in SINGLE_FILES:
        return _single_file(Path(path), config, dtype)
    folder = Path(spec)
    if folder.is_file():
        raise UsageError(f"{spec} is no model file; give a file that ends in {' or '.join(SINGLE_FILES)}, a folder or a hub id")
    if not folder.exists() and spec.startswith(("/", "./", "../", "~")):
        raise UsageError(f"no such folder or file: {spec}; check the path")
    name = _checked(folder) if folder.is_dir() else ""
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if name == PIPELINES[0] else {}
    loader = getattr(diffusers, name) if name else diffusers.DiffusionPipeline
    try:
        with quiet():
            parts = {"default": dtype, "vae": torch.float32} if dtype == torch.float16 else dtype  # see ``StableDiffusion.__init__``
            pipe = loader.from_pretrained(spec, dtype=parts, use_safetensors=True, **options)
    except Exception as error:  # what is wrong with a file can surface as anything
        if name:
            raise RefusedError(f"the pipeline in {spec} cannot be read ({_first(error)}); copy or download it again") from error
        unknown = f"'{spec}' is no local folder or file and could not be fetched from the hub"
        near = get_close_matches(spec, StableDiffusion.aliases, n=1)
        hint = f"did you mean {near[0]}" if near else "check the name or the network"
        raise UsageError(f"{unknown} ({_first(error)}); {hint}") from error
    if type(pipe).__name__ not in PIPELINES:
        raise UsageError(f"{spec} is a {type(pipe).__name__}; this target takes {' or '.join(PIPELINES)}")
    if name:
        _no_weight_missing(folder, pipe)
    elif type(pipe).__name__ == PIPELINES[0]:
        pipe.safety_checker = None
    return pipe


def _first(error: BaseException) -> str:
    """The first sentence of an error, at most 200 characters."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(". ")[0].rstrip(".")[:200]


def _checked(folder: Path) -> str:
    """The pipeline class a diffusers folder names, once its parts are there and its weight files are whole."""
    index = folder / "model_index.json"
    if not index.exists():
        raise UsageError(f"{folder} holds neither model_index.json nor run.json; give a diffusers folder, a run folder, a file or a hub id")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        name = parts["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise RefusedError(f"{index} is damaged; copy or download it again") from None
    if name not in PIPELINES:
        raise UsageError(f"{folder} is a {name}; this target takes {' or '.join(PIPELINES)}")
    needed = ("unet", "vae", "scheduler", "tokenizer", "text_encoder", *(("tokenizer_2", "text_encoder_2") if name == PIPELINES[1] else ()))
    if missing := [part for part in needed if not (folder / part).is_dir()]:
        raise RefusedError(f"{folder} has no folder '{missing[0]}', which a {name} needs; copy or download it again")
    for part in needed:
        _held(folder / part)
    return str(name)


def _held(folder: Path) -> set[str]:
    """The tensor names in a folder's safetensors files; ``RefusedError`` for one that is not whole."""
    held: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                held.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise RefusedError(f"{path} is corrupt or truncated ({_first(error)}); copy or download it again") from error
    return held


def _no_weight_missing(folder: Path, pipe: Any) -> None:
    """Refuse files that lack a weight. Only a warning says so: diffusers leaves it on the meta device, transformers makes it random."""
    for part in ("unet", "vae", "text_encoder", *(("text_encoder_2",) if type(pipe).__name__ == PIPELINES[1] else ())):
        tensors = patch.live({part: getattr(pipe, part)})
        held = {patch.hub_key(f"{part}.{k}") for k in _held(folder / part)} if part.startswith("text") else set(tensors)
        if lost := [k for k, t in tensors.items() if t.is_meta or (k not in held and not k.endswith("position_ids"))]:
            raise RefusedError(f"the weights in {folder / part} lack '{lost[0]}' and are not used; copy or download them again")


def _single_file(path: Path, config: str, dtype: torch.dtype) -> Any:
    """A pipeline from one checkpoint in the original (ldm) layout; pickles are opened with ``weights_only=True`` alone."""
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    if not path.is_file():
        raise UsageError(f"no such file: {path}; check the path")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        kind = str(infer_diffusers_model_type(state.get("state_dict", state)))
    except pickle.UnpicklingError as error:
        raise RefusedError(f"{path} is damaged or would run code when opened, and was not; convert it to safetensors") from error
    except Exception as error:  # a damaged file can raise anything
        raise RefusedError(f"{path} is corrupt or truncated and was not loaded; fetch it again") from error
    del state
    if kind not in SINGLE_KINDS:
        raise UsageError(f"{path} is a checkpoint of kind '{kind}'; this target takes {', '.join(SINGLE_KINDS)}")
    named = _checked(Path(config)) if Path(config, "model_index.json").is_file() else PIPELINES[kind == "xl_base"]
    options = {"config": config} if config else {}
    try:
        return getattr(diffusers, named).from_single_file(
            str(path), dtype=dtype, **options, **({} if named == PIPELINES[1] else {"safety_checker": None})
        )
    except Exception as error:  # as above
        unread = f"{path} could not be read as a Stable Diffusion checkpoint ({_first(error)})"
        raise RefusedError(f"{unread}; name a folder or hub id that holds its configuration: {path}@FOLDER") from error


def _tiny(seed: int, xl: bool = False, prediction: str = "epsilon") -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return _tiny_pipeline(xl, prediction)


def _tiny_pipeline(xl: bool, prediction: str) -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(Path(folder))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40} if xl else {}
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=32 if xl else 16,
        attention_head_dim=2,
        norm_num_groups=4,
        **extra,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": tokenizer, "text_encoder": CLIPTextModel(text)}
    if xl:
        return StableDiffusionXLPipeline(
            **parts, text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=tokenizer, add_watermarker=False
        )
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
