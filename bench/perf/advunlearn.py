"""AdvUnlearn here against the same mathematics in plain PyTorch in the order of the official code, at the paper's settings.

    python bench/perf/advunlearn.py

Per iteration, each side attacks with K = 30 steps and trains on one concept state and five retain states. The official order samples
every state from noise: a random number of DDIM steps under guidance, one at a time for the attack, five at once for retaining; the
targets come from a second model, and the UNet's gradients are computed and never used. Ours reads a pool that is built once; its
seconds are shared among the 1000 iterations of a whole run. The warm-up is left out on both sides.

The last line is one JSON object. ``ours_s`` and ``official_order_s`` are seconds per iteration, ``*_cpu_s`` the process' CPU seconds
(on a machine with other work take ``cpu_ratio``); ``pool_s`` is the whole pool, ``loop_s`` an iteration without it. ``curve`` has the
mean and the standard error of the erase and retain losses and of the attack's last loss on both sides over equally many first
iterations, which begin at the same weights: they agree up to chance, since each side draws its own states. ``two_calls`` makes the
official side's guidance two calls, as some codes do, instead of one call of twice the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from dataclasses import dataclass, field
from statistics import mean, median, stdev
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor
from uce import sd14

from unlearners import retain
from unlearners.base import Task, sandbox
from unlearners.diffusion import Cond, Soft
from unlearners.meter import Meter
from unlearners.methods.advunlearn import AdvUnlearn
from unlearners.targets import DTYPES, load

ITERATIONS = 1000  # of the paper, which share the pool


# --- the official order -------------------------------------------------------------------------------------------
@dataclass
class Official:
    """Two models, one optimiser, nothing kept: every state is sampled when it is needed."""

    method: AdvUnlearn
    model: Any
    old: Any
    concept: str
    kept: list[str]
    two_calls: bool
    rows: list[dict[str, float]] = field(default_factory=list)
    opt: torch.optim.Adam | None = None

    @torch.no_grad()
    def sample(self, cond: Cond, steps: int) -> tuple[Tensor, Tensor]:
        """x_t and t after ``steps`` DDIM steps from noise, of one state for each row."""
        n, g, null = len(cond), self.method.guidance, self.old.encode([""]).repeat(len(cond))
        scheduler = DDIMScheduler.from_config(self.model.scheduler.config)
        scheduler.set_timesteps(self.method.sampler_steps, device=self.model.device)
        x = torch.randn(n, *self.model.latent_shape, device=self.model.device, dtype=cond.states.dtype)
        for t in scheduler.timesteps[:steps]:
            if self.two_calls:
                e_0, e_c = self.model.eps(x, t, null), self.model.eps(x, t, cond)
            else:
                e_0, e_c = self.model.eps(torch.cat([x, x]), t, Cond.cat([null, cond])).chunk(2)
            x = scheduler.step(e_0 + g * (e_c - e_0), t, x).prev_sample
        return x, scheduler.timesteps[steps].expand(n)

    def steps(self) -> int:
        return int(torch.randint(self.method.sampler_steps, ()))

    def targets(self, x: Tensor, t: Tensor, c: Cond) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.old.eps(x, t, self.old.encode([""])), self.old.eps(x, t, c)

    def attack(self, ids: Tensor, c: Cond) -> tuple[Tensor, float]:
        table = self.model.embed()
        delta = table[torch.randint(self.model.vocabulary, (1, 1))].float().detach().clone().requires_grad_()  # (1, 1, D)
        mover, loss = torch.optim.Adam([delta], lr=self.method.attack_lr), torch.zeros(())
        for _ in range(self.method.attack_steps):
            x, t = self.sample(c, self.steps())
            _, e_c = self.targets(x, t, c)
            loss = F.mse_loss(self.model.eps(x, t, self.model.encode(ids, Soft(delta, 1))).float(), e_c.float())
            delta.grad = None
            loss.backward()  # through the UNet, whose weights' gradients add up unread
            mover.step()
        return delta.detach(), loss.item()

    def iterate(self) -> None:
        m = self.method
        w = self.model.trainable(m.params)
        if self.opt is None:
            self.opt = torch.optim.Adam(w.values(), lr=m.lr)
        prompt = self.model.tokens([self.concept])
        ids = torch.cat([prompt[:, :1], prompt[:, 1:2], prompt[:, 1:-1]], 1)  # one slot before the concept
        self.model.modules["unet"].requires_grad_()
        with torch.no_grad():
            c = self.old.encode([self.concept])
        for p in w.values():
            p.requires_grad_(False)
        delta, attacked = self.attack(ids, c)
        for p in w.values():
            p.requires_grad_()
        T = self.steps()
        x, t = self.sample(c, T)
        e_0, e_c = self.targets(x, t, c)
        others = [self.kept[i] for i in torch.randperm(len(self.kept))[: m.retain_batch]]
        with torch.no_grad():
            held = self.old.encode(others)
        x_r, t_r = self.sample(held, T)
        with torch.no_grad():
            e_r = self.old.eps(x_r, t_r, held)
        e = self.model.eps(x, t, self.model.encode(ids, Soft(delta, 1)))
        erase = F.mse_loss(e.float(), (e_0 - m.eta * (e_c - e_0)).float())
        keep = F.mse_loss(self.model.eps(x_r, t_r, self.model.encode(others)).float(), e_r.float())
        self.opt.zero_grad()
        (erase + m.gamma * keep).backward()
        self.opt.step()
        self.rows.append({"erase": erase.item(), "retain": keep.item(), "attack": attacked})


# --- measuring ----------------------------------------------------------------------------------------------------
@dataclass
class Clock:
    """Wall-clock and CPU seconds between calls of ``lap``; ``skip`` leaves out what has just happened."""

    laps: list[tuple[float, float]] = field(default_factory=list)
    last: tuple[float, float] = (0.0, 0.0)

    def skip(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.last = (perf_counter(), process_time())

    def lap(self) -> None:
        before = self.last
        self.skip()
        self.laps.append((self.last[0] - before[0], self.last[1] - before[1]))


def peak(device: torch.device) -> int:
    """Bytes so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def curve(rows: list[dict[str, float]]) -> dict[str, list[float | None]]:
    """Mean and standard error of each loss."""
    found = {name: [row[name] for row in rows] for name in ("erase", "retain", "attack")}
    return {name: [mean(v), stdev(v) / len(v) ** 0.5 if len(v) > 1 else None] for name, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="canvas", choices=["tiny", "canvas", "sd14-geometry"], help="the last: random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of both sides")
    parser.add_argument("--official", type=int, default=12, help="iterations in the official order")
    parser.add_argument("--ours", type=int, default=2, help="iterations of ours before each of them, at least 2")
    parser.add_argument("--two-calls", action="store_true", help="guidance in two calls on the official side")
    parser.add_argument("--trajectories", type=int, default=AdvUnlearn.trajectories, help="of the concept, in the pool")
    parser.add_argument("--pool-gb", type=float, default=AdvUnlearn.pool_gb)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.official < 1 or args.ours < 2:
        parser.error("--official must be at least 1 and --ours at least 2")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UNLEARNERS_CACHE"] = folder  # no pool is found
        print(json.dumps(compare(args)))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    base = sd14(dtype, args.device) if args.net == "sd14-geometry" else load(args.net, device=args.device, dtype=args.dtype)
    canvas = args.net != "tiny"  # its tokenizer
    task = Task(name="perf", kind="style", concepts=("neon style" if canvas else "zq",))
    method = AdvUnlearn(steps=args.ours * args.official + 1, warmup=0, trajectories=args.trajectories, pool_gb=args.pool_gb)
    rows: list[dict[str, float]] = []
    mine, theirs, peaks = Clock(), Clock(), {"ours": 0, "official": 0}
    official: list[Official] = []

    def log(row: dict[str, float]) -> None:
        """After so many iterations of ours, one in the official order."""
        mine.lap()
        rows.append(row)
        if len(rows) > 1 and (len(rows) - 1) % args.ours == 0:
            peaks["ours"] = peaks["ours"] or peak(base.device)  # a process on a CPU remembers its peak, so the first time only
            if not official:
                model = base.frozen()
                official.append(Official(method, model, base, task.concepts[0], retain.prompts(model, task), args.two_calls))
            with Meter(base.device) as meter, sandbox(official[0].model, seed=len(rows)):
                theirs.skip()
                official[0].iterate()
                theirs.lap()
            peaks["official"] = max(peaks["official"], meter.peak)
            print(f"{len(rows)}: ours {mine.laps[-1]}, official order {theirs.laps[-1]} (wall-clock, CPU seconds)", flush=True)
        mine.skip()

    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    mine.skip()
    method(base.frozen(["text_encoder"]), task, seed=0, log=log)
    loop, each = ([median(lap[i] for lap in clock.laps[1 if clock is mine else 0 :]) for i in (0, 1)] for clock in (mine, theirs))
    built = [mine.laps[0][i] - loop[i] for i in (0, 1)]  # the first lap is the pool and one iteration
    total = [loop[i] + built[i] / ITERATIONS for i in (0, 1)]
    return {
        "name": "advunlearn", "ours_s": total[0], "official_order_s": each[0], "ratio": each[0] / total[0], "peak_bytes": peaks["ours"],
        "device": args.device, "official_peak_bytes": peaks["official"],
        "ours_cpu_s": total[1], "official_order_cpu_s": each[1], "cpu_ratio": each[1] / total[1],
        "net": args.net, "dtype": args.dtype, "threads": args.threads, "two_calls": args.two_calls,
        "iterations": {"ours": len(rows), "official": len(theirs.laps)},
        "attack_steps": method.attack_steps, "retain_batch": method.retain_batch, "trajectories": args.trajectories,
        "pool_s": built[0], "pool_cpu_s": built[1], "loop_s": loop[0], "loop_cpu_s": loop[1],
        "curve": {"ours": curve(rows[: len(theirs.laps)]), "official": curve(official[0].rows)},
    }  # fmt: skip


if __name__ == "__main__":
    main()
