"""SalUn here against a plain PyTorch loop in the order of the official code, on the same network, pictures and settings.

    python bench/perf/salun.py --net resnet18_cifar --images 1000 --epochs 2 --repeats 3

Both begin at the same trained weights and take as many steps on as many pictures. The last line is one JSON object; README.md says
what is in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from unlearners import saliency
from unlearners.base import Data, Task
from unlearners.data import Examples, open_data
from unlearners.meter import Meter
from unlearners.methods.retrain import Retrain
from unlearners.methods.salun import SalUn
from unlearners.targets import DTYPES
from unlearners.targets.classifier import Classifier

LR, MOMENTUM, DECAY, DENSITY = 0.013, 0.9, 5e-4, 0.5
RETRAIN, UNLEARN = 182, 10  # epochs of the paper's recipes


# --- the official order -------------------------------------------------------------------------------------------
class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Pictures that are decoded to PIL, augmented and made tensors one by one."""

    def __init__(self, examples: Examples) -> None:
        self.x = [x.permute(1, 2, 0).cpu().numpy() for x in examples.images]
        self.y = examples.labels.tolist()
        side = self.x[0].shape[0]
        self.change = transforms.Compose(
            [transforms.RandomCrop(side, padding=side // 8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.change(Image.fromarray(self.x[i])), self.y[i]


class Normalised(nn.Module):
    """The network with normalisation as its first layer."""

    def __init__(self, target: Classifier) -> None:
        super().__init__()
        self.net = target.modules["net"]
        self.mean, self.std = target.mean, target.std

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net((x - self.mean) / self.std)
        return out


def official_masks(model: nn.Module, forget: DataLoader[Any], device: str, folder: Path) -> dict[str, Tensor]:
    """int64 masks of ten densities by two full sorts each, all of them written to ``folder``, of which one is read back."""
    model.eval()
    total = {n: torch.zeros_like(p, device="cpu") for n, p in model.named_parameters()}
    for x, y in forget:
        loss = -F.cross_entropy(model(x.to(device)), y.to(device))
        model.zero_grad()
        loss.backward()
        for n, p in model.named_parameters():
            total[n] += p.grad.cpu()  # type: ignore[union-attr]
    total = {n: t.abs() for n, t in total.items()}
    for tenth in range(1, 11):
        flat = -torch.cat([t.flatten() for t in total.values()])
        ranks = torch.argsort(torch.argsort(flat))
        keep = (ranks < int(len(flat) * tenth / 10)).long()
        parts = keep.split([t.numel() for t in total.values()])
        masks = {n: part.view(t.shape) for (n, t), part in zip(total.items(), parts, strict=True)}
        torch.save(masks, folder / f"with_{tenth / 10}.pt")
    found: dict[str, Tensor] = torch.load(folder / f"with_{DENSITY}.pt", weights_only=True)
    return found


def official(target: Classifier, forget: Examples, retain: Examples, epochs: int, batch: int, device: str, folder: Path) -> None:
    """Mask, then in every epoch a pass over the forget set with random labels and a pass over the rest, one step a batch."""
    model: nn.Module = Normalised(target).to(memory_format=torch.contiguous_format).requires_grad_()
    D_f, D_r = (DataLoader(Pictures(e), batch, shuffle=True, num_workers=0) for e in (forget, retain))
    masks, classes = official_masks(model, D_f, device, folder), len(target.classes)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)
    model.train()
    for _ in range(epochs):
        for wrong, loader in ((True, D_f), (False, D_r)):
            for x, y in loader:
                labels = torch.randint(classes, y.shape) if wrong else y
                loss = F.cross_entropy(model(x.to(device)), labels.to(device))
                opt.zero_grad()
                loss.backward()
                for n, p in model.named_parameters():
                    p.grad *= masks[n].to(device)  # type: ignore[operator]
                opt.step()
                with torch.no_grad():
                    for n, p in model.named_parameters():
                        out = masks[n].to(device) == 0
                        if out.any():
                            p[out] = start[n][out]
                            opt.state[p]["momentum_buffer"][out] = 0
                loss.item()
    model.requires_grad_(False).eval()


# --- measuring ----------------------------------------------------------------------------------------------------
def listed(folder: Path, name: str, rows: Tensor, source: str) -> Data:
    """Rows of a source as an index file."""
    path = folder / f"{name}.txt"
    path.write_text("".join(f"{i}\n" for i in rows.tolist()))
    return Data(source=source, rows=str(path))


def accuracy(target: Classifier, examples: Examples) -> float:
    logits, y = target.predict(examples)
    return 100 * (logits.argmax(1) == y).double().mean().item()


@dataclass(frozen=True)
class Spent:
    """Wall-clock and CPU seconds of a block, and the peak memory."""

    wall: float
    cpu: float
    peak: int


def timed(device: str, what: Callable[[], Any]) -> Spent:
    cpu = process_time()
    with Meter(torch.device(device)) as meter:
        what()
    return Spent(meter.seconds, process_time() - cpu, meter.peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet18_cifar", help="architecture, for example resnet20_cifar")
    parser.add_argument("--data", default="canvas", help="source of the pictures")
    parser.add_argument("--images", type=int, default=1000, help="training pictures; a tenth is forgotten")
    parser.add_argument("--epochs", type=int, default=2, help="of unlearning")
    parser.add_argument("--original", type=int, default=8, help="epochs the original is trained for")
    parser.add_argument("--repeats", type=int, default=3, help="of each side, in turn")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="what our network computes in; the other side is float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(compare(args, Path(name))))


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device, side = args.device, 32
    everything = open_data(Data(source=args.data), side, device)
    rows = torch.randperm(len(everything))[: args.images]
    tenth = len(rows) // 10
    task = Task(
        name="perf", kind="samples", concepts=("a tenth",),
        forget=listed(folder, "forget", rows[:tenth], args.data), retain=listed(folder, "retain", rows[tenth:], args.data),
    )  # fmt: skip
    original = Classifier.fresh(args.net, everything.classes, side=side, device=device, dtype=DTYPES[args.dtype])
    forget, retain = original.open(task.forget), original.open(task.retain)
    recipe = Retrain(epochs=args.original, batch=128, lr=0.1, schedule="onecycle", cache=False)
    all_rows = Task(name="original", kind="samples", concepts=("nothing",), retain=listed(folder, "all", rows, args.data))
    recipe(original, all_rows, seed=0)
    again = Retrain(epochs=2, batch=args.batch, cache=False)  # the paper's Retrain, two of its epochs
    epoch_s = timed(device, partial(again, original.frozen(), task, seed=0)).wall / again.epochs
    print(f"original: {accuracy(original, forget):.1f} % of the forget set right; a Retrain epoch takes {epoch_s:.1f} s")

    spent: dict[str, list[Spent]] = {"ours": [], "official": []}
    masks: list[float] = []
    scores: dict[str, list[tuple[float, float]]] = {"ours": [], "official": []}
    size = 0
    for i in range(args.repeats):
        file = folder / f"saliency{i}.safetensors"
        method = SalUn(**{**SalUn.presets["release"], "epochs": args.epochs, "batch": args.batch, "lr": LR, "saliency_file": str(file)})
        log: list[dict[str, float]] = []
        model = original.frozen()
        spent["ours"].append(timed(device, partial(method, model, task, seed=i, log=log.append)))
        masks.append(log[0]["mask_seconds"])
        size = file.stat().st_size
        scores["ours"].append((accuracy(model, forget), accuracy(model, retain)))
        model = original.frozen()
        model.amp = torch.float32
        torch.manual_seed(i)
        spent["official"].append(timed(device, partial(official, model, forget, retain, args.epochs, args.batch, device, folder)))
        scores["official"].append((accuracy(model, forget), accuracy(model, retain)))
        print(f"repeat {i + 1}: ours {spent['ours'][-1].wall:.1f} s, official order {spent['official'][-1].wall:.1f} s")

    (ours, cpu), (theirs, their_cpu) = ((median(s.wall for s in side), median(s.cpu for s in side)) for side in spent.values())
    mask = median(masks)
    n = sum(p.numel() for p in original.named().values())
    packed = saliency.pack(torch.zeros(n, dtype=torch.bool)).numel()
    return {
        "name": "salun", "ours_s": ours, "official_order_s": theirs, "ratio": theirs / ours,
        "peak_bytes": spent["ours"][0].peak,  # a process remembers its peak, so only the first one is ours alone
        "device": device, "ours_cpu_s": cpu, "official_order_cpu_s": their_cpu, "cpu_ratio": their_cpu / cpu,
        "net": args.net, "data": args.data, "images": len(rows), "epochs": args.epochs, "batch": args.batch, "dtype": args.dtype,
        "threads": args.threads, "repeats": args.repeats, "seconds": {k: [s.wall for s in v] for k, v in spent.items()},
        "mask_s": mask, "weights": n,
        "saliency_bytes_per_weight": size / n, "mask_bytes_per_weight": packed / n,
        **{f"{side}_{part}_accuracy": [s[k] for s in v] for side, v in scores.items() for k, part in enumerate(("forget", "retain"))},
        "retrain_epoch_s": epoch_s,
        "share_of_retrain": (mask + (ours - mask) / args.epochs * UNLEARN) / (RETRAIN * epoch_s),
    }  # fmt: skip


if __name__ == "__main__":
    main()
