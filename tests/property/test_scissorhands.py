"""EraseDiff and ScissorHands: their settings by family, lambda, the projection, what is trimmed and what stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from unlearners.base import Task, settle
from unlearners.errors import UsageError
from unlearners.latents import Asked
from unlearners.methods import _gradients as gradients
from unlearners.methods.erasediff import POKEMON, EraseDiff
from unlearners.methods.scissorhands import LATE, Scissorhands
from unlearners.registry import make
from unlearners.targets.classifier import Classifier
from unlearners.targets.ddpm import DDPM
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.testing import task_for

STYLE = Task(name="t", kind="style", concepts=("zq",))
NUDE = replace(STYLE, kind="nsfw")
FAMILIES: dict[str, Any] = {"sd": StableDiffusion.tiny, "ddpm": DDPM.tiny, "classifier": Classifier.tiny}


# --- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "task", "wanted"),
    [
        ("sd", STYLE, {"params": "full", "batch": 8, "lr": 1e-5, "epochs": 5, "lamb": 0.1, "clip": 0.0, "pseudo": POKEMON}),
        ("sd", NUDE, {"params": "noxattn", "batch": 16, "lr": 1e-5, "epochs": 5, "lamb": 1.0}),
        ("sd", replace(STYLE, anchors=("ink",)), {"pseudo": ""}),
        ("ddpm", None, {"params": "full", "batch": 128, "lr": 1e-4, "epochs": 8, "lamb": 0.1, "clip": 1.0, "pseudo": ""}),
    ],
)
def test_erasediff_by_family_and_kind(family: str, task: Task | None, wanted: dict[str, Any]) -> None:
    target = FAMILIES[family]()
    got = settle(EraseDiff(), target, task or task_for(target))
    assert {k: getattr(got, k) for k in wanted} == wanted
    assert (got.rule, got.restore, got.inner) == ("paper", True, 2)
    released = settle(make("methods", "erasediff", preset="release"), target, task or task_for(target))
    assert (released.rule, released.restore) == ("constant" if family == "sd" else "cosine", False)


@pytest.mark.parametrize(
    ("family", "task", "wanted"),
    [
        ("sd", STYLE, {"sparsity": 0.999, "lr": 2e-5, "epochs": 3, "batch": 8, "lamb": 0.1, "prune_num": 10, "project": False}),
        ("sd", NUDE, {"sparsity": 0.995, "lr": 1e-5, "epochs": 5, "batch": 16, "project": False, "optimizer": "adam"}),
        (
            "classifier",
            None,
            {"sparsity": 0.97, "lr": 5e-3, "epochs": 10, "lamb": 0.05, "prune_num": 1, "project": True, "optimizer": "sgd"},
        ),
        ("ddpm", None, {"sparsity": 0.999, "project": False, "optimizer": "adam", "trim": ""}),
    ],
)
def test_scissorhands_by_family_and_kind(family: str, task: Task | None, wanted: dict[str, Any]) -> None:
    target = FAMILIES[family]()
    got = settle(Scissorhands(), target, task or task_for(target))
    assert {k: getattr(got, k) for k in wanted} == wanted
    late = ("net.layer3.", "net.layer4.", "net.fc.", "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.")
    assert got.trim == (LATE if any(n.startswith(late) for n in target.named()) else "")
    assert family == "ddpm" or got.trim


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (EraseDiff, {"inner": -1}),
        (EraseDiff, {"batch": 0}),
        (EraseDiff, {"density": 0.0}),
        (Scissorhands, {"sparsity": 1.5}),
        (Scissorhands, {"memory_num": 13}),
        (Scissorhands, {"ridge": 0.0}),
        (Scissorhands, {"prune_num": 0}),
    ],
)
def test_impossible_settings_are_refused(kind: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"must be|is a share|at least"):
        kind(**fields)


def test_a_prompt_is_refused_where_there_are_none() -> None:
    target = Classifier.tiny()
    with pytest.raises(UsageError, match="leave it empty"):
        EraseDiff(pseudo="a dog")(target, task_for(target))


def test_norms_alone_cannot_be_trimmed() -> None:
    target = Classifier.tiny()
    with pytest.raises(UsageError, match="norm layers never are"):
        Scissorhands(trim=r"net\..*bn")(target, task_for(target))


# --- EraseDiff -------------------------------------------------------------------------------------------------------
def test_lambda_by_hand() -> None:
    r, f = [torch.tensor([3.0, 0.0]), torch.tensor([1.0])], [torch.tensor([-1.0, 2.0]), torch.tensor([2.0])]  # <r, f> = -1, |f|^2 = 9
    assert EraseDiff(rule="paper", eta=0.5).weight(r, f) == pytest.approx(1.5 / 9)
    assert EraseDiff(rule="cosine", eta=0.5).weight(r, f) == pytest.approx(0.5 + 1 / (10**0.5 * 3))
    assert EraseDiff(rule="constant", lamb=0.25).weight(r, f) == 0.25
    assert EraseDiff(rule="paper", eta=0.5).weight(r, r) == 0.0  # both fall together, so nothing is added
    nothing = [torch.zeros(2), torch.zeros(1)]
    assert EraseDiff(rule="paper").weight(r, nothing) == 0.0
    assert EraseDiff(rule="cosine", eta=0.5).weight(r, nothing) == 0.5


def test_lambda_makes_the_step_lower_f_by_eta() -> None:
    """<g_r + lambda g_f, g_f> = max(eta, <g_r, g_f>): what BOME's rule is for."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        r, f = (torch.randn(2, 5, generator=generator).double().unbind() for _ in range(2))
        lam = EraseDiff(rule="paper", eta=0.3).weight(r, f)
        assert gradients.dot(gradients.add(r, f, lam), f) == pytest.approx(max(0.3, gradients.dot(r, f)))


def test_outside_of_a_mask_every_weight_keeps_its_bits() -> None:
    target = Classifier.tiny()
    start = {n: p.detach().clone() for n, p in target.named().items()}
    EraseDiff(mask="saliency", density=0.1, epochs=2, batch=32)(target, task_for(target))
    moved = sum(int((p != start[n]).sum()) for n, p in target.named().items())
    assert 0 < moved <= sum(p.numel() for p in start.values()) // 10


def test_batch_statistics_go_back_with_the_weights() -> None:
    """The K passes leave no trace in batch normalization: only the steps count as batches."""
    target = Classifier.tiny()
    count = next(b for n, b in target.modules["net"].named_buffers() if n.endswith("num_batches_tracked"))
    start = int(count)
    EraseDiff(epochs=2, inner=3, steps=2, batch=32)(target, task_for(target))
    assert int(count) - start == 2 * 2 * 2  # epochs, steps, and two batches in each


# --- ScissorHands ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.97, 0.999, 1.0])
def test_exactly_that_many_weights_start_anew(family: str, sparsity: float) -> None:
    target = FAMILIES[family]()
    method = settle(Scissorhands(sparsity=sparsity, prune_num=1, trim=""), target, task_for(target))
    w = target.trainable(method.params)
    late = method.trimmable(target, w)
    norms = {p for m in target.modules.values() for x in m.modules() if "Norm" in type(x).__name__ for p in x.parameters()}
    assert late and not any(p in norms for p in late.values())
    start = {n: p.detach().clone() for n, p in w.items()}
    D_f = target.forgotten(task_for(target), Asked(pictures=2)).loader(4)
    total = sum(p.numel() for p in late.values())
    cut = method.cut(target, D_f, late)
    assert cut == total - -(-total * round(sparsity * 1000) // 1000)  # floor((1 - sparsity) N) in whole numbers
    moved = {n: (p.detach() != start[n]) for n, p in w.items()}
    assert sum(int(m.sum()) for m in moved.values()) <= cut
    assert sum(int(m.sum()) for n, m in moved.items() if late.get(n, torch.empty(0)).dim() > 1) >= 0.9 * min(cut, 1)
    assert not any(moved[n].any() for n in w if n not in late)
    for n, p in late.items():
        bound = 0.0 if p.dim() < 2 else p[0].numel() ** -0.5  # U(-b, b) with b = sqrt(6 / ((1 + a^2) fan_in)) and a = sqrt(5)
        assert (p.detach()[moved[n]].abs() <= bound).all()


def test_trim_takes_the_weights_it_names_alone() -> None:
    target = Classifier.tiny()
    head = set(target.select("head"))
    method = settle(Scissorhands(sparsity=0.5, trim="head"), target, task_for(target))
    assert set(method.trimmable(target, target.trainable("full"))) == head


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_projection_solves_the_dual_problem(m: int, margin: float) -> None:
    generator = torch.Generator().manual_seed(m)
    for _ in range(20):
        g, G = torch.randn(7, generator=generator).double(), torch.randn(m, 7, generator=generator).double()
        (got,), v = gradients.project([g], [[row] for row in G], margin, 1e-9)
        slope = G @ G.T @ v + G @ g  # of the dual problem; at its minimum 0 where v is free, and up where it is held
        assert (v >= margin - 1e-9).all()
        assert torch.allclose(slope[v > margin + 1e-9], torch.zeros(()).double(), atol=1e-6) and (slope > -1e-6).all()
        assert torch.allclose(got, g + G.T @ v)
        assert (G @ got > -1e-6).all()  # no memory's loss rises
        if not margin and (G @ g >= 0).all():
            assert torch.equal(v, torch.zeros(m).double())


def test_a_step_that_lowers_no_memory_is_left_as_it_is() -> None:
    g, along = [torch.tensor([1.0, 2.0])], [(torch.tensor([1.0, 0.0]),), (torch.tensor([0.0, 1.0]),)]
    got, told = Scissorhands().projected(g, along)
    assert got[0] is g[0] and told["projected"] == 0.0
    got, told = Scissorhands().projected(g, [*along, (torch.tensor([-1.0, 0.0]),)])
    assert told["projected"] == 1.0 and told["cosine"] < 0


def test_the_log_says_what_was_trimmed_and_projected() -> None:
    target = Classifier.tiny()
    told: list[dict[str, float]] = []
    Scissorhands(epochs=1, batch=8, project=True, memory_num=2)(target, task_for(target), log=told.append)
    assert told[0]["trimmed"] > 0 and not any("trimmed" in row for row in told[1:])
    paired = [row for row in told if "forget" in row]
    assert len(paired) == 2 and len(told) == 6  # 16 forgotten and 48 retained pictures: D_f is used up after two steps
    assert all({"cosine", "projected"} <= row.keys() for row in paired)
