"""OneLLM as a transformers model: eight modalities through one encoder and one UPM into any causal LM (paper, section 3)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.modalities import QUERY_TOKENS, get_modality
from onellm_dist.model.attention import ATTENTION_NAME, SequenceLengths, device_tensor, packed_mask
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.encoder import Encoder
from onellm_dist.model.generation import generate_text
from onellm_dist.model.layout import Layout
from onellm_dist.model.padded import Spliced, prompt_starts, shifted_loss, splice
from onellm_dist.model.projector import ModalityTokenizer, Projector
from onellm_dist.model.upm import UPM
from onellm_dist.packed import IGNORE, PackedBatch, PackedOutput

VALUES_SUFFIX = "_values"


class OneLLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model. Training calls it with `packed=`; everybody else with `input_ids` and `image_values=`, ...

    Every forward runs the same modules in the same order, whatever it was given (on empty tensors where it was given
    nothing), so that the collectives of a sharded model meet in forward and backward.
    """

    config_class = OneLLMConfig
    base_model_prefix = "llm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["EncoderBlock", "UPMBlock", "LlamaDecoderLayer"]  # noqa: RUF012

    config: OneLLMConfig
    llm: Any

    def __init__(self, config: OneLLMConfig) -> None:
        super().__init__(config)
        width = config.vision.width
        self.encoder = Encoder(config.vision)
        self.tokenizers = nn.ModuleDict(
            {
                name: ModalityTokenizer(name, width, config.vision.prefix)
                for name in config.tokenizer_modalities
            }
        )
        self.projectors = nn.ModuleDict({name: Projector(config) for name in config.modalities})
        self.upm = UPM(width, config.upm)
        self.llm = AutoModelForCausalLM.from_config(
            config.text_config, attn_implementation=ATTENTION_NAME
        )
        self.encoder.requires_grad_(False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `initialisation.initialise` fills our parts, and `from_pretrained` refuses a checkpoint that lacks keys."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, but a checkpoint with missing or unknown keys is refused, with all of them.

        Raises:
            OneLLMError: the checkpoint does not fit the model its config describes.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        problems = [
            f"{kind}: {', '.join(map(str, sorted(info[kind])))}"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info.get(kind)
        ]
        if problems:
            raise OneLLMError(
                f"{args[0] if args else kwargs.get('pretrained_model_name_or_path')}: the weights do not fit the config\n"
                + "\n".join(problems),
                "parts of the model would be random or lost.",
                "convert the checkpoint again, or use the config it was saved with.",
            )
        model.encoder.requires_grad_(
            False
        )  # loading makes new parameters, which all want gradients
        return (model, info) if wants_info else model

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As torch's own (`.to`, `.bfloat16()`, DeepSpeed's cast), but rotary frequencies stay in fp32.

        In bf16 they are off by up to 0.4%, which is several radians after a thousand positions.
        """
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            owner, _, leaf = name.rpartition(".")
            cast = self.get_buffer(name)
            if cast.dtype != buffer.dtype and not buffer.is_meta:
                setattr(self.get_submodule(owner), leaf, buffer.to(cast.device))
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embedding."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's head."""
        return self.llm.get_output_embeddings()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute every block of encoder, UPM and LLM in backward; non-reentrant where not said otherwise."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # 5.23 renames it; 5.17 has only this name
            super().gradient_checkpointing_enable(options, **kwargs)
        if not options["use_reentrant"]:
            self.disable_input_require_grads()  # else text embeddings would get gradients that nobody needs

    def projector(self, name: str) -> Projector:
        """A modality's own projections, queries, router and tags."""
        return cast(Projector, self.projectors[name])

    # -- modality tokens ---------------------------------------------------------------------------------------------------

    def encode(
        self, values: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Values of any modalities to the tokens that the LLM reads.

        Args:
            values: modality -> [n_m, *value_shape]; a modality that is not named has n_m = 0.

        Returns:
            (modality -> [n_m, Q, d] tokens, modality -> [Q, E] gates), every modality of the model in its order.
        """
        values = {name: self._value(name, values.get(name)) for name in self.config.modalities}
        features = {**self._encode_visual(values), **self._encode_tokenized(values)}
        inputs, gates = [], {}
        for name in self.config.modalities:
            x, gates[name] = self.projector(name)(features[name])
            inputs.append(x)
        mixed = self._run_upm(inputs, gates)
        counts = [len(x) for x in inputs]
        rows = mixed.split([n * QUERY_TOKENS for n in counts])
        tokens = {
            name: (out := self.projector(name).out_proj(part)).reshape(
                n, QUERY_TOKENS, out.shape[-1]
            )
            for name, part, n in zip(self.config.modalities, rows, counts, strict=True)
        }
        return tokens, gates

    def _value(self, name: str, value: torch.Tensor | None) -> torch.Tensor:
        shape = get_modality(name).value_shape
        device = self.llm.device
        if value is None:
            return torch.zeros((0, *shape), dtype=torch.float32, device=device)
        if tuple(value.shape[1:]) != tuple(shape):
            raise OneLLMError(
                f"{name} values have shape {tuple(value.shape)}",
                f"the model reads [n, {', '.join(map(str, shape))}].",
                "use the modality's own transform (OneLLMProcessor does).",
            )
        return value.to(device)

    def _encode_visual(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The visual pack: all frames of all visual modalities through the frozen encoder, frames then averaged."""
        names = self.config.visual_modalities
        if not names:
            return {}
        frames = torch.cat(
            [
                values[name].reshape(-1 if len(values[name]) else 0, *values[name].shape[-3:])
                for name in names
            ]
        )
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        ):
            x = self.encoder.images(self.encoder.pixels(frames))
        counts = [len(values[name]) for name in names]
        parts = x.split(
            [n * get_modality(name).frames for name, n in zip(names, counts, strict=True)]
        )
        return {
            name: part.reshape(n, get_modality(name).frames, *x.shape[1:]).mean(1)
            for name, part, n in zip(names, parts, counts, strict=True)
        }

    def _encode_tokenized(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tokenizer pack: all other modalities through their tokenizers, then the same encoder with gradient."""
        names = self.config.tokenizer_modalities
        if not names:
            return {}
        tokens = [self.tokenizers[name](values[name], self.encoder.prefix) for name in names]
        lengths = [t.shape[1] for t in tokens for _ in range(len(t))]
        flat = torch.cat([t.reshape(t.shape[0] * t.shape[1], t.shape[2]) for t in tokens])
        x = self.encoder(flat, SequenceLengths.of(lengths, device=flat.device))
        parts = x.split([t.shape[0] * t.shape[1] for t in tokens])
        return {
            name: part.reshape(t.shape) for name, part, t in zip(names, parts, tokens, strict=True)
        }

    def _run_upm(
        self, inputs: Sequence[torch.Tensor], gates: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """[n_m, Q + L_m, D] of every modality -> [sum of n_m * Q, D]."""
        lengths = tuple(x.shape[1] for x in inputs for _ in range(len(x)))
        flat = torch.cat([x.reshape(x.shape[0] * x.shape[1], x.shape[2]) for x in inputs])
        rows = torch.cat([g.repeat(len(x), 1) for x, g in zip(inputs, gates.values(), strict=True)])
        return self.upm(flat, rows, lengths, QUERY_TOKENS)

    def _tags(self) -> torch.Tensor:
        """[2 * modalities, d]: start and end tag of every modality."""
        return torch.cat([self.projector(name).tags() for name in self.config.modalities])

    # -- forward -----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        packed: PackedBatch | None = None,
        modality_order: Sequence[str] | None = None,
        **values: torch.Tensor | None,
    ) -> PackedOutput | CausalLMOutputWithPast:
        """A pack, or a padded batch.

        Args:
            input_ids: [B, S]; attention_mask: [B, S], 0 for padding on either side; labels: [B, S], IGNORE where unsupervised.
            packed: a PackedBatch instead of all the others.
            modality_order: order of the runs; image, video, audio, point, depth, normal, imu, fmri where not given.
            values: `image_values=[B, 3, 224, 224]` and so on, for any of the modalities.

        Returns:
            PackedOutput for a pack; else logits [B, S + 32 n, V] for n modalities, and where labels are given the mean loss
            over supervised tokens.
        """
        if packed is not None:
            return self._forward_packed(packed)
        if input_ids is None:
            raise UsageError(
                "forward got neither input_ids nor packed",
                "there is nothing to run.",
                "give one of them.",
            )
        spliced = self.splice(input_ids, attention_mask, values, modality_order)
        out = self.llm(
            inputs_embeds=spliced.embeds,
            attention_mask=spliced.mask,
            position_ids=spliced.position_ids,
            use_cache=False,
        )
        loss = (
            None
            if labels is None
            else shifted_loss(out.logits, labels, input_ids, attention_mask, spliced)
        )
        return CausalLMOutputWithPast(loss=loss, logits=out.logits)

    def splice(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        values: Mapping[str, Any],
        modality_order: Sequence[str] | None = None,
    ) -> Spliced:
        """A padded batch [B, S] with its modalities' runs put in after each sample's first token: embeddings [B, S + 32n, d]."""
        batch = len(input_ids)
        by_name = self._named_values(values, batch)
        order = self._run_order(by_name, modality_order)
        tokens, _ = self.encode(by_name)
        text = self.llm.get_input_embeddings()(input_ids)
        tags = self._tags().to(text.dtype)
        at = {name: i for i, name in enumerate(self.config.modalities)}
        runs = [
            x
            for name in order
            for x in (
                tags[2 * at[name]].expand(batch, 1, -1),
                tokens[name].to(text.dtype),
                tags[2 * at[name] + 1].expand(batch, 1, -1),
            )
        ]
        return splice(
            text,
            attention_mask,
            torch.cat(runs, 1) if runs else text[:, :0],
            prompt_starts(input_ids, attention_mask),
        )

    def _named_values(self, values: Mapping[str, Any], batch: int) -> dict[str, torch.Tensor]:
        given = {
            key.removesuffix(VALUES_SUFFIX): value
            for key, value in values.items()
            if value is not None
        }
        known = {name + VALUES_SUFFIX for name in self.config.modalities}
        unknown = sorted(
            key for key, value in values.items() if value is not None and key not in known
        )
        if unknown:
            raise UsageError(
                f"unknown input {', '.join(unknown)}",
                "the model would ignore it.",
                f"it takes {', '.join(sorted(known))}.",
            )
        for name, value in given.items():
            if len(value) != batch:
                raise UsageError(
                    f"{name}_values has {len(value)} rows for {batch} texts",
                    "every text needs one.",
                    "give one row a text.",
                )
        return given

    def _run_order(self, given: Mapping[str, Any], order: Sequence[str] | None) -> list[str]:
        names = [name for name in self.config.modalities if name in given]
        if order is None:
            return names
        if sorted(order) != sorted(names):
            raise UsageError(
                f"modality_order={list(order)} for values of {names}",
                "each must be named once.",
                "name exactly those.",
            )
        return list(order)

    def packed_logits(
        self, batch: PackedBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Logits of a pack's supervised tokens alone.

        Returns:
            ([N, V] logits, [N] their places in `batch.labels`, modality -> [Q, E] gates).
        """
        device = batch.input_ids.device
        layout = Layout.of(batch.text_token_counts, batch.modalities, self.config.modalities)
        self._check_pack(batch, layout)
        tokens, gates = self.encode(batch.values)
        text = self.llm.get_input_embeddings()(batch.input_ids)
        table = torch.cat(
            [
                text,
                *(t.flatten(0, 1).to(text.dtype) for t in tokens.values()),
                self._tags().to(text.dtype),
            ]
        )
        sequence = table.index_select(0, device_tensor(layout.gather, device))
        supervised = (
            batch.supervised
            if batch.supervised is not None
            else (batch.labels != IGNORE).nonzero().squeeze(1)
        )
        out = self.llm(
            inputs_embeds=sequence[None],
            position_ids=device_tensor(layout.position_ids, device)[None],
            attention_mask=packed_mask(device),
            use_cache=False,
            seq_lengths=SequenceLengths.of(layout.lengths, device=device),
            logits_to_keep=device_tensor(layout.predictor, device).index_select(0, supervised),
        )
        return out.logits[0], supervised, gates

    def _forward_packed(self, batch: PackedBatch) -> PackedOutput:
        logits, supervised, gates = self.packed_logits(batch)
        nll = F.cross_entropy(
            logits.float(), batch.labels.index_select(0, supervised), reduction="none"
        )
        sample = device_tensor(
            np.repeat(np.arange(len(batch.text_token_counts)), batch.text_token_counts),
            logits.device,
        ).index_select(0, supervised)
        loss = (nll * batch.weights.to(nll.dtype).index_select(0, sample)).sum()
        return PackedOutput(
            loss=loss,
            nll=nll.detach(),
            sample_index=sample,
            router={name: g.detach().float() for name, g in gates.items()},
        )

    def _check_pack(self, batch: PackedBatch, layout: Layout) -> None:
        wrong = [
            f"{name}: {len(v)} rows for {layout.counts.get(name, 0)} runs"
            for name, v in batch.values.items()
            if len(v) != layout.counts.get(name, 0)
        ]
        wrong += [
            f"{name}: no values for {n} runs"
            for name, n in layout.counts.items()
            if n and name not in batch.values
        ]
        if len(batch.input_ids) != len(layout.predictor):
            wrong.append(
                f"{len(batch.input_ids)} text tokens for text lengths that sum to {len(layout.predictor)}"
            )
        if wrong:
            raise OneLLMError(
                f"the pack contradicts itself: {'; '.join(wrong)}",
                "samples would be mixed up.",
                "mend whoever made it.",
            )

    # -- generation --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        modality_order: Sequence[str] | None = None,
        decode_offset: str = "correct",
        **kwargs: Any,
    ) -> torch.Tensor:
        """Continue each text after its modalities: [B, S] -> [B, S + new] token ids, prompt included.

        Args:
            attention_mask: [B, S]; batches of unequal prompts are padded on the left.
            decode_offset: `correct`, or `reference`, which repeats the reference's cache fault: after the prefill the last two
                positions are overwritten, and positions go on two too low.
            kwargs: `image_values=` and so on, and what transformers' `generate` takes; say the length as `max_new_tokens`.
        """
        values = {key: kwargs.pop(key) for key in list(kwargs) if key.endswith(VALUES_SUFFIX)}
        config = copy.deepcopy(kwargs.pop("generation_config", None) or self.generation_config)
        rest = config.update(**kwargs)
        spliced = self.splice(input_ids, attention_mask, values, modality_order)
        return generate_text(self.llm, input_ids, spliced, decode_offset, config, rest)
