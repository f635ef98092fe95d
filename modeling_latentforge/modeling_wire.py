"""The wire: a text becomes M latents once, and any frozen language model reads them.

B messages, T tokens, M latents, D latent size.

    texts -> LatentEncoder (B, M, D) -> refiner -> quantizer -> latents (B, M, D), or a Packet of bytes
    latents -> LatentBridge of a receiver -> Injection -> Receiver: [BOS] message, prompt -> answer

Receivers are attached and never saved: transformers cannot load one model inside another's constructor, and nobody
wants a second copy of a large model. Weights on disk are those of encoder, quantizer and bridges.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_wire import NUM_BYTES, LatentForgeWireConfig
from .latent_bridge import Injection, LatentBridge, ReceiverShape
from .latent_encoder import LatentEncoder, LatentPoolingBlock
from .latent_packet import Packet
from .latent_quantizer import LatentQuantizer
from .latent_receiver import Receiver, Template
from .modeling_autoencoder import CompleteCheckpointMixin


@dataclass
class LatentForgeWireOutput(ModelOutput):
    """`last_hidden_state`: latents `(B, M, D)` as a receiver gets them; `latent_mask (B, M)`: which are there. With a
    receiver and answers: `answer_logits (B, A, V)`, what it says about each of the answers' A tokens, and `answer_ids
    (B, A)`, these, EOS included, -100 behind them; `slots (B, S, H)` and `slot_mask (B, S)`, what its bridge put in
    the place of token embeddings, None of a bridge that puts nothing there."""

    last_hidden_state: torch.FloatTensor | None = None
    latent_mask: torch.Tensor | None = None
    answer_logits: torch.FloatTensor | None = None
    answer_ids: torch.LongTensor | None = None
    slots: torch.FloatTensor | None = None
    slot_mask: torch.Tensor | None = None


class LatentForgeWire(CompleteCheckpointMixin, PreTrainedModel):
    """See the drawing at the top of the file.

    wire = LatentForgeWire(LatentForgeWireConfig())
    wire.attach_tokenizer(tokenizer)
    wire.add_receiver("qwen", Receiver(model, its_tokenizer))
    wire.generate("qwen", wire.encode(["a long text"]), ["Who is it about?"])
    """

    config_class = LatentForgeWireConfig
    main_input_name = "input_ids"
    base_model_prefix = "wire"
    _no_split_modules = ["LatentPoolingBlock", "LatentBridge"]

    def __init__(self, config: LatentForgeWireConfig):
        super().__init__(config)
        self.encoder = LatentEncoder(
            config.encoder_config,
            config.pooling,
            config.num_latents,
            config.ratio,
            config.latent_size,
            config.num_pooling_layers,
            config.rms_norm_eps,
        )
        heads = next(n for n in range(max(1, config.latent_size // 64), 0, -1) if not config.latent_size % n)
        self.refiner = nn.ModuleList(
            LatentPoolingBlock(config.latent_size, heads, config.rms_norm_eps)
            for _ in range(config.num_refiner_layers)
        )
        self.quantizer = LatentQuantizer(
            config.quantizer, config.latent_size, config.quantizer_levels if config.quantizer == "fsq" else ()
        )
        self.bridges = nn.ModuleDict({name: self._build_bridge(fields) for name, fields in config.bridges.items()})
        self.receivers: dict[str, Receiver] = {}  # attached; no modules, so neither trained nor saved
        self.tokenizer: Any = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LatentEncoder) and module.pooling == "queries":
            init.normal_(module.queries, 0.0, 1.0)
        if isinstance(module, LatentBridge):
            if module.static is not None:
                init.normal_(module.static, 0.0, module.shape.embed_rms)
            if module.mode == "kv":
                init.zeros_(module.place)
            if module.mode == "soft" and module.is_calibrated:
                init.constant_(module.log_size, module.log_start)

    # -- receivers

    def _build_bridge(self, fields: dict[str, Any]) -> LatentBridge:
        fields = dict(fields)
        fields.pop("template", None)
        shape = ReceiverShape(**{name: fields.pop(name) for name in ReceiverShape.__dataclass_fields__})
        if fields.get("adapter_layers") is not None:
            fields["adapter_layers"] = tuple(fields["adapter_layers"])
        return LatentBridge(
            shape, self.config.latent_size, max_slots=self.config.num_latents, eps=self.config.rms_norm_eps, **fields
        )

    def add_receiver(self, name: str, receiver: Receiver, **bridge: Any) -> None:
        """Build a new bridge to a language model, and attach it.

        Args:
            name: under which it is asked.
            receiver: a frozen language model. Its template is kept in the config: the bridge learns for this one.
            bridge: `mode` and sizes, see [`LatentBridge`].

        Raises:
            ValueError: a name that is taken or that holds a dot, a bridge that does not fit.
        """
        if name in self.bridges or "." in name or not name:
            raise ValueError(
                f"A receiver's name must be new and hold no dot, got {name!r}; there are {list(self.bridges)}."
            )
        fields = {**asdict(receiver.shape), **bridge}
        built = self._build_bridge(fields)
        self._initialize(built)
        self.bridges[name] = built.to(self.device, self.dtype)
        kept = {**fields, "template": asdict(receiver.template)}
        self.config.bridges[name] = {key: list(x) if isinstance(x, tuple) else x for key, x in kept.items()}
        self.receivers[name] = receiver

    def _initialize(self, module: nn.Module) -> None:
        for part in module.modules():
            self._init_weights(part)

    def attach(self, name: str, receiver: Receiver) -> None:
        """Put the language model back behind a bridge that was loaded.

        Raises:
            ValueError: no such bridge, or one that was built for a model of another shape or for another template.
        """
        template = self.template(name)
        known, found = asdict(self._bridge(name).shape), asdict(receiver.shape)
        differing = {key: (known[key], found[key]) for key in known if key != "embed_rms" and known[key] != found[key]}
        if differing:
            raise ValueError(f"The bridge {name!r} was built for another model: {differing} (bridge's, model's).")
        if receiver.template != template:
            raise ValueError(
                f"The bridge {name!r} was built for {template}, the receiver has {receiver.template}: give it "
                f"`wire.template({name!r})`."
            )
        self.receivers[name] = receiver

    def template(self, name: str) -> Template:
        """What the bridge of this receiver was built for.

        Raises:
            ValueError: no such bridge.
        """
        if name not in self.bridges:
            raise ValueError(
                f"There is no bridge {name!r}: there are {list(self.bridges)}. `add_receiver` builds one."
            )
        return Template(**self.config.bridges[name].get("template", {}))

    def _bridge(self, name: str) -> Any:
        return self.bridges[name]

    def receiver(self, name: str) -> Receiver:
        """Raises ValueError: none of this name is attached."""
        if name not in self.receivers:
            raise ValueError(
                f"No receiver {name!r} is attached: there are {list(self.receivers)}. Call `attach` first."
            )
        return self.receivers[name]

    def attach_tokenizer(self, tokenizer: Any) -> None:
        """The encoder's own; its ids are the encoder's.

        Raises:
            ValueError: more ids than the encoder knows.
        """
        if len(tokenizer) > self.config.encoder_config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} ids, the encoder knows "
                f"{self.config.encoder_config.vocab_size}: it is another model's."
            )
        self.tokenizer = tokenizer

    # -- text -> latents

    def ids_of(
        self, texts: Sequence[str], device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, T)` ids, padded on the right, and their mask; on the model's device unless another is given.

        Raises:
            ValueError: an empty text, no tokenizer where the source is tokens, a text that is too long.
        """
        if self.config.source == "bytes":
            ids = [list(text.encode()) for text in texts]
            pad = NUM_BYTES
        elif self.tokenizer is None:
            raise ValueError("The encoder reads tokens: give it its tokenizer with `attach_tokenizer`.")
        else:
            ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            pad = self.tokenizer.pad_token_id or 0
        empty = [row for row, of_row in enumerate(ids) if not of_row]
        if empty or not ids:
            raise ValueError(f"The texts of rows {empty} are empty: a message needs at least one token.")
        length = max(map(len, ids))
        limit = getattr(self.config.encoder_config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"A text has {length} tokens, the encoder reads {limit}: cut it, or send several messages."
            )
        device = self.device if device is None else device
        mask = torch.tensor([[1] * len(of_row) + [0] * (length - len(of_row)) for of_row in ids], device=device)
        padded = torch.tensor([of_row + [pad] * (length - len(of_row)) for of_row in ids], device=device)
        return padded, mask

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_latents: int | None = None,
        quantized: bool = True,
        receiver: str | None = None,
        prompts: Sequence[str] | None = None,
        answers: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> LatentForgeWireOutput:
        """Latents of texts, as a receiver gets them; see [`LatentEncoder.forward`].

        Args:
            quantized: False: as they are before the quantizer.
            receiver, prompts, answers: also ask this receiver about the answers, one prompt and one answer a text.
            texts: it reads these themselves in the place of the latents; `input_ids` may then be left out.

        Raises:
            ValueError: one of `receiver`, `prompts` and `answers` without the others, nothing to read; see also
                [`Receiver.compose`].
        """
        if len({receiver is None, prompts is None, answers is None}) > 1:
            raise ValueError(
                "`receiver`, `prompts` and `answers` go together: give all three, or none for the latents."
            )
        if input_ids is None and (texts is None or receiver is None):
            raise ValueError("There is nothing to read: give `input_ids`, or `texts` and the `receiver` of them.")
        output = LatentForgeWireOutput()
        if input_ids is not None:
            output = self._encode(input_ids, attention_mask, num_latents, quantized, **kwargs)
        if receiver is not None:
            assert prompts is not None and answers is not None
            if input_ids is not None:
                injection = self.inject(receiver, output)
                output.slots, output.slot_mask = injection.embeds, injection.mask
            if texts is not None:
                injection = self.receiver(receiver).text_injection(texts)
            output.answer_logits, output.answer_ids = self.ask(receiver, injection, prompts, answers)
        return output

    def _encode(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        num_latents: int | None,
        quantized: bool,
        **kwargs: Any,
    ) -> LatentForgeWireOutput:
        latents, mask = self.encoder(input_ids, attention_mask, num_latents)
        for layer in self.refiner:
            latents = layer(latents, latents, mask[:, None])
        if quantized:
            latents = self.quantizer(latents)
        return LatentForgeWireOutput(latents * mask[..., None], mask)

    def encode(self, texts: Sequence[str], num_latents: int | None = None) -> LatentForgeWireOutput:
        """[`forward`] of texts."""
        return self(*self.ids_of(texts), num_latents=num_latents)

    @torch.no_grad()
    def pack(self, texts: Sequence[str], num_latents: int | None = None) -> list[Packet]:
        """A message as bytes, one a text."""
        output = self(*self.ids_of(texts), num_latents=num_latents, quantized=False)
        return [
            self.quantizer.pack(latents[mask].float())
            for latents, mask in zip(output.last_hidden_state, output.latent_mask, strict=True)
        ]

    @torch.no_grad()
    def unpack(self, packets: Sequence[Packet | bytes]) -> LatentForgeWireOutput:
        """The latents of messages, as [`encode`] gave them.

        Raises:
            ValueError: bytes that are no packet of this model's quantizer.
        """
        opened = [x if isinstance(x, Packet) else Packet.from_bytes(x) for x in packets]
        rows = [self.quantizer.unpack(packet).to(self.device, self.dtype) for packet in opened]
        count = max(map(len, rows))
        latents = torch.stack([nn.functional.pad(row, (0, 0, 0, count - len(row))) for row in rows])
        sizes = torch.tensor([len(row) for row in rows], device=self.device)
        return LatentForgeWireOutput(latents, torch.arange(count, device=self.device) < sizes[:, None])

    # -- latents -> text

    def inject(self, name: str, message: LatentForgeWireOutput) -> Injection:
        """What the receiver's model is given in the place of the text."""
        return self.bridges[name](message.last_hidden_state, message.latent_mask)

    def ask(
        self, name: str, message: LatentForgeWireOutput | Injection, prompts: Sequence[str], answers: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a receiver says about each token of the answers, EOS included: logits `(B, A, V)`, and these tokens
        `(B, A)`, -100 behind them."""
        receiver = self.receiver(name)
        injection = message if isinstance(message, Injection) else self.inject(name, message)
        batch = receiver.compose(injection, prompts, answers)
        return receiver.answer_logits(injection, batch, self._bridge(name))

    def score(
        self, name: str, message: LatentForgeWireOutput, prompts: Sequence[str], answers: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each answer, in nats, and its tokens."""
        with torch.no_grad():
            injection = self.inject(name, message)
        return self.receiver(name).score(injection, prompts, answers, self.bridges[name])

    def generate(self, name: str, message: LatentForgeWireOutput, prompts: Sequence[str], **options: Any) -> list[str]:
        """Answers of one receiver; `options` as for `generate` of transformers."""
        with torch.no_grad():
            injection = self.inject(name, message)
        return self.receiver(name).generate(injection, prompts, self.bridges[name], **options)

    @torch.no_grad()
    def prompt_embeds(self, name: str, message: LatentForgeWireOutput, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Rows `(T, H)` of a soft bridge, unpadded: what a server takes as `prompt_embeds`.

        Raises:
            ValueError: a bridge that needs more than embeddings.
        """
        if self.bridges[name].mode != "soft":
            raise ValueError(
                f"The bridge {name!r} is of mode {self.bridges[name].mode}, embeddings carry `soft` only."
            )
        batch = self.receiver(name).compose(self.inject(name, message), prompts)
        return [row[mask.bool()] for row, mask in zip(batch.inputs_embeds, batch.attention_mask, strict=True)]


__all__ = ["LatentForgeWire", "LatentForgeWireOutput", "Receiver", "Template"]
