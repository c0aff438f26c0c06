"""ESD here against plain PyTorch in the order of the authors' 2023 code, on the same model, concept, weights and settings.

    python bench/perf/esd.py --updates 200 --repeats 2 --two-calls

Both train the cross-attention on one prompt with the same Adam for as many updates at the same batch. The official order samples x_t for
every update, by a partial DDIM denoising of 0 to 49 steps of the model in training, and keeps a second full network as the teacher.
Ours is preset ``fast``, whose pool of trajectories is built within the time of its run: the preset's 200 updates, or ``--updates``.
The last line is one JSON object; its seconds are for one update. ``ours_preset`` is the preset as it is, with 8 states in an update.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from statistics import mean, median
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearners.base import Task
from unlearners.diffusion import TrajectoryPool
from unlearners.meter import Meter
from unlearners.methods.esd import ESD
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import load

S, GUIDANCE, ETA = 50, 3.0, 1.0  # of the 2023 code
FAST = ESD(**ESD.presets["fast"], params="xattn")  # of a style


# --- the official order -------------------------------------------------------------------------------------------
def official(
    target: StableDiffusion, task: Task, updates: int, batch: int, lr: float, log: Callable[[float], None], *, separate: bool = False
) -> None:
    """Sample, ask the teacher twice, take one step. ``separate`` guides with two calls of the network, else with one of twice the rows.

    Every 50 updates hold each of the 50 lengths once, so that the mean length is that of uniform drawing.
    """
    unet, scheduler = target.pipe.unet, deepcopy(target.scheduler)
    teacher = deepcopy(unet).requires_grad_(False).eval()
    chosen = [p for n, p in unet.named_parameters() if "attn2" in n]
    opt = torch.optim.Adam([p.requires_grad_() for p in chosen], lr=lr)
    with torch.no_grad():
        c = target.encode([task.said[0]]).states.expand(batch, -1, -1)
        null = target.encode([""]).states.expand(batch, -1, -1)
    scheduler.set_timesteps(S, device=target.device)
    lengths = torch.cat([torch.randperm(S) for _ in range(-(-updates // S))])[:updates]
    for stop in lengths.tolist():
        x = torch.randn(batch, *target.latent_shape).to(target.device)
        with torch.no_grad():
            for t in scheduler.timesteps[:stop]:
                if separate:
                    e_0, e_c = unet(x, t, null).sample, unet(x, t, c).sample
                else:
                    e_0, e_c = unet(torch.cat([x, x]), t, torch.cat([null, c])).sample.chunk(2)
                x = scheduler.step(e_0 + GUIDANCE * (e_c - e_0), t, x).prev_sample
            t = (scheduler.timesteps[stop] + torch.randint(1000 // S, ()).to(target.device)).clamp(max=999)
            e_0, e_c = teacher(x, t, null).sample, teacher(x, t, c).sample
        loss = F.mse_loss(unet(x, t, c).sample, e_0 - ETA * (e_c - e_0))
        opt.zero_grad()
        loss.backward()
        opt.step()
        log(loss.item())
    unet.requires_grad_(False)


# --- measuring ----------------------------------------------------------------------------------------------------
def ours(target: StableDiffusion, task: Task, updates: int, batch: int, lr: float, log: Callable[[float], None]) -> None:
    replace(FAST, steps=updates, batch=batch, lr=lr)(target, task, seed=torch.initial_seed(), log=lambda row: log(row["loss"]))


def preset(target: StableDiffusion, task: Task, updates: int, batch: int, lr: float, log: Callable[[float], None]) -> None:
    replace(FAST, steps=updates)(target, task, seed=torch.initial_seed(), log=lambda row: log(row["loss"]))


@torch.no_grad()
def held_out(target: StableDiffusion, old: StableDiffusion, task: Task, states: tuple[Tensor, Tensor]) -> float:
    """ESD's loss at states neither side trained on: what both are to lower."""
    (x_t, t), c, null = states, old.encode([task.said[0]]), old.encode([""])
    e_0, e_c = old.eps(x_t, t, null.repeat(len(t))), old.eps(x_t, t, c.repeat(len(t)))
    return F.mse_loss(target.eps(x_t, t, c.repeat(len(t))), e_0 - ETA * (e_c - e_0)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="canvas")
    parser.add_argument("--task", default="canvas/neon")
    parser.add_argument("--updates", type=int, default=FAST.steps, help="of each side; below 200 our pool serves fewer than in the preset")
    parser.add_argument("--repeats", type=int, default=2, help="of each side, in turn")
    parser.add_argument("--batch", type=int, default=1, help="states in an update")
    parser.add_argument("--lr", type=float, default=5e-5, help="of both sides; the preset's own is for 8 states")
    parser.add_argument("--two-calls", action="store_true", help="also time the official order with guidance in two calls of the network")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(compare(args)))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    old, task = StableDiffusion.load(args.target, device=args.device), load(args.task)
    task = replace(task, prompts=task.said[:1])
    torch.manual_seed(1234)
    pool = TrajectoryPool()
    c, null = old.encode(list(task.said)).detach().repeat(8), old.encode([""]).detach().repeat(8)
    pool.fill(old, c, null, torch.zeros(8), scheduler=old.scheduler, steps=S, guidance=GUIDANCE)
    x_t, t, _ = pool.draw(128)
    sides: dict[str, Callable[..., None]] = {"ours": ours, "official_order": official, "ours_preset": preset}
    if args.two_calls:
        sides["official_order_two_calls"] = partial(official, separate=True)
    wall, cpu, last, after = ({s: list[float]() for s in sides} for _ in range(4))
    peak = 0
    for seed in range(args.repeats):
        for name, side in sides.items():
            model = StableDiffusion.load(args.target, device=args.device)
            losses: list[float] = []
            torch.manual_seed(seed)
            start = process_time()
            with Meter(model.device) as meter:
                side(model, task, args.updates, args.batch, args.lr, losses.append)
            wall[name].append(meter.seconds / args.updates)
            cpu[name].append((process_time() - start) / args.updates)
            last[name].append(mean(losses[-50:]))
            after[name].append(held_out(model, old, task, (x_t, t)))
            peak = peak or meter.peak  # a process remembers its peak, so only the first run is ours alone
            spent = f"{1000 * wall[name][-1]:.0f} ms an update, {1000 * cpu[name][-1]:.0f} of CPU"
            print(f"{name}: {spent}, held-out loss {after[name][-1]:.4f}", flush=True)
    mid, busy = ({s: median(v) for s, v in seconds.items()} for seconds in (wall, cpu))
    theirs = [s for s in sides if s.startswith("official")]
    return {
        "name": "esd", "ours_s": mid["ours"], "official_order_s": mid["official_order"], "ratio": mid["official_order"] / mid["ours"],
        "peak_bytes": peak, "device": args.device, "target": args.target, "task": args.task, "updates": args.updates,
        "batch": args.batch, "lr": args.lr, "repeats": args.repeats, "threads": args.threads,
        "pool": FAST.pool, "pool_serves": args.updates,
        "cpu_ratio": busy["official_order"] / busy["ours"],
        "ratios": {s: mid[s] / mid["ours"] for s in theirs}, "cpu_ratios": {s: busy[s] / busy["ours"] for s in theirs},
        "ours_preset_batch": FAST.batch,
        "cpu_ratio_per_state": busy["official_order"] / args.batch / (busy["ours_preset"] / FAST.batch),
        "seconds": wall, "cpu_seconds": cpu, "loss_last_50": last, "loss_held_out_after": after,
        "loss_held_out_before": held_out(old, old, task, (x_t, t)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
