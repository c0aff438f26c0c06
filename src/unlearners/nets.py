"""Classifier architectures by name: CIFAR stems of our own, then torchvision's, then timm's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import unknown

CIFAR = ("resnet18_cifar", "resnet20_cifar", "resnet34_cifar", "resnet50_cifar", "swin_t_cifar", "vgg16_bn_cifar")
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(name: str, classes: int, *, pretrained: bool = False) -> nn.Module:
    """A network of architecture ``name`` with ``classes`` outputs, random weights from the global generator unless ``pretrained``.

    ``name`` is one of ``CIFAR``, "torchvision/NAME", "timm/NAME" or "resnet20_cifar:width=8". Raises ``UsageError`` for others.
    """
    library, _, model = name.rpartition("/")
    if model in CIFAR or model.startswith("resnet20_cifar:width="):
        return _cifar(model, classes)
    if library == "timm":
        import timm

        if model.partition(".")[0] not in timm.list_models():
            raise unknown("timm model", model, timm.list_models())
        net: nn.Module = timm.create_model(model, pretrained=pretrained, num_classes=classes or None)
        return net
    from torchvision.models import get_model, list_models

    if model not in list_models(torchvision_classifiers()):
        raise unknown("architecture", name, [*CIFAR, *list_models(torchvision_classifiers())])
    head = {"num_classes": classes} if classes and not pretrained else {}
    made: nn.Module = get_model(model, weights="DEFAULT" if pretrained else None, **head)
    return made


def torchvision_classifiers() -> Any:
    """The module whose models classify (others segment, detect or read videos)."""
    import torchvision.models

    return torchvision.models


def defaults(name: str) -> dict[str, Any]:
    """{"side", "mean", "std"} that an architecture is usually trained with."""
    library, _, model = name.rpartition("/")
    if model.partition(":")[0] in (*CIFAR, "ddpm_cifar"):
        return {"side": 32, "mean": CIFAR_MEAN, "std": CIFAR_STD}
    if library == "timm":
        import timm

        cfg: Any = timm.get_pretrained_cfg(model)
        if cfg is not None:
            return {"side": cfg.input_size[-1], "mean": tuple(cfg.mean), "std": tuple(cfg.std)}
    return {"side": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _cifar(name: str, classes: int) -> nn.Module:
    from torchvision.models import resnet, swin_transformer, vgg

    if name.startswith("resnet20_cifar"):
        return ResNet20(classes, int(name.partition("width=")[2] or 16))
    if name == "vgg16_bn_cifar":
        made: Any = vgg.vgg16_bn(num_classes=classes)
        made.avgpool, made.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)
        return made  # type: ignore[no-any-return]
    if name == "swin_t_cifar":  # patches of 2 and windows of 4, so that 32×32 has as many stages as 224×224
        swin: nn.Module = swin_transformer.SwinTransformer(
            [2, 2], 96, [2, 2, 6, 2], [3, 6, 12, 24], [4, 4], stochastic_depth_prob=0.2, num_classes=classes
        )
        return swin
    net: Any = getattr(resnet, name.removesuffix("_cifar"))(num_classes=classes)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        same = stride == 1 and a == b
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.short(x))


class ResNet20(nn.Module):
    """The CIFAR network of He et al. (2016), §4.2, with three stages of three blocks: (B, 3, 32, 32) to (B, classes)."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        w = width
        stages = [(w, 1), (w, 1), (w, 1), (2 * w, 2), (2 * w, 1), (2 * w, 1), (4 * w, 2), (4 * w, 1), (4 * w, 1)]
        self.conv, self.bn = nn.Conv2d(3, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        self.blocks = nn.Sequential(*(_Block(a, b, s) for (a, _), (b, s) in zip([(w, 1), *stages], stages, strict=False)))
        self.fc = nn.Linear(4 * w, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3))
        out: Tensor = self.fc(h)
        return out


def head_of(net: nn.Module) -> tuple[str, nn.Linear] | None:
    """The last linear layer, which makes the logits: its name and itself; None when there is none."""
    found = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    return found[-1] if found else None


def head_rows(state: dict[str, Tensor], name: str) -> int:
    """How many classes a state dict of a network whose head is ``name`` has; 0 when it has no such head."""
    weight = state.get(f"{name}.weight")
    return len(weight) if isinstance(weight, torch.Tensor) else 0
