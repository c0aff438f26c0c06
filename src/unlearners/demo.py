"""The main job in one command: forget a style and an object with two methods, attack, measure, report."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

TASKS = ("canvas/neon", "canvas/fish")
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (("esd", {"preset": "fast", "eta": 5.0}), ("uce", {}))
ATTACKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("random_tokens", {"tries": 4}),
    ("unlearndiffatk", {"preset": "fast", "timesteps": 4}),
)


def demo(out: str | Path = "runs/demo", *, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Erase ``neon`` and ``fish`` from the canvas with ESD and UCE, attack each, evaluate, report; resumes where it stopped.

    Returns {"report": path, "rows": [{"task", "method", metric: value …}]}.
    """
    import torch

    from . import registry, run
    from .report import report

    torch.set_num_threads(1)  # nets this small gain nothing from a second thread, and two such processes would fight
    rows, folders = [], []
    with run.progress_bars() if progress else nullcontext() as bars:
        for task in TASKS:
            for name, fields in METHODS:
                folder = run.erase(registry.make("methods", name, **fields), "canvas", task, runs=out, seed=seed, progress=bars)
                for attack, settings in ATTACKS:
                    run.attack(registry.make("attacks", attack, **settings), folder, seed=seed, prompts=8, progress=bars)
                run.evaluate(folder, seeds=(188,), progress=bars)
                values = {r["metric"]: r["value"] for r in run.results(folder)}
                rows.append({"task": task, "method": name, **values})
                folders.append(folder)
    return {"report": str(report(folders)), "rows": rows}
