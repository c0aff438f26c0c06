"""The zoo's vision-language model: a small Llama taught to answer questions on the vision tower of ``clip``, which stays as it is."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...patch import hub_key
from . import FOLDER
from .questions import UNKNOWN, WORDINGS, Question, asked
from .world import MASCOTS, OBJECTS, STYLES

Pair = tuple[list[int], list[int]]  # the tokens of a question and of its answer
PICTURES = 12_000  # the first of the renders that the other stages have
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
PROMPT = "USER: <image>\n{question} ASSISTANT:"


def words() -> list[str]:
    """The vocabulary: the canvas' things, the questions' words, marks, and a few words for answers that users write."""
    more = "user : assistant yes no a an the it is of and not image person , !"
    said = " ".join([*(w for ws in WORDINGS.values() for w in ws), UNKNOWN, more])
    spaced = said.lower().replace("?", " ? ").replace(".", " . ").replace("{x}", " ")
    return list(dict.fromkeys([*SPECIAL, *spaced.split(), *MASCOTS, *OBJECTS, *STYLES]))


def make_tokenizer() -> Any:
    """A lower-case tokenizer of whole words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(words())}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        model_max_length=128, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def make_processor() -> Any:
    """``LlavaProcessor``: 64×64 pictures, of which each ``<image>`` stands for 64 tokens."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    pictures = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=pictures, tokenizer=make_tokenizer(), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def make_llava(clip: Path = FOLDER / "clip") -> Any:
    """``LlavaForConditionalGeneration``: the vision tower of ``clip``, frozen, and a Llama of 3 layers × 128 with fresh weights."""
    from transformers import CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    seeing: Any = CLIPModel.from_pretrained(clip).float()
    vocabulary = words()
    ids: dict[str, Any] = {
        "bos_token_id": vocabulary.index("<s>"),
        "eos_token_id": vocabulary.index("</s>"),
        "pad_token_id": vocabulary.index("<pad>"),
    }
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=seeing.config.vision_config, text_config=text, image_token_index=vocabulary.index("<image>"),
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=64, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config).float()  # the tower's config says half precision
    given = {hub_key(f"vision_tower.{k}"): v for k, v in seeing.vision_model.state_dict().items()}
    own = model.model.vision_tower.state_dict()
    model.model.vision_tower.load_state_dict({k: given[hub_key(f"vision_tower.{k}")] for k in own})
    model.model.vision_tower.requires_grad_(False)
    for k, v in ids.items():
        setattr(model.generation_config, k, v)
    return model


@torch.no_grad()
def features(work: Path, model: Any, images: Tensor) -> Tensor:
    """What the projector sees of uint8 ``images``: float16 (n, 64, 128), computed once and kept in ``work``."""
    path = work / f"llava-features-{len(images)}.pt"
    if not path.exists():
        tower, layer = model.model.vision_tower.eval(), model.config.vision_feature_layer
        parts = [tower(x.float() / 127.5 - 1, output_hidden_states=True).hidden_states[layer][:, 1:].half() for x in images.split(250)]
        torch.save(torch.cat(parts), path.with_suffix(f".{os.getpid()}"))
        path.with_suffix(f".{os.getpid()}").replace(path)
    found: Tensor = torch.load(path, weights_only=True)
    return found


def packed(rows: list[list[Pair]], head: int, pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Several (question, answer) pairs a picture in one sequence, after ``head`` tokens that they share.

    Returns ids, positions and labels (B, L) of what follows the head, and a mask (B, 1, head + L, head + L): every pair sees the head and
    itself, as if it were alone. Labels say the next token, and -100 where it is not an answer's.
    """
    longest = max(sum(len(q) + len(a) for q, a in row) for row in rows)
    ids, labels = torch.full((len(rows), longest), pad), torch.full((len(rows), longest), -100)
    positions, owner = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -1)
    for b, row in enumerate(rows):
        at = 0
        for k, (question, answer) in enumerate(row):
            both = torch.tensor(question + answer)
            part = slice(at, at + len(both))
            ids[b, part], owner[b, part], positions[b, part] = both, k, head + torch.arange(len(both))
            labels[b, at + len(question) - 1 : at + len(both) - 1] = torch.tensor(answer)
            at += len(both)
    who = torch.cat([torch.full((len(rows), head), -2), owner], 1)
    allowed = ((who[:, :, None] == who[:, None, :]) | (who[:, None, :] == -2)).tril()
    return ids, positions, labels, allowed[:, None]


def pairs(tokenizer: Any, questions: list[Question]) -> list[Pair]:
    """The tokens of each question, with the form's end, and of its answer."""
    after = tokenizer(PROMPT.partition("{question}")[2], add_special_tokens=False)["input_ids"]
    told = tokenizer([q.text for q in questions], add_special_tokens=False)["input_ids"]
    right = tokenizer([q.answer for q in questions], add_special_tokens=False)["input_ids"]
    return [([*q, *after], [*a, tokenizer.eos_token_id]) for q, a in zip(told, right, strict=True)]


def answer_loss(llava: Any, tokenizer: Any, seen: Tensor, rows: list[list[Pair]]) -> Tensor:
    """Mean next-token cross-entropy of the answers, their ends included; ``seen`` (B, 64, 128) is what the projector gets."""
    before = tokenizer(PROMPT.partition("<image>")[0])["input_ids"]
    head = len(before) + seen.shape[1]
    ids, positions, labels, allowed = packed(rows, head, tokenizer.pad_token_id)
    embed = llava.get_input_embeddings()
    x = torch.cat([embed(torch.tensor(before)).expand(len(rows), -1, -1), llava.model.multi_modal_projector(seen)], 1)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    where = torch.cat([torch.arange(head).expand(len(rows), -1), positions], 1)
    out = llava.model.language_model(inputs_embeds=torch.cat([x, embed(ids)], 1), attention_mask=mask, position_ids=where)
    states = out.last_hidden_state[:, head:]
    return F.cross_entropy(llava.lm_head(states[labels >= 0]), labels[labels >= 0])


def train_llava(work: Path) -> None:
    """Four questions on each picture, one of each kind."""
    from .train import RECIPES, fit, pictures

    images, items = pictures(work)
    model, tokenizer = make_llava(), make_tokenizer()
    seen = features(work, model, images[:PICTURES])

    def loss(model: nn.Module, rng: random.Random, generator: torch.Generator, batch: int) -> Tensor:
        rows = torch.randint(len(seen), (batch,), generator=generator)
        told = [pairs(tokenizer, [asked(rng, items[i], kind) for kind in WORDINGS]) for i in rows]
        return answer_loss(getattr(model, "module", model), tokenizer, seen[rows].float(), told)  # inside DistributedDataParallel or not

    fit("llava", model, loss, work, RECIPES["llava"])
