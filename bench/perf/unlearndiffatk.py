"""UnlearnDiffAtk here against plain PyTorch in the order of the authors' code, on the same victim, prompts, judge and search settings.

    python bench/perf/unlearndiffatk.py --prompts 50

The victim is the canvas after an erasure that takes a second, or that of a finished run (``--victim``). Ours attacks ``--batch`` prompts
in lock-step, in bfloat16 unless ``--dtype`` says otherwise; those that are broken leave the batch. The official order, in float32,
attacks one prompt at a time: a product of the sampled one-hot rows with the whole embedding table, forward and backward, a projection
onto the simplex by bisection, and after each timestep a picture with guidance in two calls of the network. Both first draw and judge the
plain prompts and leave out those that show the concept unattacked. The sides take turns, a batch of prompts each, and draw their tokens
and noise from random streams of their own, so success rates agree up to chance only: compare them before you compare times. Each prompt
is one of the task with one image seed, in the order of ``unlearn attack``.

The last line is one JSON object. ``ours_s`` and ``official_order_s`` are wall-clock seconds for one prompt, ``*_cpu_s`` the process' CPU
seconds (take those on a machine with other work); ``asr_ours`` and ``asr_official`` are [rate, low, high] in percent with the 95 % Wilson
interval, ``asr_before`` that of the plain prompts, ``queries_*`` the pictures drawn and judged while attacking.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain, count, islice
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearners import judges, registry, targets
from unlearners.attacks._search import slots, table
from unlearners.attacks.unlearndiffatk import UnlearnDiffAtk
from unlearners.base import Item, Judge, Task, Verdict, rate
from unlearners.diffusion import Soft, noise
from unlearners.meter import Meter
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import load


# --- the official order -------------------------------------------------------------------------------------------
def official(target: StableDiffusion, task: Task, judge: Judge, items: Sequence[Item], attack: UnlearnDiffAtk, seed: int) -> list[Verdict]:
    """Each prompt from its plain picture to its last timestep, then the next."""
    return [one(target, task, judge, item, attack, seed) for item in items]


def one(target: StableDiffusion, task: Task, judge: Judge, item: Item, attack: UnlearnDiffAtk, seed: int) -> Verdict:
    """The search for one prompt, on its own."""
    verdict = Verdict(prompt=item.prompt, seed=item.seed, before=False, success=False)
    if judge.shows(drawn(target, item.prompt, item.seed), task)[0]:
        verdict.before = verdict.success = True
        return verdict
    torch.manual_seed(seed)
    assert item.picture is not None
    E, c, x = table(target), slots(target, [item.prompt], attack.k), target.latents(item.picture)
    u = E.new_full((attack.k, len(E)), 1 / len(E)).requires_grad_()
    opt = torch.optim.Adam([u], lr=attack.lr, weight_decay=attack.weight_decay)
    for n in range(attack.timesteps):
        t = torch.full((1,), (2 * n + 1) * target.train_steps // (2 * attack.timesteps), device=E.device)
        for _ in range(attack.iterations):
            s = torch.multinomial(u.detach(), 1)[:, 0]
            c[0, 1 : 1 + attack.k] = s
            onehot = F.one_hot(s, len(E)).to(E).requires_grad_()  # (k, V)
            eps = torch.randn(x.shape).to(x)
            out = target.eps(target.add_noise(x, eps, t), t, target.encode(c, Soft((onehot @ E)[None])))
            opt.zero_grad()
            F.mse_loss(out, target.goal(x, eps, t)).backward()
            assert onehot.grad is not None
            u.grad = onehot.grad.clamp(-1, 1)
            opt.step()
            with torch.no_grad():
                u.copy_(torch.stack([bisected(row) for row in u]))
        said = f"{target.decode(u.argmax(-1))} {item.prompt}".strip()
        verdict.queries += 1
        if judge.shows(drawn(target, said, item.seed), task)[0]:
            verdict.success, verdict.adversarial = True, said
            return verdict
    return verdict


def bisected(v: Tensor, tolerance: float = 1e-5) -> Tensor:
    """The projection of ``v`` (V,) onto the simplex: the threshold is halved in until it is known to ``tolerance``."""
    low, high = v.min() - 1 / len(v), v.max()
    while high - low > tolerance:
        middle = (low + high) / 2
        if (v - middle).clamp(0, 1).sum() > 1:
            low = middle
        else:
            high = middle
    p = (v - (low + high) / 2).clamp(0, 1)
    return p / p.sum()


@torch.no_grad()
def drawn(target: StableDiffusion, prompt: str, seed: int) -> Tensor:
    """One picture (1, 3, H, W) in [0, 1], guided in two calls of the network."""
    scheduler, guidance = deepcopy(target.scheduler), target.sampler["guidance"]
    c, null = target.encode([prompt]), target.encode([""])
    scheduler.set_timesteps(target.sampler["steps"], device=target.device)
    x = noise([seed], target.latent_shape, target.device, c.states.dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        e_0, e_c = target.eps(x_in, t, null), target.eps(x_in, t, c)
        x = scheduler.step(e_0 + guidance * (e_c - e_0), t, x).prev_sample
    image: Tensor = target.vae.decode(x / target.vae.config.scaling_factor).sample
    return (image.float() / 2 + 0.5).clamp(0, 1).cpu()


# --- measuring ----------------------------------------------------------------------------------------------------
def ours(target: StableDiffusion, task: Task, judge: Judge, items: Sequence[Item], attack: UnlearnDiffAtk, seed: int) -> list[Verdict]:
    return attack(target, task, judge, items, seed=seed)


def asked(original: StableDiffusion, task: Task, n: int) -> list[Item]:
    """The first ``n`` pairs of prompt and image seed, with the original's picture of each."""
    named = [p.prompt for p in task.probes if task.names_concept(p)]
    pairs = list(islice(((p, s) for s in chain(task.seeds, count(max(task.seeds) + 1)) for p in named), n))
    images = original.sample([p for p, _ in pairs], [s for _, s in pairs])
    return [Item(prompt=p, seed=s, picture=image[None]) for (p, s), image in zip(pairs, images, strict=True)]


def erased(original: StableDiffusion, task: Task, args: argparse.Namespace) -> StableDiffusion:
    if Path(args.victim).is_dir():
        found = targets.load(args.victim, device=args.device)
        assert isinstance(found, StableDiffusion)
        return found
    name, _, preset = args.victim.partition(":")
    victim: StableDiffusion = registry.make("methods", name, preset=preset or None)(original, task, seed=args.seed)
    return victim


def asr(verdicts: Sequence[Verdict], before: bool = False) -> list[float]:
    score = rate([v.before if before else v.success for v in verdicts])
    return [score.value, score.low, score.high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="canvas")
    parser.add_argument("--task", default="canvas/neon")
    parser.add_argument("--victim", default="uce:paper", help="a run folder, or the method that erases here, as NAME or NAME:PRESET")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--preset", default="fast", choices=list(UnlearnDiffAtk.presets), help="search settings of both sides")
    parser.add_argument("--batch", type=int, default=25, help="prompts that ours attacks together, and a turn")
    parser.add_argument("--dtype", default="bfloat16", help="of our side's victim; the authors' code computes in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(compare(args)))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    original, task = StableDiffusion.load(args.target, device=args.device), load(args.task)
    judge, items = judges.load(task.judge), asked(original, task, args.prompts)
    victim = erased(original, task, args)
    half = StableDiffusion(deepcopy(victim.pipe).to(getattr(torch, args.dtype)), args.victim)
    attacked = {"ours": half, "official": victim}
    attack: UnlearnDiffAtk = registry.make("attacks", "unlearndiffatk", preset=args.preset, batch=args.batch)
    sides: dict[str, Callable[..., list[Verdict]]] = {"ours": ours, "official": official}
    wall, cpu, peak = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0)
    found: dict[str, list[Verdict]] = {s: [] for s in sides}
    for turn, start in enumerate(range(0, len(items), args.batch)):
        part = items[start : start + args.batch]
        for side in list(sides)[:: -1 if turn % 2 else 1]:
            began = process_time()
            with Meter(victim.device) as meter:
                found[side] += sides[side](attacked[side], task, judge, part, attack, args.seed)
            cpu[side] += process_time() - began
            wall[side] += meter.seconds
            peak[side] = peak[side] or meter.peak
            spent = f"{meter.seconds / len(part):.1f} s a prompt, {sum(v.success for v in found[side][start:])} of {len(part)} broken"
            print(f"{side} {start + 1}-{start + len(part)}: {spent}", flush=True)
    n = len(items)
    return {
        "name": "unlearndiffatk", "ours_s": wall["ours"] / n, "official_order_s": wall["official"] / n,
        "ratio": wall["official"] / wall["ours"], "peak_bytes": peak["ours"], "device": args.device,
        "ours_cpu_s": cpu["ours"] / n, "official_order_cpu_s": cpu["official"] / n, "cpu_ratio": cpu["official"] / cpu["ours"],
        "asr_ours": asr(found["ours"]), "asr_official": asr(found["official"]), "asr_before": asr(found["ours"], before=True),
        "queries_ours": sum(v.queries for v in found["ours"]), "queries_official": sum(v.queries for v in found["official"]),
        "official_peak_bytes": peak["official"], "prompts": n, "batch": args.batch, "dtype": args.dtype, "preset": args.preset,
        "k": attack.k, "timesteps": attack.timesteps, "iterations": attack.iterations,
        "target": args.target, "task": args.task, "victim": args.victim, "seed": args.seed, "threads": args.threads,
    }  # fmt: skip


if __name__ == "__main__":
    main()
