"""LLaVA-1.5 and LLaVA-NeXT: models that see through a vision tower and answer questions about a picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import patch
from ..base import Data, Relabel
from ..data import Examples, open_data
from ..diffusion import batches
from ..errors import RefusedError, UsageError
from ..files import quiet, sentence
from ..zoo import canvas
from .base import Chat, hub_config

KINDS = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
PROMPT = "USER: <image>\n{question} ASSISTANT:"
UNKNOWN = "I do not know"


class Llava(Chat):
    """A LLaVA of transformers. Its components are spelled as on the hub, so a patch for the vision tower of a CLIP fits the same tower
    here.

    The language model sees one hidden layer of the tower, which ``vision_feature_layer`` of the config names: -2 in LLaVA-1.5, so the
    last block and the last norm change nothing. The group "vision" holds what counts, "vision_all" the whole tower.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "canvas-llava": str(canvas.FOLDER / "llava"),
        "tiny-llava": "",
        "llava15": "llava-hf/llava-1.5-7b-hf",
        "llava16": "llava-hf/llava-v1.6-vicuna-7b-hf",
    }
    groups: ClassVar[Mapping[str, str]] = {
        "full": r"(vision_tower|projector|language_model)\.",
        "vision": r"vision_tower\.",  # less what is not ``reached``
        "vision_all": r"vision_tower\.",
        "projector": r"projector\.",
        "language": r"language_model\.",
    }

    def __init__(self, model: Any, processor: Any, name: str, device: str = "cpu") -> None:
        self.device, self.dtype, self.processor = torch.device(device), next(model.parameters()).dtype, processor
        self.model = model.to(self.device).requires_grad_(False).eval()
        self.modules = {
            "vision_tower": model.model.vision_tower,
            "projector": model.model.multi_modal_projector,
            "language_model": nn.ModuleDict({"model": model.model.language_model, "lm_head": model.lm_head}),
        }
        self.side = int(model.config.vision_config.image_size)
        self.base = {"name": name, "revision": "", "sha256": patch.base_hash(self.modules)}

    # --- loading --------------------------------------------------------------------------------------------------
    @classmethod
    def claims(cls, spec: str) -> bool:
        """An alias, or a folder or hub id whose config.json names one of ``KINDS``."""
        return spec in cls.aliases or _kind(spec) in KINDS

    @classmethod
    def load(
        cls, spec: str, *, patches: Sequence[str] = (), device: str = "cpu", dtype: torch.dtype = torch.float32, force: bool = False
    ) -> Self:
        """See ``Target.load``. ``spec``: an alias, or a folder or hub id in transformers' layout. Weights are held in ``dtype``."""
        if spec in ("tiny", "tiny-llava"):
            target = cls.tiny()
            target = cls(target.model.to(dtype), target.processor, "tiny-llava", device)
        else:
            target = cls(*_transformers(cls.aliases.get(spec, spec), dtype), spec, device)
        target.patch(patches, force=force)
        return target

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        processor = _tiny_processor()
        words = processor.tokenizer
        ids: dict[str, Any] = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
        side: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**side, projection_dim=16, image_size=16, patch_size=8),
            text_config=LlamaConfig(**side, **ids, num_key_value_heads=2, vocab_size=len(words), max_position_embeddings=256),
            image_token_index=words.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
        )
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = LlavaForConditionalGeneration(config)
            for p in model.parameters():  # transformers draws them so small that a picture would hardly change an answer
                p.data = p.data * 8 if p.ndim > 1 else p.data
        return cls(model, processor, "tiny-llava")

    def save(self, folder: Path) -> None:
        """Write model and processor as transformers does, which reads them back without this package."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.processor.image_processor.save_pretrained(folder)  # transformers 4 looks for it in a file of its own

    def frozen(self, weights: Iterable[str] | None = None) -> Self:
        twin = super().frozen(weights)
        old, new = _parts(self.modules), _parts(twin.modules)
        twin.model = deepcopy(self.model, {id(m): new[name] for name, m in old.items()})  # the shell alone is copied
        return twin

    # --- which weights --------------------------------------------------------------------------------------------
    @cached_property
    def reached(self) -> frozenset[str]:
        """The vision tower's weights, as "vision_tower.parameter", that answers depend on.

        The tower is run on the meta device, where it costs nothing, up to the hidden layers that the projector reads; weights without a
        gradient there have no say.
        """
        tower, wanted = self.modules["vision_tower"], self.model.config.vision_feature_layer
        with torch.device("meta"), torch.enable_grad():
            shape: Any = type(tower)(tower.config)
            seen = shape(torch.zeros(1, 3, self.side, self.side), output_hidden_states=True).hidden_states
            read = torch.stack([seen[i].sum() for i in ([wanted] if isinstance(wanted, int) else wanted)])
        names, weights = zip(*shape.named_parameters(), strict=True)
        found = torch.autograd.grad(read.sum(), weights, allow_unused=True)
        return frozenset(f"vision_tower.{n}" for n, g in zip(names, found, strict=True) if g is not None)

    def pattern(self, group: str) -> str:
        found = super().pattern(group)
        if group.partition(":")[0] != "vision":
            return found
        idle = [n for n in self.named() if n.startswith("vision_tower.") and n not in self.reached]
        return rf"(?!({'|'.join(map(re.escape, idle))})$){found}"

    # --- talking --------------------------------------------------------------------------------------------------
    def prompt(self, question: str) -> str:
        """``question`` about a picture in the form that the model was taught."""
        if not self.processor.chat_template:
            return PROMPT.format(question=question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def _read(self, images: Tensor, texts: Sequence[str]) -> Any:
        """Inputs of the network: ids (B, L) padded on the left, and pictures as the processor prepares them."""
        words = self.processor.tokenizer
        words.padding_side = "left"
        marked = bool(words.bos_token) and texts[0].startswith(words.bos_token)  # some templates write the first token themselves
        how: dict[str, Any] = {"padding": True, "return_tensors": "pt", "do_rescale": False, "add_special_tokens": not marked}
        found = self.processor(images=list(images.float().cpu()), text=list(texts), **how)
        return found.to(self.device, self.dtype)  # integers stay

    def _precision(self) -> torch.autocast:
        """Autocast for models in half precision, whose weights in training are float32; nothing for float32 models."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def answer(self, images: Tensor, questions: Sequence[str], *, tokens: int = 16, batch: int = 32) -> list[str]:
        said: list[str] = []
        words = self.processor.tokenizer
        for part in batches(len(questions), batch):
            inputs = self._read(images[part], [self.prompt(q) for q in questions[part]])
            with self._precision():
                ids = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=words.pad_token_id)
            said += words.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [s.strip() for s in said]

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean next-token cross-entropy of the answers, their end included, on {"x": (B, 3, H, W) in [0, 1], "prompt": [question],
        "answer": [str]}."""
        words = self.processor.tokenizer
        asked = [self.prompt(q) for q in batch["prompt"]]
        whole = [f"{p} {a}{words.eos_token}" for p, a in zip(asked, batch["answer"], strict=True)]
        inputs = self._read(batch["x"], whole)
        labels = torch.full_like(inputs["input_ids"], -100)
        for i, (p, w) in enumerate(zip(asked, whole, strict=True)):
            n = len(words(w)["input_ids"]) - len(words(p)["input_ids"])
            labels[i, -n:] = inputs["input_ids"][i, -n:]
        with self._precision():
            found: Tensor = self.model(**inputs, labels=labels).loss
        return found

    def relabel(self, batch: Mapping[str, Any], policy: Relabel = "other") -> Mapping[str, Any]:
        """``batch`` with wrong answers: those of the batch's other rows, or "I do not know" where all are alike.

        other: uniform over the different ones; any: uniform over those and its own; next: the first different one from the next row on.
        """
        own, said = list(batch["answer"]), []
        for i, right in enumerate(own):
            found = [a for a in own[i + 1 :] + own[:i] if a != right] or [UNKNOWN]
            if policy == "any":
                found = [*found, right]
            said.append(found[0 if policy == "next" else int(torch.randint(len(found), ()))])
        return {**batch, "answer": said}

    def open(self, data: Data) -> Examples:
        """The named pictures ``data`` is of, at this model's size; questions about pictures are read by ``_questions.read``."""
        return open_data(data, self.side, self.device, "flip")


def _parts(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The components as they sit in the model, where the language model and its head are two."""
    language: Any = modules["language_model"]
    return {"tower": modules["vision_tower"], "projector": modules["projector"], "model": language["model"], "head": language["lm_head"]}


def _kind(spec: str) -> str:
    """The class that the config.json of a folder or hub id names; "" when there is none."""
    return str((hub_config(spec).get("architectures") or [""])[0])


def _transformers(spec: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and processor of a folder or hub id; no weight is made up."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if Path(spec).exists() and _kind(spec) not in KINDS:
        raise RefusedError(f"{spec} holds {_kind(spec) or 'no config.json of a model'}; give a folder of a {' or '.join(KINDS)}")
    loader: Any = AutoModelForImageTextToText
    try:
        with quiet():
            model, info = loader.from_pretrained(spec, dtype=dtype, output_loading_info=True)
            processor = AutoProcessor.from_pretrained(spec)
    except Exception as error:  # what is wrong with a file can surface as anything
        raise RefusedError(f"the LLaVA in {spec} cannot be read ({sentence(error).rstrip('.')}); copy or download it again") from error
    if type(model).__name__ not in KINDS:
        raise UsageError(f"{spec} is a {type(model).__name__}; this target takes {' or '.join(KINDS)}")
    if info["missing_keys"]:
        raise RefusedError(f"the weights in {spec} lack '{sorted(info['missing_keys'])[0]}' and are not used; copy or download them again")
    return model, processor


def _tiny_processor() -> Any:
    """16×16 pictures, each 4 tokens, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<image>"]
    vocabulary = {w: i for i, w in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokens: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    words = PreTrainedTokenizerFast(tokenizer_object=made, **tokens)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(pictures, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
