"""What metrics see of a model: its pictures, its logits and its answers, each made once and kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import config
from .base import Data, Judge, Request, Task, Verdict
from .diffusion import batches
from .errors import UsageError
from .files import replacing, turn, write_json, write_text
from .finite import finite
from .session import Progress
from .targets._questions import Reply, put, read
from .targets.base import Chat, DualEncoder
from .targets.classifier import Classifier


def _key(row: Request | Mapping[str, Any]) -> str:
    """What tells the pictures of one sampler apart: seed and prompt, and the guidance of those that bring their own."""
    prompt, seed, own = (
        (row.prompt, row.seed, row.guidance) if isinstance(row, Request) else (row["prompt"], row["seed"], row.get("guidance"))
    )
    return f"{seed}\0{prompt}" if own is None else f"{seed}\0{prompt}\0{own:g}"


class Gallery:
    """Pictures of one model in one folder: what is there is not drawn again."""

    def __init__(self, folder: Path, sampler: Mapping[str, Any]) -> None:
        self.folder, self.sampler = folder, dict(sampler)
        self.manifest = folder / "samples" / "manifest.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Learn of the pictures that are there, also of those another process has drawn meanwhile."""
        if self.manifest.exists():
            for line in self.manifest.read_text().splitlines():
                row = json.loads(line)
                if row["sampler"] == self.sampler and (self.folder / row["file"]).exists():
                    self.rows[_key(row)] = row

    def fill(self, target: Callable[[], Any], requests: Sequence[Request], batch: int, progress: Progress | None, what: str) -> None:
        """Draw the requests that are missing, in batches, each saved when it is drawn. One process at a time draws into a folder."""
        if all(_key(r) in self.rows for r in requests):
            return
        with self.turn():
            self._fill(target, [r for r in dict.fromkeys(requests) if _key(r) not in self.rows], batch, progress, what)

    def _fill(self, target: Callable[[], Any], missing: Sequence[Request], batch: int, progress: Progress | None, what: str) -> None:
        if not missing:
            return
        model, done = target(), 0
        alike = [[r for r in missing if r.guidance == g] for g in dict.fromkeys(r.guidance for r in missing)]
        for part in (same[s] for same in alike for s in batches(len(same), batch)):
            images = model.sample([r.prompt for r in part], [r.seed for r in part], batch=batch, **self.how(part[0]))
            for request, image in zip(part, images, strict=True):
                name = config.content_hash([request.prompt, request.seed, self.how(request)])[:16]  # so no picture is another sampler's
                file = f"samples/{name}.png"
                save_picture(image, self.folder / file)
                row = {"prompt": request.prompt, "seed": request.seed, "file": file, "sampler": self.sampler}
                self.rows[_key(request)] = row if request.guidance is None else row | {"guidance": request.guidance}
            self.save()
            done += len(part)
            if progress:
                progress(what, done, len(missing), {})

    def how(self, request: Request) -> dict[str, Any]:
        """The sampler's settings for ``request``, which may bring its own guidance."""
        return self.sampler if request.guidance is None else self.sampler | {"guidance": request.guidance}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Alone with the folder, whose pictures several runs may share, and told of all that is in it."""
        with turn(self.folder / "samples" / ".lock"):
            self.read()
            yield

    def save(self) -> None:
        write_text(self.manifest, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.rows.values()))

    def repeats(self, target: Any, request: Request) -> bool:
        """Whether drawing ``request`` again gives the same picture, up to what rounding in another batch size may do."""
        again = target.sample([request.prompt], [request.seed], **self.how(request))[0]
        return bool((again - self.picture(request)).abs().max() < 0.1)

    def picture(self, request: Request) -> Tensor:
        return read_picture(self.folder / self.rows[_key(request)]["file"])


def save_picture(image: Tensor, path: Path) -> None:
    """(3, H, W) in [0, 1] to an 8-bit PNG. Raises ``NonFiniteError`` for a picture that is not finite, which bytes would hide."""
    finite(image[None])
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def read_picture(path: Path) -> Tensor:
    """An 8-bit picture file to (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).float() / 255


class Predictions:
    """Logits of one classifier in one folder: what is there is not computed again."""

    def __init__(self, folder: Path, model: Callable[[], Any]) -> None:
        self.folder, self.model = folder / "logits", model
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, data: Data) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and labels (N,) of the pictures ``data`` names."""
        key = config.content_hash(config.to_dict(data))[:16]
        if key not in self.known:
            path = self.folder / f"{key}.safetensors"
            if path.exists():
                kept = load_file(path)
            else:
                model = self.model()
                if not isinstance(model, Classifier | DualEncoder):
                    raise UsageError(f"a {type(model).__name__} has no logits; leave out the metrics of classifiers (ra, ta, mia, rmia)")
                logits, labels = model.predict(model.open(data))
                kept = {"logits": logits.contiguous(), "labels": labels.contiguous()}
                self.folder.mkdir(parents=True, exist_ok=True)
                with replacing(path) as draft:
                    save_file(kept, draft)
            self.known[key] = kept["logits"], kept["labels"]
        return self.known[key]


class Answers:
    """What one model says to questions, in one folder: what is there is not asked again."""

    def __init__(self, folder: Path, model: Callable[[], Any]) -> None:
        self.folder, self.model = folder / "answers", model
        self.known: dict[str, list[Reply]] = {}

    def __call__(self, data: Data) -> list[Reply]:
        """The replies to the questions ``data`` names, in their order."""
        key = config.content_hash(config.to_dict(data))[:16]
        if key not in self.known:
            path = self.folder / f"{key}.json"
            if path.exists():
                self.known[key] = [Reply(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
            else:
                model = self.model()
                if not isinstance(model, Chat):
                    raise UsageError(f"a {type(model).__name__} answers no questions; leave out the metrics that ask (vqa, name_accuracy)")
                self.known[key] = put(model, read(data))
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(path, [reply._asdict() for reply in self.known[key]])
        return self.known[key]


class FolderOutputs:
    """What metrics see of one model (see ``base.Outputs``): every domain is judged once."""

    def __init__(
        self,
        gallery: Gallery,
        judge: Callable[[], Judge],
        task: Task,
        logits: Predictions,
        answers: Answers,
        *,
        record: Mapping[str, Any],
        verdicts: Mapping[str, Sequence[Verdict]],
        references: Sequence[Callable[[Data], tuple[Tensor, Tensor]]] = (),
    ) -> None:
        self.gallery, self.judge, self.task, self.logits, self.answers = gallery, judge, task, logits, answers
        self.record, self.verdicts, self.references = record, verdicts, references
        self.judged: dict[str, dict[str, str]] = {}

    def images(self, requests: Sequence[Request]) -> Tensor:
        return torch.stack([self.gallery.picture(r) for r in requests])

    def labels(self, requests: Sequence[Request], domain: str) -> list[str]:
        known = self.judged.setdefault(domain, {})
        new = [r for r in dict.fromkeys(requests) if _key(r) not in known]
        for i in range(0, len(new), 256):
            part = new[i : i + 256]
            found = self.judge().labels(self.images(part), self.task, domain)
            known.update({_key(r): label for r, label in zip(part, found, strict=True)})
        return [known[_key(r)] for r in requests]

    def annotate(self) -> None:
        """Write truth and labels of this task's probes into the manifest, for the report."""
        if not self.gallery.rows:
            return
        truth = {p.prompt: (dict(p.truth), self.task.names_concept(p)) for p in self.task.probes}
        with self.gallery.turn():
            for key, row in self.gallery.rows.items():
                if row["prompt"] in truth:
                    row["truth"], row["named"] = truth[row["prompt"]]
                    found = {d: known[key] for d, known in self.judged.items() if key in known}
                    row["labels"] = {**row.get("labels", {}), **found}  # the original's pictures serve several tasks
            self.gallery.save()
