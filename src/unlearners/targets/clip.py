"""CLIP and SigLIP: dual encoders of transformers and of open_clip."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import Self

from .. import clip_maps, latents, patch
from ..banks import others
from ..base import Data, Relabel, Task
from ..data import Examples, Source, open_data
from ..diffusion import batches
from ..errors import RefusedError, UsageError
from ..files import quiet, sentence
from ..latents import Asked
from ..zoo import canvas
from .base import DualEncoder, hub_config, tiny_tokenizer

OPEN_CLIP = "open_clip/"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NAMES = 256
"""names that are read at once"""
FORMS = ("a photo of a {}.",)
"""how a class is said where the data say nothing of it"""
USUAL = {"clip": {"mean": MEAN, "std": STD}, "siglip": {"mean": (0.5,) * 3, "std": (0.5,) * 3}}
"""how images are normalized where nothing says so"""
KINDS = {"clip": "CLIPModel", "siglip": "SiglipModel"}

Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]


class CLIP(DualEncoder):
    """Two towers into one space. Its components are named as where they are used: ``text_encoder`` as in Stable Diffusion,
    ``vision_tower`` as in LLaVA, so an edit of one is a patch for the other. Weights stay float32; ``dtype`` is autocast's.
    """

    recipe: ClassVar[str] = "clip"
    training: ClassVar[Mapping[str, Any]] = {
        "steps": 0, "epochs": 10, "batch": 32, "forget_batch": 0, "lr": 1e-6, "optimizer": "adamw", "weight_decay": 0.1, "clip": 0.0,
        "labels": "other", "alpha": 1.0,
    }  # fmt: skip
    aliases: ClassVar[Mapping[str, str]] = {"canvas-clip": str(canvas.FOLDER / "clip"), "tiny-clip": ""}
    groups: ClassVar[Mapping[str, str]] = {
        "full": r"(vision_tower|text_encoder|projections)\.",
        "vision": r"vision_tower\.|projections\.visual",
        "text": r"text_encoder\.|projections\.text",
    }

    def __init__(self, model: Any, tokenize: Tokenize, look: Mapping[str, Any], name: str, device: str, dtype: torch.dtype) -> None:
        self.device, self.amp, self.config = torch.device(device), dtype, model.config
        self.tokenize = tokenize if model.config.model_type == "siglip" else _short(tokenize)
        self.modules = {
            "vision_tower": model.vision_model,
            "text_encoder": model.text_model,
            "projections": _Projections(model),
        }
        for module in self.modules.values():
            module.float().requires_grad_(False).eval().to(self.device)
        self.side = int(model.config.vision_config.image_size)
        self.mean, self.std = (torch.tensor(look[k], device=self.device).view(1, 3, 1, 1) for k in ("mean", "std"))
        self.look, self.forms = {k: tuple(look[k]) for k in ("mean", "std")}, FORMS
        self.warnings = [str(look["assumed"])] if "assumed" in look else []
        self.base = {"name": name, "revision": "", "sha256": patch.base_hash(self.modules)}

    # --- loading --------------------------------------------------------------------------------------------------
    @classmethod
    def claims(cls, spec: str) -> bool:
        """An alias, "open_clip/NAME[/TAG]", "file@open_clip/NAME", or a folder or hub id of a CLIPModel or SiglipModel."""
        if spec in cls.aliases or spec.startswith(OPEN_CLIP) or f"@{OPEN_CLIP}" in spec:
            return True
        found = hub_config(spec)
        return found.get("model_type") in KINDS and not any("ForImage" in str(a) for a in found.get("architectures") or ())

    @classmethod
    def load(
        cls, spec: str, *, patches: Sequence[str] = (), device: str = "cpu", dtype: torch.dtype = torch.float32, force: bool = False
    ) -> Self:
        """See ``Target.load``. ``spec``: a folder or hub id of transformers, "open_clip/ViT-B-32/laion400m_e32", or
        "weights-file@open_clip/ViT-B-32"."""
        if spec in ("tiny", "tiny-clip"):
            target = cls.tiny()
            target.amp = dtype
        elif OPEN_CLIP in spec:
            target = cls(*_open_clip(spec), spec, device, dtype)
        else:
            target = cls(*_transformers(cls.aliases.get(spec, spec)), spec, device, dtype)
        if spec == "canvas-clip":
            target.forms = ("An image of a {}.",)
        if patches:
            target.patch(patches, force=force)
        return target

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        from transformers import CLIPConfig, CLIPModel

        with tempfile.TemporaryDirectory() as folder:
            tokenizer = tiny_tokenizer(Path(folder))
        side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
        words = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": tokenizer.pad_token_id}
        words |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            config = CLIPConfig(text_config=side | words, vision_config=side | {"image_size": 16, "patch_size": 8}, projection_dim=16)
            model = CLIPModel(config)
            for p in model.parameters():  # transformers draws them so small that layer norms would see rounding only
                p.data = p.data * 4 if p.ndim > 1 else p.data
        return cls(model, _words(tokenizer, 24), {"mean": MEAN, "std": STD}, "tiny-clip", "cpu", torch.float32)

    def save(self, folder: Path) -> None:
        """Write config.json, preprocessor_config.json and model.safetensors as transformers does; the tokenizer stays where it was loaded
        from."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [KINDS[self.config.model_type]]
        (folder / "config.json").write_text(self.config.to_json_string(), encoding="utf-8")
        kind = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[self.config.model_type]
        how = {"image_mean": list(self.look["mean"]), "image_std": list(self.look["std"]), **_sizes(self.config.model_type, self.side)}
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **how}, indent=2), encoding="utf-8")
        save_file(self.state(), folder / "model.safetensors", {"format": "pt"})

    def state(self) -> dict[str, Tensor]:
        """All weights under transformers' names, on the CPU."""
        out: dict[str, Tensor] = {}
        for name, tensor in patch.live(self.modules).items():
            component, _, rest = name.partition(".")
            if component != "projections" and not rest.startswith(("text_model.", "vision_model.")):
                rest = ("text_model." if component == "text_encoder" else "vision_model.") + rest
            out[rest] = tensor.detach().cpu().contiguous()
        return out

    # --- what methods ask -----------------------------------------------------------------------------------------
    def images(self, x: Tensor) -> Tensor:
        return self.project("visual", self.seen(x))

    def texts(self, prompts: Sequence[str]) -> Tensor:
        return self.project("text", self.read(prompts))

    def seen(self, x: Tensor) -> Tensor:
        """What the vision tower pools (B, W) of pictures (B, 3, side, side) in [0, 1]."""
        with self._autocast():
            found: Tensor = self.modules["vision_tower"](pixel_values=(x.to(self.device) - self.mean) / self.std).pooler_output
        return found

    def read(self, prompts: Sequence[str]) -> Tensor:
        """What the text tower pools (B, W) of texts; equal ones are read once."""
        unique = list(dict.fromkeys(prompts))
        ids = {k: v.to(self.device) for k, v in self.tokenize(unique).items()}
        with self._autocast():
            found: Tensor = self.modules["text_encoder"](**ids).pooler_output
        return found if len(unique) == len(prompts) else found[[unique.index(p) for p in prompts]]

    def project(self, side: str, pooled: Tensor) -> Tensor:
        """Unit embeddings (B, D), float32, of what a tower has pooled."""
        head: Any = getattr(self.modules["projections"], f"{side}_projection")
        with self._autocast():
            out: Tensor = head(pooled)
        return F.normalize(out.float(), dim=-1)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32)

    @property
    def scale(self) -> Tensor:
        """exp of the logit scale, a scalar."""
        scale: Any = self.modules["projections"].logit_scale
        return scale.exp()  # type: ignore[no-any-return]

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The training loss on {"x": (B, 3, side, side) in [0, 1], "text": [str]}: InfoNCE both ways, or SigLIP's sigmoid loss.

        InfoNCE is CLIP's own: a picture's right text is the one at its place, and an equal text elsewhere in the batch is a negative
        as any other is. For SigLIP's loss equal texts are right wherever they stand. Pairs that ``relabel`` made have no negatives at
        all: for them it is ``forgetting``.
        """
        if batch.get("alone"):
            return self.forgetting(batch) + 0 * self.scale  # so that every weight has a gradient, as without ``relabel``
        v, t = self.images(batch["x"]), self.texts(batch["text"])
        logits = self.scale * v @ t.T  # (B, B)
        if self.config.model_type == "siglip":
            said = {c: i for i, c in enumerate(batch["text"])}
            key = torch.tensor([said[c] for c in batch["text"]], device=v.device)
            same = (key[:, None] == key[None]).float()
            bias: Any = self.modules["projections"].logit_bias
            return -F.logsigmoid((2 * same - 1) * (logits + bias)).sum(1).mean()
        own = torch.arange(len(v), device=v.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def forgetting(self, batch: Mapping[str, Any]) -> Tensor:
        """mean(1 - cos) of the pairs of a batch (SLUG, eq. 5): what rises when pictures and texts move apart."""
        return (1 - (self.images(batch["x"]) * self.texts(batch["text"])).sum(1)).mean()

    def relabel(self, batch: Mapping[str, Any], policy: Relabel = "other") -> Mapping[str, Any]:
        """``batch`` with texts of other things: the first of ``others`` of each (next), or one of them at random."""
        if not all(batch["others"]):
            raise UsageError("nothing is known that could stand for the concept; give the task an anchor or neighbours to preserve")
        first = policy == "next"
        texts = [o[0 if first else int(torch.randint(len(o), ()))] for o in batch["others"]]
        return {**batch, "text": texts, "alone": True}

    def open(self, data: Data) -> Examples:
        """The pictures ``data`` names with their captions or, where they have none, with their class said in ``data.forms``."""
        if not data.source:
            raise UsageError("the task has no pictures with captions for a CLIP; give them with --forget and --retain, or use a clip/ task")
        examples = open_data(data, self.side, self.device, "flip")
        if examples.source.captions:
            texts = tuple(examples.source.captions[i] for i in examples.indices.tolist())
        else:
            form = (data.forms or self.forms)[0]
            texts = tuple(form.format(_spoken(examples.classes[y])) for y in examples.labels.tolist())
        return replace(examples, texts=texts, forms=data.forms, extra=others(data, examples.classes))

    def forgotten(self, task: Task, asked: Asked) -> Examples:
        """The pairs to forget; "draw:PIPELINE" as their source has a pipeline draw them from the bare concept, as SLUG does."""
        if task.forget.source.startswith("draw:"):
            found = self._drawn(task, asked)
        elif task.forget.source:
            found = self.open(task.forget)
        else:
            raise UsageError("a CLIP forgets from pictures with captions; give them with --forget, or a pipeline that draws them")
        stays = latents.staying(task, asked)
        return replace(found, others={t: _instead(t, task, stays) for t in dict.fromkeys(found.texts)})

    def _drawn(self, task: Task, asked: Asked) -> Examples:
        from . import load

        pipeline: Any = load(task.forget.source.removeprefix("draw:"), device=str(self.device))
        texts = tuple(task.said[i % len(task.said)] for i in range(asked.pictures))
        pictures = pipeline.sample(texts, range(latents.SEED, latents.SEED + asked.pictures))
        return self.pairs(pictures, texts)

    def pairs(self, images: Tensor, texts: Sequence[str]) -> Examples:
        """Pictures (n, 3, H, W) in [0, 1] and a text for each, as examples."""
        if images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        x, y, said = (images * 255).round().byte(), torch.zeros(len(images), dtype=torch.long), tuple(texts)
        digest = hashlib.sha256(x.contiguous().numpy().data)
        digest.update("\n".join(said).encode())
        return Examples(Source(x, y, ("",), (), digest.hexdigest(), said), torch.arange(len(x)), self.device, "flip", said)

    # --- reading --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def predict(self, examples: Examples, batch: int = 256) -> tuple[Tensor, Tensor]:
        named = len(examples.classes) + len(examples.extra) > 1 and all(examples.classes)
        names = self.classes_said(examples) if named else None
        found = []
        for b in examples.batches(batch):
            v = self.images(b["x"])
            found.append((v @ names.T if names is not None else (v * self.texts(b["text"])).sum(1, keepdim=True)).cpu())
        return torch.cat(found), examples.labels if named else torch.zeros(len(examples), dtype=torch.long)

    def classes_said(self, examples: Examples) -> Tensor:
        """Unit embeddings (K, D) of the classes and then of ``examples.extra``, each the mean over the ways to say it."""
        forms = examples.forms or self.forms
        rows = [F.normalize(self.texts([f.format(_spoken(c)) for f in forms]).mean(0), dim=-1) for c in examples.classes]
        for part in batches(len(examples.extra), NAMES):  # there may be thousands
            said = [f.format(_spoken(c)) for c in examples.extra[part] for f in forms]
            rows += F.normalize(self.texts(said).unflatten(0, (-1, len(forms))).mean(1), dim=-1)
        return torch.stack(rows)


class _Projections(nn.Module):
    """What lies between the towers and the shared space, under the names it has in transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        clip = model.config.model_type == "clip"
        self.visual_projection = model.visual_projection if clip else nn.Identity()
        self.text_projection = model.text_projection if clip else nn.Identity()
        self.logit_scale = model.logit_scale
        if not clip:
            self.logit_bias = model.logit_bias


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _instead(text: str, task: Task, stays: Sequence[str]) -> tuple[str, ...]:
    """What may be said instead of ``text``: the same with the anchor in the concept's place, else what stays."""
    for i, concept in enumerate(task.concepts):
        at = text.lower().find(concept.lower())
        if at >= 0 and task.anchors:
            return (text[:at] + task.anchor(i) + text[at + len(concept) :],)
        if at >= 0 and task.preserve:
            return tuple(text[:at] + p + text[at + len(concept) :] for p in task.preserve)
    return tuple(stays)


def _short(tokenize: Tokenize) -> Tokenize:
    """``tokenize`` without the padding that all rows share: CLIP reads from left to right and pools at the end of the text, so what
    follows changes nothing but the time."""

    def shorter(texts: Sequence[str]) -> Mapping[str, Tensor]:
        found = tokenize(texts)
        end = found["attention_mask"].sum(1).max() if "attention_mask" in found else found["input_ids"].argmax(1).max() + 1
        return {k: v[:, : int(end)] for k, v in found.items()}

    return shorter


def _words(tokenizer: Any, length: int, pad: str = "max_length") -> Tokenize:
    def tokenize(texts: Sequence[str]) -> Mapping[str, Tensor]:
        found = tokenizer(list(texts), padding=pad, truncation=True, max_length=length, return_tensors="pt")
        return {k: found[k] for k in ("input_ids", "attention_mask") if k in found}

    return tokenize


def _transformers(spec: str) -> tuple[Any, Tokenize, Mapping[str, Any]]:
    """The model, tokenizer and {"mean", "std"} of a folder or hub id."""
    from transformers import AutoModel, AutoTokenizer

    try:
        with quiet():
            found: Any = AutoModel.from_pretrained(spec, output_loading_info=True)
            tokenizer: Any = AutoTokenizer.from_pretrained(spec)
        model, info = found
    except Exception as error:  # what is wrong with a file can surface as anything
        raise RefusedError(f"the CLIP in {spec} cannot be read ({sentence(error).rstrip('.')}); copy or download it again") from error
    if type(model).__name__ not in KINDS.values():
        raise UsageError(f"{spec} is a {type(model).__name__}; this target takes {' or '.join(KINDS.values())}")
    if lost := [k for k in info["missing_keys"] if not k.endswith("position_ids")]:
        raise RefusedError(f"the weights in {spec} lack '{sorted(lost)[0]}' and are not used; copy or download them again")
    return model, _words(tokenizer, model.config.text_config.max_position_embeddings), _look(spec, model.config.model_type)


def _look(spec: str, kind: str) -> dict[str, Any]:
    """{"mean", "std"} of a folder or hub id: from transformers' files or open_clip's, else what its kind is usually trained with and
    "assumed", which says so."""
    ours = hub_config(spec, "preprocessor_config.json") or hub_config(spec, "processor_config.json").get("image_processor") or {}
    theirs = hub_config(spec, "open_clip_config.json").get("preprocess_cfg") or {}
    found = {"mean": ours.get("image_mean") or theirs.get("mean"), "std": ours.get("image_std") or theirs.get("std")}
    if found["mean"] and found["std"]:
        return found
    return {k: found[k] or v for k, v in USUAL[kind].items()} | {"assumed": _assumed(spec, "preprocessor_config.json", USUAL[kind])}


def _assumed(spec: str, lacks: str, look: Mapping[str, Any]) -> str:
    mean, std = (", ".join(f"{v:.3f}" for v in look[k]) for k in ("mean", "std"))
    return (
        f"{spec} has no {lacks}, which says how images are normalized; mean ({mean}) and std ({std}) are assumed, and all numbers are "
        "wrong if it was trained with others"
    )


def _sizes(kind: str, side: int) -> dict[str, Any]:
    """What an image processor of transformers is told of the pictures' size."""
    if kind == "siglip":
        return {"size": {"height": side, "width": side}}
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def _open_clip(spec: str) -> tuple[Any, Tokenize, Mapping[str, Any]]:
    """As ``_transformers``, of an open_clip model; its weights are put under transformers' names."""
    from transformers import CLIPConfig, CLIPModel

    try:
        import open_clip
    except ImportError:
        raise UsageError("open_clip is not installed; run pip install 'unlearners[open_clip]'") from None
    file, _, named = spec.rpartition("@") if "@" in spec else ("", "", spec)
    name, _, tag = named.removeprefix(OPEN_CLIP).partition("/")
    found: Any = open_clip.get_model_config(name)
    if found is None:
        raise UsageError(f"open_clip has no model '{name}'; see open_clip.list_models(), and write {OPEN_CLIP}NAME/TAG")
    own = clip_maps.config({**found, "quick_gelu": found.get("quick_gelu") or tag == "openai"})
    try:
        if file:
            state = patch.read_tensors(Path(file))
        elif tag:
            state = open_clip.create_model(name, pretrained=tag).state_dict()
        else:
            raise UsageError(f"'{spec}' names no weights; write {OPEN_CLIP}{name}/TAG, or weights-file@{OPEN_CLIP}{name}")
    except (OSError, RuntimeError) as error:
        raise RefusedError(f"the weights of {spec} cannot be read ({sentence(error).rstrip('.')}); copy or download them again") from error
    model: Any = CLIPModel(CLIPConfig(**own))
    given, wanted = clip_maps.to_transformers(state), {k: v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    if odd := sorted({*given} ^ {*wanted} | {k for k, v in given.items() if k in wanted and v.shape != wanted[k].shape}):
        raise RefusedError(f"'{odd[0]}' of {spec} and {name} do not match; name the architecture it was trained with")
    model.load_state_dict(given, strict=False)
    tokenizer: Any = open_clip.get_tokenizer(name)

    def tokenize(texts: Sequence[str]) -> Mapping[str, Tensor]:
        return {"input_ids": tokenizer(list(texts))}

    look = found.get("preprocess_cfg") or (open_clip.get_pretrained_cfg(name, tag) if tag and not file else None) or {}
    if look.get("mean") and look.get("std"):
        return model, tokenize, {"mean": look["mean"], "std": look["std"]}
    assumed = _assumed(spec, "preprocess_cfg in open_clip's configuration", USUAL["clip"])
    return model, tokenize, {**USUAL["clip"], "assumed": assumed}
