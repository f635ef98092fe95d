"""A frozen language model that reads messages: the only code that puts together what it sees, for training, scoring
and generation alike.

B rows, S slots of the message, T places, H hidden, V vocabulary.

    [BOS] [user's turn opens] [message: S slots] [prompt] [assistant's turn opens] [anchor] [answer] [EOS]

BOS comes first (it is where attention rests), the prompt stays text, and what follows the message is tokenized in one
piece, so that the answer's first token is the one that a model of text would write.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .latent_bridge import Injection, LatentBridge, ReceiverShape


IGNORED = -100
MARK = "<message>"  # where a chat template puts the user's words


@dataclass(frozen=True)
class Template:
    """What stands around message and prompt.

    Attributes:
        bos: whether a row begins with BOS; None: as the tokenizer does.
        before: opens the user's turn.
        after: ends it and opens the assistant's.
        anchor: begins the answer, `Answer:` say; no trailing space, which would change the answer's first token.
    """

    bos: bool | None = None
    before: str = ""
    after: str = ""
    anchor: str = ""

    def __post_init__(self) -> None:
        if self.anchor != self.anchor.rstrip():
            raise ValueError(
                f"`anchor` ({self.anchor!r}) ends with white space, which belongs to the answer: drop it."
            )

    @classmethod
    def of_chat(cls, tokenizer: Any, anchor: str = "") -> "Template":
        """The turns of the tokenizer's chat template.

        Raises:
            ValueError: it has none, or one that changes the user's words.
        """
        if not tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template: give `before` and `after`, or none.")
        turn = [{"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(MARK)
        if not found:
            raise ValueError(
                "The chat template does not hold the user's words as they are: give `before` and `after`."
            )
        bos = tokenizer.bos_token
        return cls(bos is not None and before.startswith(bos), before.removeprefix(bos or ""), after, anchor)


@dataclass
class ComposedBatch:
    """Rows as the language model takes them, padded on the left.

    Attributes:
        inputs_embeds: `(B, T, H)`.
        attention_mask: `(B, P + T)`, P places of keys and values before them.
        position_ids: `(B, T)`.
        labels: `(B, T)`, the answer's tokens and EOS where they stand, -100 elsewhere; None without answers.
        past_key_values: the P places, or None. It grows when it is used: compose anew for every use.
        input_ids: `(B, T)` of plain text, which the model then reads in place of embeddings.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor | None
    past_key_values: DynamicCache | None
    input_ids: torch.Tensor | None = None

    def for_generate(self) -> dict[str, Any]:
        """What transformers' `generate` is given. It takes embeddings for all of the text, and cuts off as many as the
        cache holds: these stand there, and are never read."""
        if self.input_ids is not None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        inputs: dict[str, Any] = {"inputs_embeds": self.inputs_embeds, "attention_mask": self.attention_mask}
        if self.past_key_values is not None:
            held = self.attention_mask.shape[1] - self.inputs_embeds.shape[1]
            inputs["inputs_embeds"] = nn.functional.pad(self.inputs_embeds, (0, 0, held, 0))
            inputs["past_key_values"] = self.past_key_values
        return inputs


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of any causal LM of transformers.

    Raises:
        ValueError: none that are as many as its config says.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} layers that adapters could stand behind.")


class Receiver:
    """A language model, frozen, with its tokenizer. No module: it is no part of what is trained or saved.

    Args:
        model: any causal LM of transformers; frozen and put in eval mode.
        tokenizer: its own, a fast one.
        template: what stands around message and prompt.

    Raises:
        ValueError: a tokenizer that cannot say where its tokens stand, or has no EOS.
    """

    def __init__(self, model: Any, tokenizer: Any, template: Template | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("A receiver's tokenizer must be a fast one: the answer's place is found by its offsets.")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The receiver's tokenizer has no EOS token, which every answer ends with: set `eos_token`."
            )
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.template = template or Template()
        self.shape = ReceiverShape.of(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def embed(self, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """`(n,)` ids -> `(n, H)`, as the model's own first step."""
        return self.model.get_input_embeddings()(torch.as_tensor(ids, dtype=torch.long, device=self.device))

    def text_injection(self, contexts: Sequence[str], max_tokens: int | None = None) -> Injection:
        """The contexts themselves as a message, or their first tokens: what latents are measured against."""
        ids = [self._ids(context)[:max_tokens] for context in contexts]
        length = max(1, max(map(len, ids)))
        embeds = self.embed([0]).new_zeros(len(ids), length, self.shape.hidden_size)
        mask = torch.zeros(len(ids), length, dtype=torch.bool, device=self.device)
        for row, of_row in enumerate(ids):
            embeds[row, : len(of_row)] = self.embed(of_row)
            mask[row, : len(of_row)] = True
        return Injection(embeds=embeds, mask=mask)

    # -- rows

    def compose(
        self, injection: Injection | None, prompts: Sequence[str], answers: Sequence[str] | None = None
    ) -> ComposedBatch:
        """Rows of a message, a prompt and, for training and scoring, an answer.

        Raises:
            ValueError: not as many prompts or answers as messages, a row with nothing in it or before its answer, an
                empty answer.
        """
        injection = injection or Injection()
        self._check(injection, prompts, answers)
        rows, labels = [], []
        before = self._before()
        for row, prompt in enumerate(prompts):
            after, answer = self._after(prompt, None if answers is None else answers[row])
            parts = [self.embed(before)]
            if injection.embeds is not None:
                slots = injection.embeds[row]
                parts.append(
                    (slots if injection.mask is None else slots[injection.mask[row].bool()]).to(parts[0].dtype)
                )
            parts.append(self.embed(after + answer))
            rows.append(torch.cat(parts))
            labels.append([IGNORED] * (len(rows[-1]) - len(answer)) + answer)
            if not len(rows[-1]) and injection.keys_values is None:
                raise ValueError(f"Row {row} holds nothing: give a message, a prompt or an anchor.")
            self._check_begun(row, len(rows[-1]), answer)
        length = max(1, max(map(len, rows)))
        inputs_embeds = torch.stack([nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        present = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        mask, cache = present, None
        if injection.keys_values is not None:
            pairs = [tuple(x.to(inputs_embeds.dtype) for x in pair) for pair in injection.keys_values]
            cache = DynamicCache(ddp_cache_data=pairs, config=self.model.config.get_text_config())
            assert injection.key_value_mask is not None
            mask = torch.cat([injection.key_value_mask.to(present), present], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        padded = [[IGNORED] * (length - len(row)) + row for row in labels]
        targets = None if answers is None else torch.tensor(padded, device=self.device)
        return ComposedBatch(inputs_embeds, mask, positions, targets, cache)

    def compose_text(
        self,
        contexts: Sequence[str],
        prompts: Sequence[str],
        answers: Sequence[str] | None = None,
        max_tokens: Sequence[int] | None = None,
    ) -> ComposedBatch:
        """The rows of [`compose`] with contexts as text, or their first `max_tokens` tokens, in the messages' place:
        token ids, as the model is run by everybody else.

        Raises:
            ValueError: as there, or a row that is longer than the model reads.
        """
        if not len(contexts) == len(prompts) == len(prompts if max_tokens is None else max_tokens):
            raise ValueError(f"{len(contexts)} contexts and {len(prompts)} prompts: give one of each per row.")
        self._check(Injection(), prompts, answers)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        rows, labels = [], []
        before = self._before()
        for row, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
            after, answer = self._after(prompt, None if answers is None else answers[row])
            kept = self._ids(context)[: None if max_tokens is None else max_tokens[row]]
            rows.append([*before, *kept, *after, *answer])
            labels.append([IGNORED] * (len(rows[-1]) - len(answer)) + answer)
            if not rows[-1]:
                raise ValueError(f"Row {row} holds nothing: give a context, a prompt or an anchor.")
            self._check_begun(row, len(rows[-1]), answer)
            if limit is not None and len(rows[-1]) > limit:
                raise ValueError(
                    f"A row of text has {len(rows[-1])} tokens, the receiver reads {limit}: give shorter contexts."
                )
        length = max(map(len, rows))
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        padded = [[IGNORED] * (length - len(row)) + row for row in labels]
        targets = None if answers is None else torch.tensor(padded, device=self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return ComposedBatch(self.embed(ids), mask, positions, targets, None, ids)

    def _check(self, injection: Injection, prompts: Sequence[str], answers: Sequence[str] | None) -> None:
        given = (injection.embeds, injection.latents, injection.keys_values and injection.keys_values[0][0])
        sizes = {len(x) for x in given if x is not None}
        if sizes - {len(prompts)} or (answers is not None and len(answers) != len(prompts)):
            raise ValueError(
                f"{sorted(sizes)} messages, {len(prompts)} prompts and "
                f"{len(prompts) if answers is None else len(answers)} answers: give one of each per row."
            )
        empty = [row for row, answer in enumerate(answers or ()) if not answer.strip()]
        if empty:
            raise ValueError(f"The answers of rows {empty} are empty: there is nothing to learn or to score.")

    def _check_begun(self, row: int, length: int, answer: Sequence[int]) -> None:
        # keys and values alone say no token: some token must stand there for its output to be the answer's first
        if answer and length == len(answer):
            raise ValueError(
                f"Row {row} has no token before its answer, whose first one nothing would say: give a template "
                "with BOS (--bos yes), an anchor (--anchor_text) or a prompt."
            )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _before(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        begins = self.template.bos
        if begins is None:
            begins = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        if begins and bos is None:
            raise ValueError("The template begins with BOS, and the tokenizer has none: set `bos` to False.")
        return [bos] * begins + self._ids(self.template.before)

    def _after(self, prompt: str, answer: str | None) -> tuple[list[int], list[int]]:
        """Ids of what follows the message, and of the answer with its EOS; tokenized in one piece."""
        start = prompt + self.template.after + self.template.anchor
        if answer is None:
            return self._ids(start), []
        # one space parts what was said from the answer; it belongs to the answer's first token
        gap = " " if start and not start[-1].isspace() and not answer[0].isspace() else ""
        encoded = self.tokenizer(start + gap + answer, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        # a token that holds anything of the answer is the answer's
        first = next((place for place, (_, end) in enumerate(offsets) if end > len(start)), len(ids))
        return ids[:first], [*ids[first:], self.tokenizer.eos_token_id]

    # -- the model

    @contextmanager
    def adapted(self, injection: Injection | None, bridge: LatentBridge | None) -> Iterator[None]:
        """Within, the layers that the bridge adapts look at the latents, at every step of a generation."""
        if injection is None or injection.latents is None or bridge is None:
            yield
            return
        latents, mask = injection.latents, injection.latent_mask
        layers, handles = decoder_layers(self.model), []

        def hook(adapter: nn.Module) -> Any:
            def change(module: nn.Module, args: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (adapter(output[0], latents, mask), *output[1:])
                return adapter(output, latents, mask)

            return change

        try:
            for number, adapter in bridge.adapters.items():
                handles.append(layers[int(number)].register_forward_hook(hook(adapter)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(
        self, injection: Injection | None, batch: ComposedBatch, bridge: LatentBridge | None = None
    ) -> torch.Tensor:
        """`(B, T, V)`; gradients pass through to the injection, none to the model."""
        with self.adapted(injection, bridge):
            return self._run(batch)

    def _run(self, batch: ComposedBatch, logits_to_keep: int = 0) -> torch.Tensor:
        options: dict[str, Any] = {"logits_to_keep": logits_to_keep} if logits_to_keep and self._keeps_logits else {}
        options |= (
            {"inputs_embeds": batch.inputs_embeds} if batch.input_ids is None else {"input_ids": batch.input_ids}
        )
        return self.model(
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=batch.past_key_values,
            use_cache=batch.past_key_values is not None,
            **options,
        ).logits

    def answer_logits(
        self, injection: Injection | None, batch: ComposedBatch, bridge: LatentBridge | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(B, A, V)` of the answers' tokens, and these `(B, A)`, -100 behind them."""
        assert batch.labels is not None
        count = int((batch.labels != IGNORED).sum(1).max())
        with self.adapted(injection, bridge):  # rows end with their answers
            logits = self._run(batch, logits_to_keep=count + 1)[:, -count - 1 : -1]
        targets = batch.labels[:, -count:]
        # from the end to the beginning of the row
        order = (targets == IGNORED).sort(dim=1, stable=True).indices
        return logits.gather(1, order[..., None].expand_as(logits)), targets.gather(1, order)

    @torch.no_grad()
    def score(
        self,
        injection: Injection | None,
        prompts: Sequence[str],
        answers: Sequence[str],
        bridge: LatentBridge | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each answer with its EOS, in nats, `(B,)`, and its tokens `(B,)`."""
        batch = self.compose(injection, prompts, answers)
        logits, targets = self.answer_logits(injection, batch, bridge)
        return -answer_nll(logits, targets).sum(1), (targets != IGNORED).sum(1)

    @torch.no_grad()
    def generate(
        self,
        injection: Injection | None,
        prompts: Sequence[str],
        bridge: LatentBridge | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers, without special tokens; `options` as for `model.generate`."""
        return self.write(injection, self.compose(injection, prompts), bridge, **options)

    @torch.no_grad()
    def write(
        self, injection: Injection | None, batch: ComposedBatch, bridge: LatentBridge | None = None, **options: Any
    ) -> list[str]:
        """[`generate`] behind rows that are composed."""
        pad = self.tokenizer.pad_token_id
        options = {"eos_token_id": self.tokenizer.eos_token_id, **options}
        options.setdefault("pad_token_id", self.tokenizer.eos_token_id if pad is None else pad)
        with self.adapted(injection, bridge):
            ids = self.model.generate(**batch.for_generate(), **options)
        if batch.input_ids is not None:
            ids = ids[:, batch.input_ids.shape[1] :]  # of ids, transformers gives back the text before too
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def answer_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-probability of every token of the answers, in nats, `(B, A)`: of `answer_logits (B, A, V)` and
    `answer_ids (B, A)`; 0 behind the answers."""
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
