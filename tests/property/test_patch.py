"""patch: bit-exact round trips, refusals that leave everything as it was, and foreign checkpoints read strictly."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unlearners import imports, patch
from unlearners.errors import RefusedError, UnlearnError, UsageError

Modules = dict[str, Any]


class Flat(nn.Module):
    """A text encoder spelled as transformers 5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(7, 4)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
        self.final_layer_norm = nn.LayerNorm(4)


class Nested(nn.Module):
    """The same as transformers 4 spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = Flat()


def model(seed: int = 0, text: type[nn.Module] = Flat) -> Modules:
    torch.manual_seed(seed)
    return {"unet": nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)), "text_encoder": text()}


def bits(modules: Modules) -> dict[str, bytes]:
    return {k: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for k, t in patch.live(modules).items()}


def edit(modules: Modules, *keys: str, by: float = 0.37) -> patch.Patch:
    """Change ``keys`` in place and return the patch."""
    base, before = patch.base_hash(modules), patch.fingerprint(modules)
    tensors = patch.live(modules)
    for k in keys:
        tensors[k].mul_(1.1).add_(by)
    return patch.Patch(tensors=patch.diff(before, modules), base=base, meta={"run": "abc", "method": "esd"})


W, B = "unet.0.weight", "unet.2.bias"
TEXT = "text_encoder.text_model.encoder.layers.0.weight"


# --- finding, saving, loading -------------------------------------------------------------------------------------
def test_diff_finds_exactly_what_changed() -> None:
    m = model()
    assert patch.diff(patch.fingerprint(m), m) == {}
    p = edit(m, W, TEXT)
    assert set(p.tensors) == {W, TEXT}
    assert p.components == {"unet", "text_encoder"}
    held = p.tensors[W].clone()
    m["unet"][0].weight.data.zero_()
    assert torch.equal(p.tensors[W], held), "the patch must own its tensors"


def test_diff_sees_buffers_and_the_last_bit() -> None:
    m = model()
    before = patch.fingerprint(m)
    m["unet"][1].running_mean[0] = -0.0
    m["unet"][0].weight.data.view(torch.int32)[0, 0, 0, 0] ^= 1
    assert set(patch.diff(before, m)) == {"unet.1.running_mean", W}


def test_diff_refuses_a_changed_layout() -> None:
    m = model()
    before = patch.fingerprint(m)
    m["unet"].append(nn.Linear(2, 2))
    with pytest.raises(UnlearnError, match="change weights in place only"):
        patch.diff(before, m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    start = {c: m.to(dtype, memory_format=torch.channels_last) for c, m in model().items()}
    done = deepcopy(start)
    p = edit(done, W, B, TEXT)
    patch.save(p, tmp_path / "w.safetensors")
    q = patch.load(tmp_path / "w.safetensors")
    assert (q.kind, q.base, q.meta) == (p.kind, p.base, p.meta)
    patch.apply(start, patch.base_hash(start), q)
    assert bits(start) == bits(done)


def test_equal_patches_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        patch.save(edit(model(), W, TEXT), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_base_hash_ignores_precision_and_spelling() -> None:
    half = {c: m.half() for c, m in model().items()}
    full = {c: m.float() for c, m in deepcopy(half).items()}
    nested: Any = Nested().half()
    nested.text_model.load_state_dict(half["text_encoder"].state_dict())
    assert patch.base_hash(half) == patch.base_hash(full) == patch.base_hash({"unet": full["unet"], "text_encoder": nested})
    full["unet"][2].bias.data[0] += 0.1
    changed = patch.base_hash(full)
    assert changed["unet"] != patch.base_hash(half)["unet"]
    assert changed["text_encoder"] == patch.base_hash(half)["text_encoder"]


def test_hub_spelling_goes_both_ways() -> None:
    key = "text_encoder.text_model.encoder.layers.0.weight"
    assert patch.hub_key("text_encoder.encoder.layers.0.weight") == key == patch.hub_key(key)
    assert patch.hub_key("text_encoder_2.final_layer_norm.bias") == "text_encoder_2.text_model.final_layer_norm.bias"
    t5 = "text_encoder_3.encoder.block.0.weight"
    for same in ("text_encoder_2.text_projection.weight", t5, "unet.conv_in.weight", "net.encoder.layers.0"):
        assert patch.hub_key(same) == same
    p = edit(model(text=Flat), TEXT)
    nested = model(text=Nested)
    assert patch.base_hash(nested) == p.base
    patch.apply(nested, patch.base_hash(nested), p)
    assert torch.equal(nested["text_encoder"].text_model.encoder["layers"][0].weight, p.tensors[TEXT])
    with pytest.raises(RefusedError, match="two spellings"):
        patch.Patch(tensors={key: torch.ones(1), "text_encoder.encoder.layers.0.weight": torch.ones(1)}, base={})


def test_a_real_pipeline_round_trips(sd: Callable[..., Any], tmp_path: Path) -> None:
    target, fresh = sd(), sd()
    assert patch.base_hash(target.modules) == patch.base_hash(fresh.modules)
    keys = [k for k in patch.live(target.modules) if k.startswith(("unet.conv_in", "text_encoder.text_model.encoder.layers.0."))]
    assert len(keys) > 2
    patch.save(edit(target.modules, *keys), tmp_path / "w.safetensors")
    p = patch.load(tmp_path / "w.safetensors")
    assert set(p.tensors) == set(keys)
    patch.apply(fresh.modules, fresh.base["sha256"], p)
    assert bits(fresh.modules) == bits(target.modules)


# --- files that must not be used ----------------------------------------------------------------------------------
def foreign(path: Path, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a file that others made."""
    return dict(imports.read(path, modules, patch.base_hash(modules)).tensors)


def refused(path: Path, says: str) -> None:
    with pytest.raises(RefusedError, match=says) as caught:
        patch.load(path)
    assert "\n" not in str(caught.value)


def test_missing_empty_foreign_and_damaged_files(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "cannot be read")
    refused(tmp_path, "cannot be read")
    (tmp_path / "zero.safetensors").write_bytes(b"")
    refused(tmp_path / "zero.safetensors", "damaged")
    save_file({"unet.0.bias": torch.ones(3)}, tmp_path / "plain.safetensors")
    refused(tmp_path / "plain.safetensors", "not written by unlearners")
    patch.save(patch.Patch(tensors={}, base={}), tmp_path / "empty.safetensors")
    refused(tmp_path / "empty.safetensors", "holds no tensors")
    tensors = {"unet.0.bias": torch.ones(3)}
    records = ["", "{", "[]", "3", "[" * 200_000, '{"kind": "value"}', '{"kind": "sum", "base": {"unet": "x"}, "meta": {}}']
    records += [f'{{"kind": "value", "base": {base}, "meta": {{}}}}' for base in ("{}", "[]", '"x"', '{"unet": 1}', '{"net": "x"}')]
    for record in records:
        save_file(tensors, tmp_path / "record.safetensors", {patch.METADATA: record})
        refused(tmp_path / "record.safetensors", "damaged record")


@settings(max_examples=60)
@given(st.data())
def test_any_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    patch.save(edit(model(), W, TEXT), folder / "w.safetensors")
    whole = (folder / "w.safetensors").read_bytes()
    (folder / "w.safetensors").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(RefusedError):
        patch.load(folder / "w.safetensors")


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.ckpt", "w.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_and_never_executed(tmp_path: Path, name: str, zipped: bool) -> None:
    bomb = {"unet.0.bias": torch.ones(3), "boom": Bomb(tmp_path / "boom")}
    with (tmp_path / name).open("wb") as file:
        torch.save(bomb, file, _use_new_zipfile_serialization=zipped)
    refused(tmp_path / name, "convert it to safetensors")
    with pytest.raises(RefusedError, match="would run code") as caught:
        foreign(tmp_path / name, model())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "boom").exists()
    with (tmp_path / name).open("rb") as file:
        torch.load(file, weights_only=False)
    assert (tmp_path / "boom").exists(), "the bomb is live, so the test means something"


def test_a_header_that_starts_like_a_pickle_is_still_read(tmp_path: Path) -> None:
    for pad in range(400):  # until the header's length has 0x80 as its lowest byte, which is also how a pickle starts
        p = patch.Patch(tensors={"unet.0.bias": torch.ones(3)}, base={"unet": "x"}, meta={"pad": "x" * pad})
        patch.save(p, tmp_path / "w.safetensors")
        if (tmp_path / "w.safetensors").read_bytes()[0] == 0x80:
            assert patch.load(tmp_path / "w.safetensors").meta == p.meta
            return
    raise AssertionError("no such header came up")


# --- a full disk --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["unlearners.patch.os.replace", "unlearners.patch.os.fsync", "unlearners.patch.save_file"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "w.safetensors"
    patch.save(edit(model(), W), path)
    old = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(UnlearnError, match=r"No space left.*is as before"):
            patch.save(edit(model(), B), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_write_that_really_fails_half_way(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    patch.save(edit(model(), W), path)
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UnlearnError, match="could not be written"):
            patch.save(edit(model(), B), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["w.safetensors"]


# --- applying -----------------------------------------------------------------------------------------------------
def test_the_wrong_base_is_refused_and_untouched_unless_forced() -> None:
    p, other = edit(model(0), W, TEXT), model(1)
    before = bits(other)
    with pytest.raises(RefusedError, match="made for another 'text_encoder'"):
        patch.apply(other, patch.base_hash(other), p)
    assert bits(other) == before
    patch.apply(other, patch.base_hash(other), p, force=True)
    assert torch.equal(other["unet"][0].weight, p.tensors[W])


def test_only_touched_components_must_match() -> None:
    p, mixed = edit(model(0), W), {"unet": model(0)["unet"], "text_encoder": model(1)["text_encoder"]}
    patch.apply(mixed, patch.base_hash(mixed), p)
    assert torch.equal(mixed["unet"][0].weight, p.tensors[W])


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize(
    "bad", [{"unet.9.weight": torch.ones(1)}, {"vae.weight": torch.ones(1)}, {B: torch.ones(5)}, {B: torch.ones(2, dtype=torch.int64)}]
)
def test_unknown_keys_and_shapes_are_refused_before_anything_changes(force: bool, bad: dict[str, Tensor]) -> None:
    m = model()
    good = edit(model(), W)
    before = bits(m)
    for patches in ([patch.Patch(tensors={**good.tensors, **bad}, base=good.base)], [good, patch.Patch(tensors=bad, base=good.base)]):
        with pytest.raises(RefusedError):
            patch.apply_all(m, patch.base_hash(m), patches, force=force)
        assert bits(m) == before


@pytest.mark.parametrize("kind", ["value", "delta"])
def test_scale_zero_is_the_identity(kind: str) -> None:
    m = model()
    m["unet"][2].bias.data[:] = torch.tensor([-0.0, 1.0])
    before, base = bits(m), patch.base_hash(m)
    patch.apply(m, base, patch.Patch(tensors={B: torch.tensor([torch.inf, 2.0])}, kind=kind, base=base), scale=0.0)  # type: ignore[arg-type]
    assert bits(m) == before


@given(st.floats(-2, 2))
def test_scale_is_linear(scale: float) -> None:
    m, done = model(), model()
    p, w = edit(done, W), m["unet"][0].weight.detach().clone()
    patch.apply(m, p.base, p, scale=scale)
    expected = w.double() + scale * (done["unet"][0].weight.detach().double() - w.double())
    torch.testing.assert_close(m["unet"][0].weight.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_a_scale_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UsageError, match="finite"):
        patch.apply(model(), {}, edit(model(), W), scale=float("nan"))


def test_delta_does_what_the_value_does_and_can_be_taken_out_again() -> None:
    start, done = model(), model()
    p = edit(done, W, TEXT)
    d = patch.to_delta(p, start)
    assert d.kind == "delta"
    m = model()
    patch.apply(m, p.base, d)
    for k, t in patch.live(m).items():
        torch.testing.assert_close(t, patch.live(done)[k])
    patch.subtract(m, p.base, d)
    for k, t in patch.live(m).items():
        torch.testing.assert_close(t, patch.live(start)[k])
    patch.apply(m := model(), p.base, patch.scaled(d, 0.5))
    patch.apply(n := model(), p.base, p, scale=0.5)
    for k, t in patch.live(m).items():
        torch.testing.assert_close(t, patch.live(n)[k])
    with pytest.raises(UsageError, match="to_delta"):
        patch.scaled(p, 2.0)


def test_a_delta_survives_saving(tmp_path: Path) -> None:
    d = patch.to_delta(edit(model(), W), model())
    patch.save(d, tmp_path / "d.safetensors")
    assert patch.load(tmp_path / "d.safetensors").kind == "delta"


def test_stacking_disjoint_values_is_bit_exact_in_any_order() -> None:
    p, q = edit(model(), W), edit(model(), TEXT, B)
    both = model()
    edit(both, W, TEXT, B)
    for patches in ([p, q], [q, p]):
        patch.apply_all(m := model(), p.base, patches)
        assert bits(m) == bits(both)
        one = patch.stack(patches, model())
        assert one.kind == "value"
        patch.apply(m := model(), p.base, one)
        assert bits(m) == bits(both)


def test_stacking_on_the_same_tensor_sums_the_changes() -> None:
    p, q, start = edit(model(), W, B), edit(model(), W, by=-2.0), patch.live(model())
    expected = p.tensors[W].double() + q.tensors[W].double() - start[W].double()
    for patches in ([p, q], [q, patch.to_delta(p, model())]):
        patch.apply_all(m := model(), p.base, patches)
        torch.testing.assert_close(patch.live(m)[W].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(patch.live(m)[B], p.tensors[B])
        one = patch.stack(patches, model())
        assert one.kind == "delta"
        patch.apply(n := model(), p.base, one)
        torch.testing.assert_close(patch.live(n)[W], patch.live(m)[W])
    with pytest.raises(RefusedError, match="different 'unet'"):
        patch.stack([p, edit(model(1), W)], model())


def test_applying_leaves_the_patch_and_the_gradient_settings_alone() -> None:
    m, p = model(), edit(model(), W)
    held, wanted = p.tensors[W].clone(), [x.requires_grad for x in m["unet"].parameters()]
    patch.apply(m, p.base, p)
    m["unet"][0].weight.data.zero_()
    assert torch.equal(p.tensors[W], held)
    assert [x.requires_grad for x in m["unet"].parameters()] == wanted
    assert m["unet"][0].weight.grad_fn is None


# --- foreign checkpoints ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_partial_unets(tmp_path: Path, prefix: str, suffix: str) -> None:
    tensors = {f"{prefix}0.weight": torch.ones(3, 2, 3, 3), f"{prefix}2.bias": torch.ones(2)}
    save_file(tensors, tmp_path / "u.safetensors")
    torch.save(tensors, tmp_path / "u.pt")
    assert set(foreign(tmp_path / f"u{suffix}", model())) == {W, B}


def advunlearn() -> dict[str, Tensor]:
    """What its wrapper module saves: every weight under ``text_encoder.text_model`` and again under the wrapper's own names."""
    state = {k: torch.randn_like(t) for k, t in Flat().state_dict().items()}
    bare = {k.replace("embeddings.", "embedding."): t for k, t in state.items()}
    prefixed = {f"text_encoder.text_model.{k}": t for k, t in state.items()}
    return {**prefixed, **bare, "text_encoder.text_model.embeddings.position_ids": torch.arange(7)}


@pytest.mark.parametrize("text", [Flat, Nested])
def test_advunlearn_text_encoders(tmp_path: Path, text: type[nn.Module]) -> None:
    given = advunlearn()
    torch.save(given, tmp_path / "TextEncoder.pt")
    m = model(text=text)
    found = foreign(tmp_path / "TextEncoder.pt", m)
    assert len(found) == len(Flat().state_dict())
    patch.apply(m, {}, patch.Patch(tensors=found, base={}), force=True)
    assert torch.equal(patch.live(m)[TEXT], given[TEXT])


@pytest.mark.parametrize("prefix", ["text_model.", "text_encoder.", ""])
@pytest.mark.parametrize("wrapped", [True, False])
def test_plain_text_encoders_in_every_spelling(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    state = {f"{prefix}{k}": t for k, t in Flat().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "te.bin")
    assert set(foreign(tmp_path / "te.bin", model())) == {k for k in patch.live(model()) if k.startswith("text_encoder.")}


def test_foreign_files_that_do_not_fit(tmp_path: Path) -> None:
    def bad(content: Any, says: str) -> None:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(RefusedError, match=says) as caught:
            foreign(tmp_path / "x.pt", model())
        assert "\n" not in str(caught.value)

    one = torch.ones(2)
    bad({"model.diffusion_model.in.weight": one}, "nothing in .* fits")
    bad({"2.bias": one, "3.bias": one}, "holds '3.bias'")
    bad({"2.bias": torch.ones(9)}, "another shape")
    bad({"2.bias": one, "unet.2.bias": one + 1}, "under two names")
    bad({"2.bias": one, "lr": 0.1}, "more than named tensors")
    bad([one], "more than named tensors")
    bad({}, "nothing in .* fits")
    with pytest.raises(RefusedError, match="cannot be read"):
        foreign(tmp_path / "none.pt", model())
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:100])
    with pytest.raises(RefusedError, match="damaged"):
        foreign(tmp_path / "cut.pt", model())
    twins = {**model(), "text_encoder_2": Flat()}
    torch.save(Flat().state_dict(), tmp_path / "te.pt")
    with pytest.raises(RefusedError, match="put the component before its name"):
        foreign(tmp_path / "te.pt", twins)


def test_a_real_text_encoder_checkpoint(sd: Callable[..., Any], tmp_path: Path) -> None:
    target = sd()
    state = {k: t + 1 for k, t in patch.live({"text_encoder": target.modules["text_encoder"]}).items()}
    save_file(state, tmp_path / "te.safetensors")
    assert load_file(tmp_path / "te.safetensors").keys() == state.keys()
    found = foreign(tmp_path / "te.safetensors", target.modules)
    patch.apply(target.modules, target.base["sha256"], patch.Patch(tensors=found, base=target.base["sha256"]))
    assert all(torch.equal(patch.live(target.modules)[k], t) for k, t in state.items())
