"""A pack gives what its samples give alone, to the last sample and the last gradient."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from packs import empty_pack, make_pack, one_by_one, relative, small_model

from onellm_dist.common.errors import OneLLMError
from onellm_dist.modalities import all_modalities
from onellm_dist.model import OneLLMForConditionalGeneration
from onellm_dist.packed import IGNORE, PackedBatch

NAMES = tuple(all_modalities())
MIXTURES: dict[str, tuple[list[Sequence[str]], list[int]]] = {
    **{name: ([(name,)] * 2, [5, 9]) for name in NAMES},
    "text": ([(), ()], [4, 11]),
    "texts of one token": ([("image",), (), ("imu",), ()], [1, 1, 1, 6]),
    "several at once": ([("image", "imu"), ("fmri", "image"), ()], [6, 3, 8]),
    "everything": (
        [(name,) for name in NAMES] + [(), ("imu", "audio")],
        [5, 6, 7, 8, 9, 10, 11, 12, 4, 3],
    ),
}


def gradients(model: OneLLMForConditionalGeneration, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
    )
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for n, p, g in zip(names, parameters, grads, strict=True)
    }


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.seconds
def test_packed_equals_unpacked(mixture: str) -> None:
    model, pack = small_model(), make_pack(*MIXTURES[mixture])
    model.requires_grad_(True)  # the LLM's and the encoder's gradients too
    model.encoder.proj.requires_grad_(False)
    alone = torch.cat(one_by_one(model, pack))
    logits, places, _ = model.compute_packed_logits(pack)
    targets = pack.labels[places]
    assert len(targets) == sum(pack.text_token_counts) - len(pack.text_token_counts)
    if len(targets):
        assert relative(logits, alone) <= 1e-5
    packed, unpacked = (
        gradients(model, F.cross_entropy(x, targets, reduction="sum")) for x in (logits, alone)
    )
    largest = max(g.abs().max() for g in unpacked.values())
    worst = {
        n: (((packed[n] - g).abs().max() / max(g.abs().max(), 1e-3 * largest)).item(), n)
        for n, g in unpacked.items()
    }
    assert max(worst.values())[0] <= 1e-4, max(worst.values())


def test_the_loss_is_the_weighted_sum_over_supervised_tokens() -> None:
    model, pack = small_model(), make_pack([("image",), (), ("fmri",)], [5, 7, 3])
    labels = pack.labels.clone()
    labels[6:9] = IGNORE
    pack = PackedBatch(
        pack.input_ids,
        labels,
        pack.text_token_counts,
        pack.modalities,
        pack.values,
        torch.tensor([1.0, 0.0, 1.0]),
    )
    alone = one_by_one(model, pack)
    out = model(packed=pack)
    supervised = [s[s != IGNORE] for s in labels.split(list(pack.text_token_counts))]
    nll = [
        F.cross_entropy(x[s[1:] != IGNORE], t, reduction="none")
        for x, s, t in zip(alone, labels.split([5, 7, 3]), supervised, strict=True)
    ]
    assert torch.allclose(out.nll, torch.cat(nll), rtol=1e-5)
    assert out.sample_index.tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert torch.allclose(out.loss, nll[0].sum() + nll[2].sum(), rtol=1e-5)
    assert out.loss.dtype == torch.float32
    assert set(out.router_weights) == set(NAMES)
    assert all(
        g.shape == (30, 3) and torch.allclose(g.sum(1), torch.ones(30))
        for g in out.router_weights.values()
    )


@pytest.mark.parametrize("changed", range(5))
def test_nothing_leaks_between_samples(changed: int) -> None:
    modalities: list[tuple[str, ...]] = [("image",), ("imu",), (), ("image",), ("fmri", "imu")]
    lengths = [5, 6, 7, 8, 4]
    model, pack = small_model(), make_pack(modalities, lengths)
    other = make_pack(modalities, lengths, seed=1)
    start = sum(lengths[:changed])
    ids, labels, values = pack.input_ids.clone(), pack.labels, dict(pack.values)
    ids[start + 1 : start + lengths[changed]] = other.input_ids[
        start + 1 : start + lengths[changed]
    ]
    for name in modalities[changed]:
        row = sum(list(r).count(name) for r in modalities[:changed])
        values[name] = values[name].clone()
        values[name][row] = other.values[name][row]
    with torch.no_grad():
        before = model.compute_packed_logits(pack)[0].split([n - 1 for n in lengths])
        after = model.compute_packed_logits(
            PackedBatch(ids, labels, pack.text_token_counts, pack.modalities, values, pack.weights)
        )[0].split([n - 1 for n in lengths])
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != changed), (
            f"sample {i} moved with sample {changed}"
            if i != changed
            else "the change had no effect"
        )


@pytest.mark.parametrize("router", ["soft", "constant", "sparse"])
@pytest.mark.parametrize("stage", ["align", "tune"])
def test_an_empty_pack_gives_zero_gradients_and_no_missing_ones(router: str, stage: str) -> None:
    model = small_model(router=router)
    if stage == "tune":
        model.requires_grad_(False)
        model.llm.requires_grad_(True)
    out = model(packed=empty_pack())
    out.loss.backward()
    trainable = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert out.loss.item() == 0
    assert trainable
    assert [n for n, g in trainable.items() if g is None or g.abs().max() > 0] == []


@pytest.mark.parametrize("router", ["soft", "constant", "sparse"])
def test_absent_modalities_get_zero_and_not_missing_gradients(router: str) -> None:
    model = small_model(router=router)
    model(packed=make_pack([("imu",)], [6])).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, g in grads.items() if g is None] == []
    moved = {
        n.split(".")[1]
        for n, g in grads.items()
        if g is not None and n.startswith(("tokenizers.", "projectors.")) and g.abs().max() > 0
    }
    assert moved == {"imu"}


def test_no_samples_at_all_still_run_the_encoder_and_the_upm() -> None:
    model = small_model()
    tokens, _ = model.encode({})
    torch.stack([t.sum() for t in tokens.values()]).sum().backward()
    missing = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and "_tag." not in n and p.grad is None
    ]
    assert missing == []
    assert all(t.shape == (0, 30, 48) for t in tokens.values())


def test_every_module_runs_once_whatever_the_samples() -> None:
    """Sharded models meet in collectives: the order of module calls may not depend on the data."""
    model = small_model()
    calls: list[str] = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    seen = []
    for pack in (
        make_pack([("image",)], [4]),
        make_pack([("audio",), ("fmri", "imu")], [3, 5]),
        empty_pack(),
    ):
        calls.clear()
        model(packed=pack)
        seen.append(list(calls))
    assert seen[0] == seen[1] == seen[2]
    unused = {
        n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    } - set(seen[0])
    assert unused == {"encoder.proj"}


def test_parameters_are_read_only_inside_their_own_module() -> None:
    """ZeRO-3 has a parameter's data only while its owner runs: empty it outside, as ZeRO-3 does."""
    model, pack = (
        small_model().requires_grad_(False),
        make_pack([("image",), ("audio",), ("fmri", "imu")], [4, 3, 5]),
    )
    expected = model(packed=pack).loss
    full = {
        module: [(p, p.data) for p in module.parameters(recurse=False)]
        for module in model.modules()
    }

    def gather(module: torch.nn.Module, *_: object) -> None:
        for parameter, data in full[module]:
            parameter.data = data

    def release(module: torch.nn.Module, *_arguments: object) -> None:
        for parameter, _ in full[module]:
            parameter.data = torch.empty(0)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)
    assert torch.equal(model(packed=pack).loss, expected)


@pytest.mark.parametrize("what", ["rows", "tokens", "missing"])
def test_a_pack_that_contradicts_itself_is_refused(what: str) -> None:
    model, pack = small_model(), make_pack([("imu",)], [6])
    values, counts = dict(pack.values), pack.text_token_counts
    if what == "rows":
        values["imu"] = values["imu"][:0]
    elif what == "missing":
        del values["imu"]
    else:
        counts = (5,)
    with pytest.raises(OneLLMError, match="contradicts itself"):
        model(
            packed=PackedBatch(
                pack.input_ids, pack.labels, counts, pack.modalities, values, pack.weights
            )
        )


@pytest.mark.parametrize("names", [["imu"], ["image"], ["imu", "image", "fmri"]])
@pytest.mark.seconds
def test_models_of_fewer_modalities(names: list[str]) -> None:
    model = small_model(modalities=names)
    assert model.config.modalities == sorted(names, key=NAMES.index)
    pack = make_pack([(name,) for name in names], [5] * len(names))
    kept = {name: pack.values[name] for name in names}
    pack = PackedBatch(
        pack.input_ids, pack.labels, pack.text_token_counts, pack.modalities, kept, pack.weights
    )
    logits, _, _ = model.compute_packed_logits(pack)
    assert relative(logits, torch.cat(one_by_one(model, pack))) <= 1e-5
    with pytest.raises(OneLLMError, match="video"):
        model(packed=make_pack([("video",)], [5]))


def test_moving_a_pack_counts_its_targets_on_the_host() -> None:
    pack = make_pack([("imu",), ()], [6, 4])
    moved = pack.to("cpu")
    assert moved.supervised is not None
    assert moved.supervised.tolist() == [1, 2, 3, 4, 5, 7, 8, 9]
    model = small_model()
    assert torch.equal(model(packed=moved).loss, model(packed=pack).loss)


@pytest.mark.parametrize(
    "pack",
    [make_pack([("image",), ("imu",), ()], [5, 6, 3]), empty_pack()],
    ids=["samples", "empty"],
)
def test_activation_checkpointing_recomputes_every_block_and_changes_nothing(
    pack: PackedBatch,
) -> None:
    model = small_model()
    plain = gradients(model, model(packed=pack).loss)
    model.gradient_checkpointing_enable()
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith((".attn", ".attention", ".self_attn")):
            module.register_forward_pre_hook(
                lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
            )
    again = gradients(model, model(packed=pack).loss)
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    # The encoder runs twice, and its visual pack has no gradient, hence nothing to recompute.
    assert {n: c for n, c in calls.items() if c != (3 if n.startswith("encoder.") else 2)} == {}
    assert len(calls) == 2 + 3 * 2 + 2
