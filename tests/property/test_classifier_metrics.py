"""Metrics of classifiers and the classifier judge: what they read, what they count, and what their values must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC
from torch import Tensor

from unlearners import judges
from unlearners.base import Data, Task
from unlearners.errors import UsageError
from unlearners.judges.classifier import Classifier as ClassifierJudge
from unlearners.judges.classifier import network
from unlearners.metrics.mia import MIA, unseen
from unlearners.metrics.ra import RA
from unlearners.metrics.rmia import RMIA, above, auc
from unlearners.metrics.ta import TA
from unlearners.metrics.ua import UA
from unlearners.targets.classifier import Classifier

TARGET: Any = object.__new__(Classifier)  # metrics ask its family only; what it says is in the outputs
FORGET, RETAIN, TEST = Data(source="x", rows="random=0.1"), Data(source="x", rows="not random=0.1"), Data(source="x", split="test")
TASK = Task(name="tenth", kind="samples", concepts=("10 %",), forget=FORGET, retain=RETAIN, holdout=TEST)
Logits = tuple[Tensor, Tensor]


@dataclass
class Outputs:
    """Logits and labels from a table {data: (logits, labels)}."""

    table: Mapping[Data, Logits]
    references: Sequence[Callable[[Data], Logits]] = ()
    asked: list[Data] = field(default_factory=list)

    def logits(self, data: Data) -> Logits:
        self.asked.append(data)
        return self.table[data]


def saying(p: Tensor) -> Logits:
    """Two-class logits in which the true label, 0, has the probabilities ``p`` (N,)."""
    return torch.stack([torch.logit(p), torch.zeros_like(p)], 1), torch.zeros(len(p), dtype=torch.long)


def drawn(mean: float, n: int, seed: int) -> Tensor:
    """Probabilities (N,) in (0, 1): logistic of a Gaussian around ``mean``."""
    return torch.sigmoid(mean + 1.5 * torch.randn(n, generator=torch.Generator().manual_seed(seed)))


def outputs(f: Tensor, r: Tensor, t: Tensor, references: Sequence[Callable[[Data], Logits]] = ()) -> Any:
    return Outputs({FORGET: saying(f), RETAIN: saying(r), TEST: saying(t)}, references)


# --- accuracies ---------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
def test_accuracies_count(pairs: list[tuple[int, int]]) -> None:
    said, y = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    table = torch.nn.functional.one_hot(said, 3).float(), y
    seen: Any = Outputs({FORGET: table, RETAIN: table, TEST: table})
    right = 100 * sum(a == b for a, b in pairs) / len(pairs)
    ua, ra, ta = UA().score(TARGET, TASK, seen), RA().score(TARGET, TASK, seen), TA().score(TARGET, TASK, seen)
    assert (ra.value, ta.value, ua.value) == pytest.approx((right, right, 100 - right)) and ua.n == ra.n == ta.n == len(pairs)
    assert ra.low <= ra.value <= ra.high and ua.per_item == tuple(1 - v for v in ra.per_item)
    assert seen.asked == [FORGET, RETAIN, TEST]


def test_metrics_name_the_data_they_read() -> None:
    p = drawn(1.0, 40, 0)
    for metric in (UA(), RA(), TA(), MIA()):
        seen = outputs(p, p, p)
        metric.score(TARGET, TASK, seen)
        assert seen.asked == metric.data(TARGET, TASK) and metric.requests(TARGET, TASK) == []


def test_logits_that_are_not_finite_are_no_forgetting_and_no_attack_is_run_on_them() -> None:
    bad = torch.full((5, 2), math.nan), torch.zeros(5, dtype=torch.long)
    good = saying(drawn(1.0, 20, 1))
    seen: Any = Outputs({FORGET: bad, RETAIN: good, TEST: good}, [lambda d: good if d != FORGET else saying(torch.full((5,), 0.5))])
    ua, ra = UA().score(TARGET, TASK, seen), RA().score(TARGET, TASK, Outputs({RETAIN: bad}))
    assert math.isnan(ua.value) and ua.n == 5 and ra.value == 0, "a broken model has not forgotten, and it names nothing right"
    mia, rmia = MIA().score(TARGET, TASK, seen), RMIA().score(TARGET, TASK, seen)["auc"]
    assert math.isnan(mia.value) and mia.n == 5 and math.isnan(rmia.value) and rmia.n == 5


def test_unlearning_accuracy_of_a_family_that_neither_draws_nor_classifies() -> None:
    other: Any = SimpleNamespace()
    assert UA().requests(other, TASK) == [] and UA().data(other, TASK) == []
    with pytest.raises(UsageError, match="neither"):
        UA().score(other, TASK, outputs(*[torch.ones(1)] * 3))


# --- the confidence attack ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("places", [2, 8])
def test_attack_with_weights_decides_as_on_all_points(places: int) -> None:
    members, others, asked = (drawn(m, n, s).mul(10**places).round().div(10**places) for m, n, s in ((4, 300, 1), (2, 300, 2), (3, 200, 3)))
    x = torch.cat([members, others]).double().numpy()[:, None]
    machine = SVC(C=3, kernel="rbf", gamma="auto").fit(x, np.repeat([1, 0], 300))
    decision = machine.decision_function(asked.double().numpy()[:, None])
    clear = abs(decision) > 0.01  # libsvm stops at 0.001
    assert clear.mean() > 0.9 and set(decision[clear] > 0) == {True, False}
    assert [u for u, c in zip(unseen(members, others, asked), clear, strict=True) if c] == (decision[clear] < 0).tolist()


def test_attack_takes_trained_pictures_for_trained_and_unseen_ones_for_unseen() -> None:
    sure, unsure = drawn(7.0, 400, 1), drawn(0.0, 400, 2)
    like_members, like_others = (MIA().score(TARGET, TASK, outputs(f, sure, unsure)) for f in (drawn(7.0, 200, 3), drawn(0.0, 200, 4)))
    assert like_members.value < 10 and like_others.value > 90 and like_members.n == 200
    assert like_members.low <= like_members.value <= like_members.high


def test_attack_is_the_same_in_any_order_of_the_forget_set() -> None:
    f, r, t = drawn(3.0, 100, 1), drawn(4.0, 200, 2), drawn(2.0, 200, 3)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(4))
    a, b = (MIA().score(TARGET, TASK, outputs(x, r, t)) for x in (f, f[order]))
    assert a.value == b.value and tuple(a.per_item[i] for i in order.tolist()) == b.per_item and 0 < a.value < 100


def test_attack_learns_from_the_first_members_or_from_all_over() -> None:
    t, sure, unsure = drawn(0.0, 200, 1), drawn(7.0, 200, 2), drawn(0.0, 1800, 3)
    r, f = torch.cat([sure, unsure]), drawn(7.0, 100, 4)
    first = MIA(take="first")
    assert first.score(TARGET, TASK, outputs(f, r, t)).value < 10  # it sees the sure ones alone
    assert torch.equal(first.chosen(r, 200), sure)
    assert (MIA().chosen(r, 200) > 0.99).float().mean() < 0.2
    assert len(MIA().chosen(r, 200).unique()) > 190
    fewer = outputs(f, r, t)
    assert MIA(take="first", shadow=50).score(TARGET, TASK, fewer).value == first.score(TARGET, TASK, outputs(f, r[:50], t[:50])).value


# --- the robust attack --------------------------------------------------------------------------------------------
def robust(shift: float, n: int = 600, metric: RMIA | None = None) -> Mapping[str, Any]:
    """Scores where references find every picture as hard as another draw does, and the model is ``shift`` surer of the forget set."""
    hard = {
        FORGET: torch.randn(n, generator=torch.Generator().manual_seed(1)),
        TEST: torch.randn(2 * n, generator=torch.Generator().manual_seed(2)),
    }

    def model(seed: int, more: float) -> Callable[[Data], Logits]:
        def of(data: Data) -> Logits:
            own = torch.randn(len(hard[data]), generator=torch.Generator().manual_seed(seed + len(hard[data])))
            return saying(torch.sigmoid(2 + 2 * hard[data] + 0.5 * own + (more if data is FORGET else 0)))

        return of

    target = model(10, shift)
    seen: Any = Outputs({FORGET: target(FORGET), TEST: target(TEST)}, [model(s, 0) for s in (20, 30)])
    scores = (metric or RMIA()).score(TARGET, TASK, seen)
    assert set(seen.asked) == set(RMIA().data(TARGET, TASK))
    return scores


def test_nothing_to_find_is_fifty() -> None:
    scores = robust(0)
    found, low = scores["auc"], scores["tpr_at_1fpr"]
    assert found.low < 50 < found.high and found.high - found.low < 8 and found.n == 600
    assert low.value < 4


def test_a_planted_trace_is_found_and_a_planted_hole_too() -> None:
    scores = robust(3)
    assert scores["auc"].value > 90 and scores["tpr_at_1fpr"].value > 20
    assert robust(-3)["auc"].value < 10


def test_gamma_ranks_alike() -> None:
    assert robust(1, metric=RMIA(gamma=1.2))["auc"].value == pytest.approx(robust(1)["auc"].value, abs=3)


def test_without_references_nothing_is_said() -> None:
    p = drawn(1.0, 10, 0)
    scores = RMIA().score(TARGET, TASK, outputs(p, p, p))
    assert set(scores) == {"auc", "tpr_at_1fpr"} and all(math.isnan(s.value) and s.n == 0 for s in scores.values())


def test_ratio_is_the_paper_s() -> None:
    p = torch.tensor([0.9, 0.2])
    seen = outputs(p, p, p, [lambda _: saying(torch.tensor([0.5, 0.4])), lambda _: saying(torch.tensor([0.7, 0.2]))])
    expected = [0.9 / (0.5 * (1.3 * 0.6 + 0.7)), 0.2 / (0.5 * (1.3 * 0.3 + 0.7))]
    assert RMIA(a=0.3).ratio(seen, FORGET).tolist() == pytest.approx(expected, rel=1e-6)


def test_forgotten_classes_are_told_from_their_own_test_pictures() -> None:
    f, t = replace(FORGET, rows="class=cat"), replace(TEST, rows="not class=cat")
    own = Data(source="x", split="test", rows="class=cat")
    task = replace(TASK, kind="class", concepts=("cat",), forget=f, holdout=t)
    assert RMIA().data(TARGET, task) == [f, t, own]
    never = torch.full((300,), 0.01)  # a class nobody has learned
    answers = {f: drawn(-4.0, 300, 1), own: drawn(-4.0, 300, 2), t: drawn(4.0, 900, 3)}
    seen: Any = Outputs({d: saying(p) for d, p in answers.items()}, [lambda d: saying(never if d in (f, own) else answers[t])])
    found = RMIA().score(TARGET, task, seen)["auc"]
    assert found.low < 50 < found.high


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.lists(st.integers(0, 4), min_size=2, max_size=30))
def test_area_and_shares_are_the_naive_ones(a: list[int], b: list[int]) -> None:
    x, z = torch.tensor(a).double() + 0.5, torch.tensor(b).double() + 0.5
    assert above(x, z, 1.5).tolist() == pytest.approx([sum(i / j >= 1.5 for j in z.tolist()) / len(b) for i in x.tolist()])
    score = auc(x, z)
    assert score.value == pytest.approx(100 * roc_auc_score([1] * len(a) + [0] * len(b), a + b))
    assert score.n == len(a) and 0 <= score.low <= score.value <= score.high <= 100


# --- the judge ----------------------------------------------------------------------------------------------------
def test_classifier_judge_reads_any_size_and_its_own_domains() -> None:
    judge, images = ClassifierJudge(model="tiny-classifier", batch=3), torch.rand(7, 3, 16, 16)
    net = network("tiny-classifier")
    expected = [net.classes[i] for i in net.logits(images.to(net.device)).argmax(1).tolist()]
    task = Task(name="t", kind="class", concepts=("b",))
    assert judge.labels(images, task, "class") == judge.labels(images, task, "object") == expected
    assert judge.shows(images, task) == [label == "b" for label in expected]
    assert set(judge.labels(torch.rand(3, 3, 40, 40), task, "class")) <= set("abcd") and judge.labels(images[:0], task, "class") == []
    with pytest.raises(UsageError, match="style"):
        judge.labels(images, task, "style")


def test_judges_are_loaded_with_their_model() -> None:
    assert judges.load("classifier:tiny-classifier") == ClassifierJudge(model="tiny-classifier")
    assert judges.load("classifier") == ClassifierJudge() and judges.load("classifier:a:b") == ClassifierJudge(model="a:b")
    with pytest.raises(UsageError, match="model"):
        judges.load("canvas:some/model")
    with pytest.raises(UsageError, match="did you mean classifier"):
        judges.load("clasifier:x")
