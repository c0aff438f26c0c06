"""Image classifiers: torchvision, timm, transformers, CIFAR stems, and any local checkpoint of a known architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import Self

from .. import nets, patch
from ..data import Examples
from ..errors import RefusedError, UsageError
from ..files import quiet, sentence
from ..zoo import canvas
from .base import Recogniser, Trainable, described

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Classifier(Trainable, Recogniser):
    """An image classifier: a network from pictures (B, 3, side, side) in [0, 1] to logits (B, K).

    Normalisation with ``mean`` and ``std`` is done inside.
    """

    aliases: ClassVar[Mapping[str, str]] = {"canvas-classifier": str(canvas.FOLDER / "classifier"), "tiny-classifier": ""}
    recipe: ClassVar[str] = "classifier"
    training: ClassVar[Mapping[str, Any]] = {
        "steps": 0, "epochs": 10, "batch": 256, "forget_batch": 0, "lr": 0.01, "optimizer": "sgd", "weight_decay": 5e-4, "clip": 0.0,
        "labels": "other", "alpha": 1.0,
    }  # fmt: skip
    groups: ClassVar[Mapping[str, str]] = {"full": r"net\.", "head": "", "body": ""}  # the last two depend on the head's name

    def __init__(self, net: nn.Module, config: Mapping[str, Any], name: str, device: str, dtype: torch.dtype) -> None:
        self.device, self.amp, self.config = torch.device(device), dtype, dict(config)
        self.modules = {"net": net.to(self.device).to(memory_format=torch.channels_last).requires_grad_(False).eval()}
        self.classes, self.side = tuple(str(c) for c in config["classes"]), int(config["side"])
        self.trained_on, self.warnings = dict(config.get("trained_on") or {}), []
        self.mean, self.std = (torch.tensor(config[k], device=self.device).view(1, 3, 1, 1) for k in ("mean", "std"))
        self.base = {"name": name, "revision": "", "sha256": patch.base_hash(self.modules)}
        named = config.get("head", "")
        found = _named(net, named) if named else nets.head_of(net)
        self.head_name = found[0] if found else ""

    # --- loading --------------------------------------------------------------------------------------------------
    @classmethod
    def claims(cls, spec: str) -> bool:
        """An alias, "torchvision/NAME", "timm/NAME", "file@architecture", or a folder with a classifier's config.json."""
        if spec in cls.aliases or spec.startswith(("torchvision/", "timm/")):
            return True
        file, at, name = spec.rpartition("@")
        if at and Path(file).is_file():
            return not Path(name).is_dir() and (
                name.endswith("config.json") or (not name.startswith((".", "/")) and _is_architecture(name))
            )
        return bool(_kind(described(Path(spec, "config.json"))))

    @classmethod
    def load(
        cls, spec: str, *, patches: Sequence[str] = (), device: str = "cpu", dtype: torch.dtype = torch.float32, force: bool = False
    ) -> Self:
        """See ``Target.load``. Weights stay float32; with another ``dtype`` the network runs in it under autocast.

        ``spec``: "torchvision/NAME" and "timm/NAME" (pretrained), a folder with config.json and weights (ours, timm's or
        transformers'), or "weights-file@architecture" or "weights-file@config.json".
        """
        where = cls.aliases.get(spec, spec)
        if spec in ("tiny", "tiny-classifier"):
            target = cls.tiny()
            target.amp = dtype
        elif spec.startswith(("torchvision/", "timm/")):
            net = nets.build(spec, 0, pretrained=True)
            found = _head(net, spec)
            target = cls(net, _config(spec, {"classes": range(found[1].out_features)}), spec, device, dtype)
        elif Path(where).is_dir():
            target = cls(*_folder(Path(where)), spec, device, dtype)
        else:
            file, _, name = where.rpartition("@")
            target = cls(*_file(Path(file), name), spec, device, dtype)
        if patches:
            target.patch(patches, force=force)
        return target

    @classmethod
    def fresh(
        cls,
        architecture: str,
        classes: Sequence[str],
        *,
        side: int = 0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Random weights from the global generator. ``side``, ``mean`` and ``std`` are the architecture's usual ones when 0 and empty."""
        given = {"side": side, "mean": list(mean), "std": list(std)}
        config = _config(architecture, {"classes": list(classes), **{k: v for k, v in given.items() if v}})
        return cls(nets.build(architecture, len(classes)), config, architecture, device, dtype)

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            target = cls.fresh("resnet20_cifar:width=4", ("a", "b", "c", "d"), side=16)
        target.base["name"] = "tiny-classifier"
        return target

    def save(self, folder: Path, *, trained_on: Mapping[str, Any] | None = None) -> None:
        """Write config.json and model.safetensors, which ``load`` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config | {"trained_on": dict(trained_on)} if trained_on is not None else self.config
        state = {k: v.detach().cpu().contiguous() for k, v in self.modules["net"].state_dict().items()}
        draft = folder / ".model.tmp"
        save_file(state, draft, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1, default=list) + "\n", encoding="utf-8")
        draft.replace(folder / "model.safetensors")

    def reset(self) -> None:
        net: Any = self.modules["net"]
        own = "model_type" in self.config  # transformers'
        made = type(net)(net.config) if own else nets.build(self.config["architecture"], len(self.classes))
        net.load_state_dict(made.state_dict())

    # --- what methods ask -----------------------------------------------------------------------------------------
    @property
    def architecture(self) -> str:
        """Its name: "resnet18_cifar", "torchvision/resnet50" …"""
        return str(self.config.get("architecture") or self.config["model_type"])

    @property
    def head(self) -> nn.Linear:
        """The last layer; ``UsageError`` when the network has no linear one, or not the one its config names."""
        found = _named(self.modules["net"], self.head_name) if self.head_name else None
        if found is None:
            named = self.config.get("head", "")
            wanted = f"no linear layer '{named}'" if named else "no linear layer"
            raise UsageError(f"{self.base['name']} has {wanted} as its head; name the layer that makes the logits as 'head' in config.json")
        return found[1]

    def pattern(self, group: str) -> str:
        if group in ("head", "body"):
            self.head  # noqa: B018 (it says what is missing)
            own = re.escape(f"net.{self.head_name}.")
            return own if group == "head" else rf"(?!{own})net\."
        return super().pattern(group)

    def logits(self, x: Tensor) -> Tensor:
        """(B, 3, side, side) in [0, 1] to float32 logits (B, K)."""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32):
            out: Any = self.modules["net"]((x - self.mean) / self.std)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits.float()

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: (B, F) float32."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.logits(x)
        finally:
            handle.remove()
        return seen[0].float()

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean cross-entropy on {"x": (B, 3, side, side) in [0, 1], "y": (B,)}."""
        return F.cross_entropy(self.logits(batch["x"]), batch["y"])

    @torch.no_grad()
    def predict(self, examples: Examples, batch: int = 512) -> tuple[Tensor, Tensor]:
        """Logits (n, K) and labels (n,) of all examples as they are, on the CPU, in evaluation mode."""
        net = self.modules["net"]
        mode = net.training
        net.eval()
        found = [self.logits(b["x"]).cpu() for b in examples.batches(batch)]
        net.train(mode)
        return torch.cat(found), examples.labels


def _named(net: nn.Module, name: str) -> tuple[str, nn.Linear] | None:
    module = dict(net.named_modules()).get(name)
    return (name, module) if isinstance(module, nn.Linear) else None


def _head(net: nn.Module, name: str) -> tuple[str, nn.Linear]:
    if (found := nets.head_of(net)) is None:
        raise UsageError(f"{name} has no linear layer that makes logits; use a classifier with a linear head")
    return found


def _is_architecture(name: str) -> bool:
    import timm
    from torchvision.models import list_models

    library, _, model = name.rpartition("/")
    return (
        model in nets.CIFAR or (library == "timm" and model in timm.list_models()) or model in list_models(nets.torchvision_classifiers())
    )


def _config(architecture: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"architecture": architecture, **nets.defaults(architecture), **{k: list(v) if k == "classes" else v for k, v in given.items()}}


def _kind(config: Mapping[str, Any]) -> str:
    """Which reader a config.json is for: transformers, ours or timm; "" when it is no classifier's."""
    if any(str(a).endswith("ForImageClassification") for a in config.get("architectures") or ()):
        return "transformers"
    if "architecture" in config and "pretrained_cfg" in config:
        return "timm"
    return "ours" if "architecture" in config and "_class_name" not in config else ""


def _folder(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = _kind(config)
    if kind == "transformers":
        from transformers import AutoModelForImageClassification

        try:
            with quiet():
                net: Any = AutoModelForImageClassification.from_pretrained(folder)
        except Exception as error:  # what is wrong with a file can surface as anything
            raise RefusedError(f"the classifier in {folder} cannot be read ({sentence(error).rstrip('.')}); copy it again") from error
        labels = [net.config.id2label[i] for i in range(len(net.config.id2label))]
        return net, {"model_type": net.config.model_type, "classes": labels, **_processor(folder, net.config)}
    if not kind:
        raise RefusedError(
            f"{folder}/config.json is no classifier's (it names no architecture); write 'architecture' and 'classes' into it"
        )
    if kind == "timm":
        cfg, count = config["pretrained_cfg"], config["num_classes"]
        names = config.get("label_names") or range(count)
        given = {"classes": list(names), "side": cfg["input_size"][-1], "mean": cfg["mean"], "std": cfg["std"]}
        config = _config(f"timm/{config['architecture']}", given)
    config = _config(config["architecture"], {k: v for k, v in config.items() if k != "architecture"})
    file = next((folder / f for f in WEIGHTS if (folder / f).is_file()), None)
    if file is None:
        raise RefusedError(f"{folder} has no weights ({' or '.join(WEIGHTS)}); copy or download it again")
    return _filled(config, _state(file), file), config


def _processor(folder: Path, config: Any) -> dict[str, Any]:
    """{"side", "mean", "std"} of a transformers checkpoint's preprocessing."""
    path = folder / "preprocessor_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    size = found.get("crop_size") or found.get("size") or {}
    side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge") or config.to_dict().get("image_size") or 224
    return {"side": side, "mean": found.get("image_mean") or nets.IMAGENET_MEAN, "std": found.get("image_std") or nets.IMAGENET_STD}


def _file(file: Path, name: str) -> tuple[nn.Module, dict[str, Any]]:
    if not name or not file.is_file():
        raise UsageError(f"'{file}@{name}' is no checkpoint with its architecture; write for example model.pth@resnet18_cifar")
    state = _state(file)
    if name.endswith(".json"):
        given = json.loads(Path(name).read_text(encoding="utf-8"))
        config = _config(given["architecture"], {k: v for k, v in given.items() if k != "architecture"})
    else:
        head, _ = _head(nets.build(name, 10), name)
        rows = nets.head_rows(state, head)
        if not rows:
            raise RefusedError(f"{file} has no '{head}.weight', the head of {name}; name the architecture it was trained with")
        config = _config(name, {"classes": range(rows)})
    return _filled(config, state, file), config


def _state(file: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, without the prefixes that wrappers add."""
    state = patch.read_tensors(file)
    for prefix in ("module.", "net.", "model."):
        if state and all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _filled(config: Mapping[str, Any], state: dict[str, Tensor], file: Path) -> nn.Module:
    """The network with ``state`` in it, strictly."""
    with torch.random.fork_rng(devices=[]):
        net = nets.build(config["architecture"], len(config["classes"]))
    try:
        wrong = net.load_state_dict(state, strict=False)
    except RuntimeError:
        raise RefusedError(f"{file} has weights of other shapes than {config['architecture']}; name its own architecture") from None
    counters = [k for k in wrong.missing_keys if not k.endswith("num_batches_tracked")]
    if counters or wrong.unexpected_keys:
        odd = (counters or wrong.unexpected_keys)[0]
        raise RefusedError(f"'{odd}' of {file} and {config['architecture']} do not match; name the architecture it was trained with")
    return net
