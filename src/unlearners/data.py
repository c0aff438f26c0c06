"""Labelled pictures: from ``datasets`` by hub name or path, image folders and the canvas; one seeded split; batches on the device."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from .base import Data
from .errors import UsageError, unknown

AS_IS = ("svhn", "mnist", "emnist", "kmnist", "qmnist", "usps")
"""data sets whose pictures change their meaning when they are mirrored (digits and letters): trained on as they are unless told"""
HOMES = ("data", "../data", "../shared/data")
"""where a local copy of a hub dataset is looked for, unless UNLEARNERS_DATA names other folders"""
MEMORY = 8 * 2**30  # bytes of decoded pictures that are kept; above that they are decoded batch by batch
CANVAS = ("canvas-pairs", "canvas-mascots", "canvas-styles", "canvas-scenes")
"""the canvas at its full size: pictures with captions, or named by mascot, style or object"""
CAPTIONS = ("caption", "text", "txt", "TEXT")
"""columns that hold captions"""
LABELS = ("label", "labels", "fine_label")
"""columns that hold class labels; any other column of class labels is taken where there is none of them"""
WORDNET = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw", "n03028079": "church",
    "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip
"""Imagenette's classes, as its folders are called and as they are said"""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEST = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class Source:
    """One split of a dataset: N pictures (H, W) as uint8, their labels, class names, file names where there are any, and a hash."""

    pictures: Tensor | _Encoded
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...]
    digest: str
    captions: tuple[str, ...] = ()
    """one for each picture, where the source has them"""


@dataclass
class Examples:
    """The pictures a ``Data`` names, opened: row numbers ``indices`` (n,) into ``source``, batches on ``device``."""

    source: Source
    indices: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    augmentation: str = "crop-flip"
    """what a training batch goes through, see ``Data.augment``; here never auto"""
    texts: tuple[str, ...] = ()
    """a text for each picture (n,), which then comes with every batch"""
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """for a text those that may take its place"""
    forms: tuple[str, ...] = ()
    """how its classes are said"""
    extra: tuple[str, ...] = ()
    """names that none of its pictures has, and that a picture may be taken for"""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """Class indices (n,), on the CPU."""
        return self.source.labels[self.indices]

    @property
    def images(self) -> Tensor:
        """All pictures, uint8 (n, 3, H, W)."""
        return self.source.pictures[self.indices.to(self._home)].to(self.device)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def digest(self) -> str:
        """SHA-256 of all pictures and labels of the split, whichever rows are taken."""
        return self.source.digest

    @property
    def _home(self) -> torch.device:
        return self.source.pictures.device

    def only(self, rows: Tensor) -> Examples:
        """Those at ``rows`` (m,), with their texts."""
        texts = tuple(self.texts[i] for i in rows.tolist()) if self.texts else ()
        return replace(self, indices=self.indices[rows], texts=texts)

    def raw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pictures (B, 3, H, W) and labels (B,) of ``rows`` (B,) in 0 … n - 1, on the device."""
        at = self.indices[rows.cpu()]
        return self.source.pictures[at.to(self._home)].to(self.device), self.source.labels[at].to(self.device)

    def batch(self, rows: Tensor, augment: bool = False) -> dict[str, Any]:
        """{"x": (B, 3, H, W) in [0, 1], "y": (B,), "rows": (B,)}; ``augment`` changes the pictures at random.

        Where there are texts, also {"text": [str], "others": [(str, …)]}.
        """
        x, y = self.raw(rows)
        batch = {"x": augmented(x, self.augmentation) if augment else tidy(x), "y": y, "rows": rows}
        if not self.texts:
            return batch
        said = [self.texts[i] for i in rows.tolist()]
        return batch | {"text": said, "others": [self.others.get(t, ()) for t in said]}

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """Every picture once, in order, as it is."""
        return (self.batch(torch.arange(i, min(i + size, len(self)))) for i in range(0, len(self), size))

    def loader(self, size: int, augment: bool = True) -> Loader:
        """Endless shuffled batches."""
        return Loader(self, size, augment)


class Loader:
    """Endless batches, each epoch in a new order drawn from the global generator; ``len`` is the batches of an epoch."""

    def __init__(self, examples: Examples, size: int, augment: bool = True) -> None:
        self.examples, self.size, self.augment = examples, size, augment
        self.order, self.at = torch.empty(0, dtype=torch.long), 0

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size)

    def draw(self) -> dict[str, Any]:
        """The next batch; the last one of an epoch may be smaller."""
        if self.at >= len(self.order):
            self.order, self.at = torch.randperm(len(self.examples)), 0
        rows = self.order[self.at : self.at + self.size]
        self.at += self.size
        return self.examples.batch(rows, self.augment)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.at = state["order"].cpu(), state["at"]


def tidy(x: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to floats in [0, 1], channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last).float().div_(255)


def augmented(x: Tensor, how: str) -> Tensor:
    """uint8 (B, 3, H, W) to floats in [0, 1], changed at random by ``how``, see ``Data.augment``."""
    if how == "none":
        return tidy(x)
    crop, _, flip = how.rpartition("-")
    crop, flip = (crop, flip) if flip == "flip" else (how, "")
    pixels = crop.removeprefix("crop")
    return shifted(x, (int(pixels) if pixels else x.shape[-2] // 8) if crop else 0, flip=bool(flip))


def shifted(x: Tensor, pad: int, *, flip: bool = True) -> Tensor:
    """uint8 (B, 3, H, W) to floats in [0, 1], moved by up to ``pad`` pixels over a black border, and with ``flip`` mirrored at random."""
    b, _, h, w = x.shape
    x = torch.nn.functional.pad(x, (pad,) * 4)
    down, right, mirror = torch.randint(2 * pad + 1, (2, b)).unbind() + (torch.rand(b) < 0.5,)  # noqa: RUF005
    rows = down[:, None] + torch.arange(h)  # (B, H)
    cols = torch.arange(w).expand(b, w)
    cols = right[:, None] + (torch.where(mirror[:, None], w - 1 - cols, cols) if flip else cols)  # (B, W)
    i, rows, cols = torch.arange(b)[:, None, None].to(x.device), rows[:, :, None].to(x.device), cols[:, None, :].to(x.device)
    moved: Tensor = x.permute(0, 2, 3, 1)[i, rows, cols]  # (B, H, W, 3)
    return moved.permute(0, 3, 1, 2).float().div_(255)


def augmentation(data: Data, usual: str) -> str:
    """What training batches of ``data`` go through: what it says, else nothing for ``AS_IS``, else ``usual``."""
    if data.augment != "auto":
        return data.augment
    name = re.split(r"[-_:.]", Path(data.source.partition(":")[0]).name.lower())[0]
    return "none" if name in AS_IS else usual


# --- opening ------------------------------------------------------------------------------------------------------
def open_data(data: Data, size: int, device: torch.device | str = "cpu", usual: str = "crop-flip") -> Examples:
    """The pictures that ``data`` names, ``size`` × ``size``, to be augmented as it says, else as ``usual`` for the model.

    Raises ``UsageError`` for a source, split, class or row that is not there, and for a choice that takes nothing or leaves nothing.
    """
    if not data.source:
        raise UsageError("the task names no data for this; give the training data, for example --data path/to/images")
    if "run" in (data.seed, data.draw):
        raise UsageError("the pictures hang on the seed of a run, and there is none here; give the data a seed that is a number")
    source, rows = part(data, size)
    chosen = pick(data, source, rows)
    if not len(chosen):
        inverse = data.rows.removeprefix("not ") if data.rows.startswith("not ") else ""
        if inverse:
            raise UsageError(f"'{inverse}' is the whole of {data.source}'s {data.split} pictures, so nothing would be left; name fewer")
        raise UsageError(f"'{data.rows}' picks no {data.split} picture of {data.source}; name at least one")
    return Examples(source, chosen, torch.device(device), augmentation(data, usual))


def part(data: Data, size: int) -> tuple[Source, Tensor]:
    """The source behind a split, and its rows: train and validation are a seeded division of each class of the training pictures.

    ``data.subset`` of the training pictures are left, of each class in proportion.
    """
    if data.split == "validation" and not data.validation and data.source not in (*CANVAS, "tiny") and not has_validation(data.source):
        raise UsageError(
            f"{data.source} has no validation pictures beside its test pictures; give a share of the training pictures, as validation: 0.1"
        )
    if data.split == "test" or (data.split == "validation" and not data.validation):
        source = read(data.source, data.split, size)
        return source, torch.arange(len(source.labels))
    source = read(data.source, "train", size)
    held = torch.zeros(len(source.labels), dtype=torch.bool)
    if data.validation:
        generator = torch.Generator().manual_seed(int(data.seed))
        for y in range(len(source.classes)):
            rows = (source.labels == y).nonzero().flatten()
            held[rows[torch.randperm(len(rows), generator=generator)[: int(data.validation * len(rows))]]] = True
    rows = (held if data.split == "validation" else ~held).nonzero().flatten()
    return source, some(data, source, rows) if data.subset and data.split == "train" else rows


def some(data: Data, source: Source, rows: Tensor) -> Tensor:
    """``data.subset`` of ``rows`` (n,), ascending: of each class its share, rounded down, and one more of those that lost most."""
    if data.subset > len(rows):
        raise UsageError(f"subset={data.subset} is more than the {len(rows)} training pictures of {data.source}; name fewer")
    generator = torch.Generator().manual_seed(int(data.seed) + 2_000_003)
    labels = source.labels[rows]
    exact = labels.bincount(minlength=len(source.classes)).double() * data.subset / len(rows)  # (K,)
    count = exact.floor().long()
    short = (exact - count).argsort(descending=True, stable=True)[: data.subset - int(count.sum())]
    count[short] += 1
    taken = []
    for y in range(len(source.classes)):
        own = rows[labels == y]
        taken.append(own[torch.randperm(len(own), generator=generator)[: int(count[y])]])
    chosen: Tensor = torch.cat(taken).sort().values
    return chosen


def pick(data: Data, source: Source, rows: Tensor) -> Tensor:
    """The rows of ``rows`` that ``data.rows`` names, ascending."""
    said, inverse = data.rows.removeprefix("not "), data.rows.startswith("not ")
    if not said:
        return rows
    key, _, value = said.partition("=")
    if key == "class":
        wanted = torch.tensor([label(c.strip(), source.classes, data.source) for c in value.split(",")])
        inside = torch.isin(source.labels[rows], wanted)
    elif key == "caption":
        inside = captioned(value, source)[rows]
    elif key == "random":
        inside = torch.zeros(len(rows), dtype=torch.bool)
        generator = torch.Generator().manual_seed(int(data.seed if data.draw is None else data.draw) + 1_000_003)
        inside[torch.randperm(len(rows), generator=generator)[: amount(value, len(rows))]] = True
    else:
        inside = torch.isin(rows, listed(said, data, source, rows))
    return rows[inside != inverse]


def label(name: str, classes: Sequence[str], where: str) -> int:
    """The index of a class given by name or number; ``UsageError`` when there is none."""
    name = WORDNET.get(name, name) if name not in classes else name
    if name in classes:
        return list(classes).index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    if name.isdecimal():
        raise UsageError(f"{where} has classes 0 to {len(classes) - 1} and no class {name}; name one of {', '.join(classes[:12])}")
    raise unknown(f"class of {where}", name, classes)


def amount(value: str, total: int) -> int:
    """``0.1`` is a share of ``total``, ``500`` a number."""
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if number <= 0 or (number >= 1 and number != int(number)):
        raise UsageError(f"random={value} is no share or number; write random=0.1 for a tenth or random=500 for 500 pictures")
    count = int(number) if number >= 1 else int(number * total)
    if count > total:
        raise UsageError(f"random={value} is more than the {total} training pictures; name fewer")
    return count


def captioned(value: str, source: Source) -> Tensor:
    """Which pictures (N,) have one of the phrases ``value``, separated by commas, in their caption, in capitals or not (SLUG's rule)."""
    if not source.captions:
        raise UsageError(f"the pictures have no captions to look for '{value}' in; name them by class=NAME or in a file")
    wanted = [v.strip().lower() for v in value.split(",") if v.strip()]
    if not wanted:
        raise UsageError("caption= names nothing; write caption=PHRASE")
    return torch.tensor([any(w in c.lower() for w in wanted) for c in source.captions])


def listed(file: str, data: Data, source: Source, rows: Tensor) -> Tensor:
    """The rows in a text file: row numbers of the training pictures, or file names of an image folder, one a line."""
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no file '{file}'; write class=NAME, random=0.1, or a text file with one row number or file name a line")
    if data.digest and data.digest != file_digest(file):
        raise UsageError(f"{file} has changed since this task was made; put the old list back, or start a new run")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = []
    for line in lines:
        if line.isdecimal():
            if int(line) >= len(source.labels):
                raise UsageError(f"{file} names row {line}, and {data.source} has rows 0 to {len(source.labels) - 1}; take it out")
            found.append(int(line))
        else:
            found.append(_row_of(line, file, data, source))
    chosen: Tensor = torch.tensor(found, dtype=torch.long).unique()
    if len(lost := chosen[~torch.isin(chosen, rows)]):
        what = "is a validation picture" if not data.subset else "is not in the subset of the training pictures,"
        raise UsageError(f"{file} names row {int(lost[0])}, which {what} the model never saw; take it out")
    return chosen


def _row_of(name: str, file: str, data: Data, source: Source) -> int:
    hits = [i for i, known in enumerate(source.names) if known == name or known.endswith(f"/{name}")]
    if len(hits) > 1:
        raise UsageError(f"{file} names '{name}', and {data.source} has {len(hits)} files of that name; write it with its folder")
    if not hits:
        raise unknown(f"file of {data.source} (in {file})", name, source.names)
    return hits[0]


def file_digest(file: str) -> str:
    """SHA-256 of a file of rows; "" when ``file`` is none (class=…, random=…)."""
    path = Path(file.removeprefix("not "))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


# --- sources ------------------------------------------------------------------------------------------------------
def local(name: str) -> str:
    """Where ``name`` lies: a path as it is, a hub name's local copy if one of ``HOMES`` has it, else the hub name.

    Behind a colon stands the configuration; a local copy may hold a folder of its name, or be that alone.
    """
    if Path(name).exists():
        return name
    name, colon, chosen = name.partition(":")
    homes = os.environ.get("UNLEARNERS_DATA", "").split(os.pathsep) if os.environ.get("UNLEARNERS_DATA") else HOMES
    found = [p for h in homes if (p := Path(h) / name.rpartition("/")[2]).is_dir()]
    if not found and not Path(name).is_dir():
        return name + colon + chosen
    copy = found[0] if found else Path(name)
    return str(copy / chosen if chosen and (copy / chosen).is_dir() else copy)


def splits(name: str) -> list[str]:
    """The splits a source has: train first."""
    if name in ("tiny", "canvas"):
        return ["train", "test"]
    if name in CANVAS:
        return ["train", "validation", "test"]
    return list(_dataset(local(name)))


def has_validation(name: str) -> bool:
    """Whether a source comes with a validation split of its own, beside a test split: alone, it takes the place of the test pictures."""
    found = splits(name)
    return "test" in found and any(s in TEST[1:] for s in found)


@lru_cache(maxsize=6)
def read(name: str, split: str, size: int) -> Source:
    """A whole split of a source with pictures of ``size`` × ``size``; kept, since forget, retain and test data share it."""
    if name == "tiny":
        return tiny(split, size)
    if name == "canvas":
        from .zoo.canvas.objects import CLASSES, objects

        if split == "validation":
            raise UsageError("the canvas has no validation pictures of its own; give a share of the training pictures, as validation: 0.1")
        x, y = objects(split)
        return _source(_sized(x, size), y, CLASSES, ())
    if name in CANVAS:
        from .zoo.canvas.pairs import drawn

        x, y, classes, captions = drawn(name, split)
        return _source(_sized(x, size), y, classes, (), captions)
    parts = _dataset(local(name))
    wanted = ("train",) if split == "train" else TEST[1:] if split == "validation" else TEST
    key = next((k for k in wanted if k in parts), None)
    if key is None:
        raise UsageError(f"{name} has no {split} pictures (it has {', '.join(parts)}); add a folder or split '{wanted[0]}'")
    rows = parts[key]
    image, labels, classes, captions = _columns(name, rows)
    files = tuple(_path(r) for r in rows.cast_column(image, _undecoded())[image]) if _is_folder(name) else ()
    encoded = _Encoded(rows, image, size)
    if len(rows) * 3 * size * size > MEMORY:
        text = "".join((*files, *captions)) + str(labels.tolist())
        return Source(encoded, labels, classes, files, hashlib.sha256(text.encode()).hexdigest(), captions)
    return _source(encoded[torch.arange(len(rows))], labels, classes, files, captions)


def tiny(split: str, size: int) -> Source:
    """Random pictures of four classes, each brighter in a band of its own, which survives mirroring: for tests and rehearsals."""
    n = {"train": 64, "test": 32, "validation": 32}[split]
    generator = torch.Generator().manual_seed(len(split))
    y = torch.arange(n) % 4
    x = torch.randint(0, 160, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    band = size // 4
    for k in range(4):
        x[y == k, :, k * band : (k + 1) * band] += 90
    return _source(x, y, ("a", "b", "c", "d"), ())


def _source(x: Tensor, y: Tensor, classes: Sequence[str], names: tuple[str, ...], captions: tuple[str, ...] = ()) -> Source:
    digest = hashlib.sha256(x.contiguous().numpy().data)
    digest.update(y.numpy().data)
    digest.update("\n".join(captions).encode())
    return Source(x, y, tuple(classes), names, digest.hexdigest(), captions)


def _sized(x: Tensor, size: int) -> Tensor:
    """uint8 (…, 3, H, W) with the shorter side at ``size`` and its middle cut out."""
    if x.shape[-2:] == (size, size):
        return x
    fitted: Tensor = TF.center_crop(TF.resize(x, [size], antialias=True), [size, size])
    return fitted


class _Encoded:
    """Pictures that are decoded when they are asked for."""

    device = torch.device("cpu")

    def __init__(self, rows: Any, column: str, size: int) -> None:
        self.rows, self.column, self.size = rows, column, size

    def __getitem__(self, at: Tensor) -> Tensor:
        def decode(i: int) -> Tensor:
            return _sized(TF.pil_to_tensor(self.rows[i][self.column].convert("RGB")), self.size)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return torch.stack(list(pool.map(decode, at.tolist())))


@lru_cache(maxsize=4)
def _dataset(name: str) -> Any:
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    tars = tarred(Path(name))
    try:
        if tars:
            found: Any = load_dataset("webdataset", data_files={"train": [str(t) for t in tars]})
        elif beside := captioned_files(Path(name)):
            found = load_dataset("imagefolder", data_files={"train": [str(f) for f in beside]}, drop_labels=True)
        else:
            found = load_from_disk(name) if (Path(name) / "dataset_dict.json").is_file() else _named(name)
    except Exception as error:  # the library raises what its readers, the network and the file system raise
        raise UsageError(
            f"no pictures could be read from '{name}' ({str(error).splitlines()[0][:120]}); give a folder of one folder per class, "
            "a dataset's folder, or its hub name, and set UNLEARNERS_DATA to the folder with your copies"
        ) from None
    return found if isinstance(found, DatasetDict) else {"train": found}


def _named(name: str) -> Any:
    """A folder or a dataset of the hub, behind a colon its configuration."""
    from datasets import load_dataset

    where, _, chosen = name.partition(":")
    return load_dataset(name) if Path(name).exists() else load_dataset(where, chosen or None)


def tarred(path: Path) -> list[Path]:
    """The webdataset tars at ``path``, a file or a folder of them; none when it is anything else."""
    return [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []


def captioned_files(path: Path) -> list[Path]:
    """The pictures of a flat folder in which text files of the same names lie beside them."""
    if not path.is_dir():
        return []
    texts = {t.stem for t in path.glob("*.txt")}
    return sorted(f for f in path.iterdir() if f.stem in texts and f.suffix.lower() in PICTURES) if texts else []


def _columns(name: str, rows: Any) -> tuple[str, Tensor, tuple[str, ...], tuple[str, ...]]:
    """The name of the picture column, the labels (N,), the class names, and the captions, where there are any.

    Pictures with captions and without labels are of one class, which has no name.
    """
    from datasets import ClassLabel, Image

    pictures = [k for k, f in rows.features.items() if isinstance(f, Image)]
    captions = _captions(name, rows)
    if pictures and captions and not any(isinstance(f, ClassLabel) for f in rows.features.values()):
        return pictures[0], torch.zeros(len(rows), dtype=torch.long), ("",), captions
    named = [k for k, f in rows.features.items() if isinstance(f, ClassLabel)]
    numbered = [k for k in rows.features if k in LABELS]
    if not pictures or not (named or numbered):
        wanted = "a column of pictures and one of class labels or captions are needed"
        raise UsageError(f"{name} has the columns {', '.join(rows.features)}; {wanted}")
    column = next((c for c in LABELS if c in (*named, *numbered)), (named or numbered)[0])
    labels = torch.tensor(rows[column], dtype=torch.long)
    classes = tuple(rows.features[column].names) if column in named else tuple(str(i) for i in range(int(labels.max()) + 1))
    if set(classes) <= set(WORDNET):  # a generator is asked for them by name
        classes = tuple(WORDNET[c] for c in classes)
    if (labels < 0).any() or (labels >= len(classes)).any():
        wrong = int(labels[(labels < 0) | (labels >= len(classes))][0])
        raise UsageError(f"{name} labels a picture {wrong}, and its classes are 0 to {len(classes) - 1}; mend or leave out those rows")
    return pictures[0], labels, classes, captions


def _captions(name: str, rows: Any) -> tuple[str, ...]:
    """The captions of a dataset: a column, a field of a tar's JSON, or, for a folder, text files beside the pictures; () without any."""
    column = next((k for k in CAPTIONS if k in rows.features), None)
    if column:
        cells = [str(c or "").strip() for c in rows[column]]
    elif "json" in rows.features:
        cells = [str((c or {}).get("caption") or "").strip() for c in rows["json"]]
    elif _is_folder(name) and "image" in rows.features:
        beside = [Path(_path(c)).with_suffix(".txt") for c in rows.cast_column("image", _undecoded())["image"]]
        if not any(t.is_file() for t in beside):
            return ()
        cells = [t.read_text(encoding="utf-8").strip() if t.is_file() else "" for t in beside]
    else:
        return ()
    if (bare := sum(not c for c in cells)) == len(cells):
        return ()
    if bare:
        raise UsageError(f"{bare} of the {len(cells)} pictures of {name} have no caption; caption them or take them out")
    return tuple(cells)


def _undecoded() -> Any:
    from datasets import Image

    return Image(decode=False)


def _is_folder(name: str) -> bool:
    where = Path(local(name))
    return where.is_dir() and not any(where.rglob("*.parquet")) and not any(where.rglob("*.arrow"))


def _path(cell: Any) -> str:
    return str(cell["path"] or "")
