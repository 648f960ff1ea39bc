"""OneLLM as a transformers model: eight modalities, an encoder, a UPM, any causal LM (paper, 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.placeholders import PlacedSpan
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.encoder import Encoder
from onellm_dist.model.generation.generate import generate_text
from onellm_dist.model.generation.options import choose_settings
from onellm_dist.model.llm.call import LLMSupport, run_packed, run_padded
from onellm_dist.model.llm.check import check_llm
from onellm_dist.model.llm.dropout import update_dropout
from onellm_dist.model.llm.per_layer import get_token_ids
from onellm_dist.model.llm.rope import split_rope
from onellm_dist.model.llm.token_ids import check_tokens, count_embeddings
from onellm_dist.model.losses.packed import compute_packed_loss
from onellm_dist.model.losses.preference import PreferenceLoss
from onellm_dist.model.losses.registry import DEFAULT_LOSS, TokenLoss, get_loss
from onellm_dist.model.modality_tokens import compute_modality_tokens
from onellm_dist.model.other_trainers import WorksInTrainers, name_values, take_options
from onellm_dist.model.placement import get_device, list_layer_classes
from onellm_dist.model.projector import ModalityTokenizer, Projector
from onellm_dist.model.refused_changes import refuse_attention, refuse_overlap, refuse_resize
from onellm_dist.model.saving import KeepsSums, check_source
from onellm_dist.model.sequence_lengths import to_device_tensor
from onellm_dist.model.spans.layout import PackedLayout
from onellm_dist.model.spans.padded import (
    VALUES_SUFFIX,
    PaddedInputs,
    compute_padded_loss,
)
from onellm_dist.model.spans.padded_inputs import build_padded_inputs
from onellm_dist.model.spans.positions import SpanNumbers, list_span_numbers
from onellm_dist.model.upm import UPM
from onellm_dist.packed import IGNORE, PackedBatch, PackedOutput

Encoded = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""What `encode` returns."""


class OneLLMForConditionalGeneration(KeepsSums, WorksInTrainers, PreTrainedModel, GenerationMixin):
    """The complete model.

    The LLM is checked before it is built (`llm/check.py`): an LLM that is not exact is refused with
    a UsageError.

    Training calls it with `packed=`; everything else calls it with `input_ids`, `image_values` and
    so on. Every forward runs the same modules in the same order, on empty tensors where it was
    given nothing, so that the collectives of a sharded model match in forward and backward.
    """

    config_class = OneLLMConfig
    base_model_prefix = "llm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # transformers declares a plain list, not a ClassVar; it adds the LLM's own.
    _no_split_modules = ["EncoderBlock", "UPMBlock"]  # noqa: RUF012

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
        self.llm_support: LLMSupport = check_llm(config.text_config)
        self.llm = AutoModelForCausalLM.from_config(
            config.text_config,
            attn_implementation=self.llm_support.attention,
            trust_remote_code=False,
        )
        split_rope(self.llm)
        self.encoder.requires_grad_(False)
        self.loss_name = DEFAULT_LOSS
        self.token_loss = get_loss(DEFAULT_LOSS)
        """The loss of a supervised token."""
        self.preference: PreferenceLoss | None = None
        """What compares the two answers of pairs; None: packs have no pairs."""
        self.idle_passes: frozenset[str] = frozenset()
        """Passes through the encoder that are left out where they are empty
        (`modality_tokens.find_idle_passes`)."""
        self.generation_settings: Mapping[str, Any] | None = None
        """Values of the `generation_config.json` of the model's folder (`open_model`)."""
        self.post_init()  # type: ignore[no-untyped-call]  # transformers has no annotation
        whole = {*(self._no_split_modules or ()), *list_layer_classes(self.llm)}
        self._no_split_modules = sorted(whole)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `initialisation.initialise` fills the parts that are not pretrained.

        `from_pretrained` refuses a checkpoint that lacks keys.
        """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but refuse other bytes than recorded, and other keys.

        Args:
            args: as of transformers' `from_pretrained`.
            kwargs: as of transformers' `from_pretrained`.

        Raises:
            UsageError: a file does not have the SHA-256 that its folder records, or `device_map`
                places a part twice.
            OneLLMError: the checkpoint does not fit the model of its config; all keys are named.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        check_source(source, kwargs.get("subfolder"))
        refuse_overlap(kwargs.get("device_map"))
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        problems = [
            f"{kind}: {', '.join(map(str, sorted(info[kind])))}"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info.get(kind)
        ]
        if problems:
            raise OneLLMError(
                f"{source}: the weights do not fit the config\n" + "\n".join(problems),
                "parts of the model would be random or lost.",
                "convert the checkpoint again, or use the config it was saved with.",
            )
        # Loading makes new parameters, and all of them require gradients.
        model.encoder.requires_grad_(False)
        return (model, info) if wants_info else model

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Apply as torch does (`.to`, `.bfloat16()`, DeepSpeed's cast), but keep buffers in fp32.

        The buffers are the rotary frequencies. In bf16 they are off by up to 0.4%, which is several
        radians after a thousand positions.
        """
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no annotation
        for name, buffer in kept.items():
            owner, _, leaf = name.rpartition(".")
            converted = self.get_buffer(name)
            if converted.dtype != buffer.dtype and not buffer.is_meta:
                setattr(self.get_submodule(owner), leaf, buffer.to(converted.device))
        return self

    @property
    def device(self) -> torch.device:
        """Where the model expects its inputs."""
        return get_device(self.llm)

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embedding."""
        return cast(nn.Module, self.llm.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's head."""
        return cast(nn.Module, self.llm.get_output_embeddings())

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Refuse another number of tokens."""
        refuse_resize(new_num_tokens)
        return self.get_input_embeddings()

    def get_projector(self, name: str) -> Projector:
        """A modality's own projections, queries, router and tags."""
        return cast(Projector, self.projectors[name])

    def set_loss(self, name: str) -> None:
        """Choose the loss of packed forwards: a name of `losses/registry.py`, or `module:function`.

        Raises:
            UsageError: there is no such loss.
        """
        self.token_loss = get_loss(name)
        self.loss_name = name

    def set_token_loss(self, loss: TokenLoss) -> None:
        """Compute the loss that `set_loss` chose by another function."""
        self.token_loss = loss

    def set_attn_implementation(
        self, attn_implementation: str | dict[Any, Any], allow_all_kernels: bool = False
    ) -> None:
        """Refuse another attention: the LLM has been shown exact with its own alone.

        Raises:
            UsageError: always, but for the name that the LLM has already.
        """
        refuse_attention(attn_implementation, self.llm_support.attention)

    def encode(
        self, values: Mapping[str, torch.Tensor], numbers: SpanNumbers | None = None
    ) -> Encoded:
        """Turn the values of any modalities into the tokens that the LLM reads.

        Args:
            values: modality -> [n_m, *value_shape]; a modality that is not named has n_m = 0.
            numbers: modality -> number of each span within its medium; default: 0.

        Returns:
            (modality -> [n_m, Q, d] tokens, modality -> [Q, E] router weights), with every modality
            of the model in the model's order.
        """
        return compute_modality_tokens(self, values, numbers)

    def get_tags(self) -> torch.Tensor:
        """[2 * modalities, d]: start and end tag of every modality."""
        tags = [self.get_projector(name).get_tags() for name in self.config.modalities]
        return torch.cat([each.to(tags[0].device) for each in tags])

    @name_values
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        packed: PackedBatch | None = None,
        modality_order: Sequence[str] | None = None,
        media_spans: Sequence[Sequence[PlacedSpan]] | None = None,
        **values: Any,
    ) -> PackedOutput | CausalLMOutputWithPast:
        """Run a pack or a padded batch.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 for padding on either side.
            labels: [B, S], IGNORE where unsupervised.
            packed: a PackedBatch in place of all the others.
            modality_order: order of the media spans; default: image, video, audio, point, depth,
                normal, imu, fmri.
            media_spans: (modality, place) of each span of each text, for any number of media
                anywhere; `place` is how many of the text's tokens stand before it; (modality,
                place, number) of the later spans of a medium. Default: one span of each modality,
                behind BOS.
            values: `image_values=[B, 3, 224, 224]` and so on, for any of the modalities (with
                `media_spans`, a row for each span, text by text); and `num_items_in_batch`, the
                supervised tokens of the whole batch of a trainer.

        Returns:
            A PackedOutput for a pack. Else logits [B, S + 32n, V] for n spans (of the text that has
            most; the others are padded on the left) and, with labels, the mean loss over supervised
            tokens (their sum, divided by `num_items_in_batch`, where that is given).

        Raises:
            UsageError: neither `input_ids` nor `packed`, or values that do not fit the texts.
            OneLLMError: a pack that contradicts itself, or values of a wrong shape.
        """
        if packed is not None:
            return compute_packed_loss(self, packed)
        if input_ids is None:
            raise UsageError(
                "forward got neither input_ids nor packed",
                "there is nothing to run.",
                "give one of them.",
            )
        items = take_options(values)
        inputs = self.build_inputs(input_ids, attention_mask, values, modality_order, media_spans)
        update_dropout(self.llm)
        ids = inputs.get_token_ids(input_ids)
        at = {"mask": inputs.mask, "position_ids": inputs.position_ids}
        logits = run_padded(self.llm, self.llm_support, inputs.embeds, token_ids=ids, **at)
        loss = (
            None
            if labels is None
            else compute_padded_loss(logits, labels, input_ids, attention_mask, inputs, items)
        )
        # torch annotates these fields as FloatTensor, which no tensor of autograd is.
        return CausalLMOutputWithPast(loss=cast(Any, loss), logits=cast(Any, logits))

    def build_inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        values: Mapping[str, Any],
        modality_order: Sequence[str] | None = None,
        media_spans: Sequence[Sequence[PlacedSpan]] | None = None,
    ) -> PaddedInputs:
        """Insert the media spans of a padded batch, by default after each text's first token.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 for padding.
            values: `image_values` and so on -> [B, *value_shape].
            modality_order: order of the spans; default: the model's own.
            media_spans: as of `forward`.

        Raises:
            UsageError: values that do not fit the texts, an order that does not fit the values, or
                a token that the LLM has no embedding of.
        """
        return build_padded_inputs(
            self, input_ids, attention_mask, values, modality_order, media_spans
        )

    def encode_packed(self, batch: PackedBatch) -> Encoded:
        """Encode the values of a pack, see `encode`."""
        return self.encode(batch.values, list_span_numbers(batch.modalities, batch.span_numbers))

    def compute_packed_logits(
        self, batch: PackedBatch, encoded: Encoded | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Logits of a pack's supervised tokens alone.

        Args:
            batch: the pack.
            encoded: what `encode_packed` gives for it, where that is known.

        Returns:
            ([N, V] logits, [N] their places in `batch.labels`, modality -> [Q, E] router weights).

        Raises:
            OneLLMError: the pack contradicts itself.
        """
        device = batch.input_ids.device
        layout = PackedLayout.of(batch, self.config.modalities)
        layout.check(batch)
        tokens, router_weights = self.encode_packed(batch) if encoded is None else encoded
        embedding = self.llm.get_input_embeddings()
        if device.type == "cpu":  # elsewhere, looking at the ids would wait for the device
            check_tokens(batch.input_ids, count_embeddings(embedding))
        text = embedding(batch.input_ids)
        media = [t.flatten(0, 1).to(text) for t in tokens.values()]
        table = torch.cat([text, *media, self.get_tags().to(text)])
        gather = to_device_tensor(layout.gather, device)
        sequence = table.index_select(0, gather)
        supervised = (
            batch.supervised
            if batch.supervised is not None
            else (batch.labels != IGNORE).nonzero().squeeze(1)
        )
        update_dropout(self.llm, silent=self.preference is not None)
        logits = run_packed(
            self.llm,
            self.llm_support,
            sequence,
            token_ids=get_token_ids(batch.input_ids, gather),
            lengths=layout.lengths,
            position_ids=to_device_tensor(layout.position_ids, device),
            places=to_device_tensor(layout.predictor, device).index_select(0, supervised),
        )
        return logits, supervised, router_weights

    @torch.no_grad()
    # transformers' signature takes `inputs` first and knows no modalities.
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        modality_order: Sequence[str] | None = None,
        media_spans: Sequence[Sequence[PlacedSpan]] | None = None,
        decode_offset: str = "correct",
        **kwargs: Any,
    ) -> Any:
        """Continue each text after its media: [B, S] -> [B, S + new] token ids, prompt included.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S]; prompts of unequal lengths are padded on the left.
            modality_order: order of the media spans; default: the model's own.
            media_spans: as of `forward`.
            decode_offset: `correct`, or `reference`, which repeats a fault of the reference's
                cache: after the prefill the last two positions are overwritten, and all later
                positions are two too low.
            kwargs: `image_values=` and so on, and what transformers' `generate` takes. `max_length`
                and `min_length` count text alone, that of the prompt included.

        Raises:
            UsageError: values that do not fit the texts, an unknown option, or too long a prompt.
        """
        values = {key: kwargs.pop(key) for key in list(kwargs) if key.endswith(VALUES_SUFFIX)}
        own, llms, text = self.generation_config, self.llm.generation_config, input_ids.shape[1]
        config, options = choose_settings(own, llms, kwargs, text, self.device)
        update_dropout(self.llm)
        inputs = self.build_inputs(input_ids, attention_mask, values, modality_order, media_spans)
        return generate_text(
            self.llm, self.llm_support, input_ids, inputs, decode_offset, config, options
        )
