"""Textual inversion: a concept's pictures as a few soft token embeddings, with neither tokenizer nor embedding table touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .diffusion import Cond, Soft
from .errors import UsageError


def find(target: Any, prompt: str, phrase: str) -> list[int]:
    """The positions of every token of ``phrase`` in ``prompt``, wherever it stands.

    Raises ``UsageError`` when the phrase has no token or does not stand in the prompt as the text encoder reads it.
    """
    ids, wanted = target.tokens([prompt])[0].tolist(), words(target, phrase)
    n = len(wanted)
    if not n:
        raise UsageError(f"'{phrase}' has no token for this text encoder; write the concept in words that it knows")
    starts = [i for i in range(len(ids) - n + 1) if ids[i : i + n] == wanted]
    if not starts:
        raise UsageError(f"'{prompt}' does not hold '{phrase}' within the {len(ids)} tokens of this text encoder; shorten the prompt")
    return sorted({i + j for i in starts for j in range(n)})


def words(target: Any, phrase: str) -> list[int]:
    """The token ids of ``phrase``, without start, end and padding."""
    return [i for i in target.tokens([phrase])[0].tolist() if i not in target.special]


class Inversion:
    """Textual inversion (Gal et al., ICLR 2023) of C concepts at once: k pseudo-tokens e_c for each.

        min over e_c of E_{t, eps} || eps - eps_theta(x_t, t, tau(template with e_c)) ||²      (v in place of eps, where v is predicted)

    x_0 are latents of pictures of concept c. Only e is trained, by AdamW; each concept's search is the one it would have alone. The
    embeddings start as the tokens of the concept's name and, where those run out, as N(0, 1). After each update their length goes
    toward ``norm`` by the share min(1, 100 lr) (Forget-Me-Not's recipe, after cloneofsimo/lora). Stateful, for ``Target.steps``.
    """

    def __init__(
        self,
        target: Any,
        names: Sequence[str],
        *,
        template: str = "a photo of {}",
        k: int = 4,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup: int = 0,
        norm: float = 0.4,
    ) -> None:
        """``names``: one for each concept. ``warmup``: updates until the full ``lr``. ``norm`` 0 leaves the lengths alone.

        Raises ``UsageError`` when the template with k tokens is longer than the text encoder reads.
        """
        target.differentiable()
        self.target, self.lr, self.warmup, self.norm, self.age = target, lr, warmup, norm, 0
        before, _, after = template.partition("{}")
        filler = "x " * k  # one letter is one token of every such tokenizer; its own embedding is never used
        self.prompt = " ".join(f"{before} {filler} {after}".split())
        self.at, length = 1 + len(words(target, before)), target.tokens([""]).shape[1]
        if self.at + k >= length:
            raise UsageError(f"{k} pseudo-tokens in '{template}' do not fit the {length} tokens of this text encoder; lower k")
        self.e = [self._start(tower, names, k) for n, tower in target.modules.items() if n.startswith("text_encoder")]
        self.opt = torch.optim.AdamW(self.e, lr=lr, weight_decay=weight_decay)

    def _start(self, tower: Any, names: Sequence[str], k: int) -> Tensor:
        """Start values (C, k, D) for one text encoder."""
        table = tower.get_input_embeddings().weight.detach().float()
        e = torch.randn(len(names), k, table.shape[1]).to(table)
        for c, name in enumerate(names):
            known = words(self.target, name)[:k]
            e[c, : len(known)] = table[known]
        return e.requires_grad_()

    @property
    def slots(self) -> list[int]:
        """The positions of the pseudo-tokens in the prompt."""
        return list(range(self.at, self.at + self.e[0].shape[1]))

    def soft(self, who: Tensor) -> Soft:
        """The embeddings of concepts ``who`` (B,): (B, k, D) for each text encoder."""
        return Soft(tuple(e[who] for e in self.e), self.at)

    def encode(self, who: Tensor) -> Cond:
        """The template's conditioning for concepts ``who`` (B,)."""
        cond: Cond = self.target.encode([self.prompt] * len(who), self.soft(who))
        return cond

    def step(self, x_0: Tensor, who: Tensor) -> float:
        """One update on latents x_0 (B, 4, h, w) of concepts ``who`` (B,), t uniform; returns the mean squared error."""
        self.opt.param_groups[0]["lr"] = lr = self.lr * min(1.0, (self.age + 1) / max(1, self.warmup))
        self.age += 1
        eps = torch.randn(x_0.shape).to(x_0)
        t = self.target.process.draw(len(x_0), device=x_0.device)
        out = self.target.eps(self.target.add_noise(x_0, eps, t), t, self.encode(who))
        error = (out.float() - self.target.goal(x_0, eps, t).float()).square().mean((1, 2, 3))  # (B,)
        share = who.bincount().to(error)[who]  # a concept's rows count as its mean, so that the others' do not matter to it
        grads = torch.autograd.grad((error / share).sum(), self.e)  # of e alone: the weights get no gradient
        for e, g in zip(self.e, grads, strict=True):
            e.grad = g
        self.opt.step()
        if self.norm:
            for e in self.e:
                length = e.detach().norm(dim=-1, keepdim=True)
                e.data *= (length + min(1.0, 100 * lr) * (self.norm - length)) / length
        return float(error.detach().mean())

    def length(self) -> float:
        """The mean length of the embeddings."""
        return torch.cat([e.detach().norm(dim=-1).flatten() for e in self.e]).mean().item()

    def state_dict(self) -> dict[str, Any]:
        return {"e": [e.detach().clone() for e in self.e], "opt": self.opt.state_dict(), "age": self.age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for e, saved in zip(self.e, state["e"], strict=True):
            e.data.copy_(saved)
        self.opt.load_state_dict(state["opt"])
        self.age = state["age"]
