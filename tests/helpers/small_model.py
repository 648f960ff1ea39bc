"""A small model with what makes engines stumble.

It has frozen parts, branches that a rank may not need, and tied embeddings.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from onellm_dist.packed import IGNORE, PackedBatch, PackedOutput

WIDTH, VOCABULARY = 24, 40


class Branch(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3)
        self.proj = nn.Linear(4 * (features - 2), WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        out: torch.Tensor = self.proj(self.conv(x.unsqueeze(1)).reshape(n, self.proj.in_features))
        return out


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return out


class SmallModel(nn.Module):
    """Two branches -> frozen tower -> trained tower -> frozen or trained tied language part.

    Args:
        indivisible: classes that FSDP2 gathers by themselves, as blocks; none: all with the root.
    """

    def __init__(self, indivisible: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._no_split_modules = indivisible
        self.branches = nn.ModuleDict({"a": Branch(10), "b": Branch(7)})
        self.encoder, self.upm = Tower(), Tower()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.llm = Tower()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def compute_packed_logits(
        self, packed: PackedBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The logits of the supervised tokens, [N, V], their places, [N], and the last states."""
        dtype = self.embedding.weight.dtype
        tokens = torch.cat(
            [self.branches[name](packed.values[name].to(dtype)) for name in ("a", "b")]
        )
        tokens = self.upm(self.encoder(tokens))
        order = {"a": 0, "b": packed.values["a"].shape[0]}
        text = self.embedding(packed.input_ids)
        start, states = 0, []
        for length, names in zip(packed.text_token_counts, packed.modalities, strict=True):
            own = text[start : start + length]
            for name in names:
                own = own + tokens[order[name]]
                order[name] += 1
            states.append(own)
            start += length
        hidden = self.llm(torch.cat(states) + 0 * tokens.sum())
        keep = (packed.labels[1:] != IGNORE).nonzero().flatten()
        return self.head(hidden[:-1][keep]), keep, hidden

    def forward(self, packed: PackedBatch) -> PackedOutput:
        logits, keep, hidden = self.compute_packed_logits(packed)
        sample = torch.repeat_interleave(
            torch.arange(len(packed.text_token_counts)), torch.tensor(packed.text_token_counts)
        )
        target = packed.labels[1:][keep]
        nll = functional.cross_entropy(logits.float(), target, reduction="none")
        index = sample[1:][keep]
        loss = (nll * packed.weights[index]).sum() + 0.0 * logits.sum() + 0.0 * hidden.sum()
        return PackedOutput(loss=loss, nll=nll.detach(), sample_index=index)


def sample(index: int, names: tuple[str, ...]) -> PackedBatch:
    """One sample of modalities `names`, a pure function of its index."""
    generator = torch.Generator().manual_seed(index)
    length = 3 + index % 4
    ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
    ids[0] = 1
    labels = ids.clone()
    labels[0] = IGNORE
    values = {
        name: torch.randn((1 if name in names else 0, features), generator=generator)
        for name, features in (("a", 10), ("b", 7))
    }
    return PackedBatch(ids, labels, (length,), (names,), values, torch.ones(1), (f"s{index}",))


def pack(samples: list[PackedBatch]) -> PackedBatch:
    """Several samples as one pack; none: an empty micro-batch."""
    if not samples:
        empty = {"a": torch.zeros(0, 10), "b": torch.zeros(0, 7)}
        return PackedBatch(
            torch.tensor([1]),
            torch.tensor([IGNORE]),
            (1,),
            ((),),
            empty,
            torch.zeros(1),
            is_empty=True,
        )
    return PackedBatch(
        torch.cat([s.input_ids for s in samples]),
        torch.cat([s.labels for s in samples]),
        tuple(n for s in samples for n in s.text_token_counts),
        tuple(m for s in samples for m in s.modalities),
        {k: torch.cat([s.values[k] for s in samples]) for k in ("a", "b")},
        torch.cat([s.weights for s in samples]),
        tuple(i for s in samples for i in s.sample_ids),
    )


def supervised(batch: PackedBatch) -> int:
    """Targets of a pack."""
    return int((batch.labels != IGNORE).sum())
