"""Ways to answer the same examples: by the text, by its latents, and by less than either.

B examples, M latents, A tokens of the longest answer.

    method        what stands for the context                           it shows
    text          its tokens                                            what the receiver can do
    latent        its latents                                           what the wire does
    token_budget  its first tokens, as many as the latents              what as many tokens do without a wire
    closed_book   nothing                                               what the receiver knows itself
    shuffled      latents of another example                            what a bridge has learned by heart
    zero          latents of zeros                                      the same, of the slots alone
    replay        its tokens' embeddings as slots                       that slots are read as text: it equals text
    raw           the same without the template's words                 what the template is worth
    anchor        the same with an anchor, where there is none          what an anchor is worth
    adapter       its tokens' embeddings through the bridge             what the bridge does to plain text
    llmlingua2    tokens that LLMLingua-2 keeps, as many as latents     what a deployed compressor does
    joint         latents; every receiver proposes, all judge           what several readers agree on
    linear_probe  latents, or the receiver's states of the text         what a regression reads in either

Whoever writes an answer is given contexts and prompts, never the gold answers nor their lengths. A receiver's LoRA
was learned for latents: where there are none, the frozen model answers.
"""

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LogitsProcessorList

from modeling_latentforge import LatentForgeWire, Receiver
from modeling_latentforge.generation_wire import FirstTokenProcessor
from modeling_latentforge.latent_bridge import Injection
from modeling_latentforge.latent_quantizer import LatentQuantizer
from modeling_latentforge.latent_receiver import ComposedBatch, answer_nll

from ..tasks import Example
from ..wire_lora import without_adapter
from .answers import exact_match, f1, gsm8k_match, label_accuracy, normalize_answer, rouge_l, token_f1


METHODS = (
    "text",
    "latent",
    "token_budget",
    "closed_book",
    "shuffled",
    "zero",
    "replay",
    "raw",
    "anchor",
    "adapter",
    "llmlingua2",
    "joint",
    "linear_probe",
)
# what these do depends on the number of latents
OF_LATENTS = ("latent", "token_budget", "shuffled", "zero", "llmlingua2", "joint", "linear_probe")
ANCHOR = "\nAnswer:"
CODECS = ("none", "fp16", "int8", "int4")
IGNORED = -100
FOLDS = 5


@dataclass(frozen=True)
class Decoding:
    """How answers are written: greedily, but for what is said of the first tokens.

    Attributes:
        max_new_tokens: of every answer alike.
        first_token_top_p, first_token_temperature: of the draw of the first token; both None: no draw.
        eos_ban_steps: so many first tokens do not end the answer.
        seed: of the draw.

    Raises:
        ValueError: a number of tokens that cannot be, settings that [`FirstTokenProcessor`] does not take.
    """

    max_new_tokens: int = 24
    first_token_top_p: float | None = None
    first_token_temperature: float | None = None
    eos_ban_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.eos_ban_steps < self.max_new_tokens:
            raise ValueError(
                f"eos_ban_steps must lie in 0 to max_new_tokens - 1 ({self.max_new_tokens - 1}), got "
                f"{self.eos_ban_steps}"
            )
        self.processors([])

    @property
    def draws(self) -> bool:
        return self.first_token_top_p is not None or self.first_token_temperature is not None

    def processors(self, ids: Sequence[str], start: int = 0) -> list[Any]:
        """Of a batch of these examples, behind so many ids."""
        if not self.draws:
            return []
        seeds = [int(hashlib.sha256(f"{self.seed}/{name}".encode()).hexdigest()[:12], 16) for name in ids]
        top_p = 1.0 if self.first_token_top_p is None else self.first_token_top_p
        temperature = 1.0 if self.first_token_temperature is None else self.first_token_temperature
        return [FirstTokenProcessor(top_p, temperature, seeds, start)]

    def options(self, ids: Sequence[str], start: int = 0) -> dict[str, Any]:
        """For `generate` of transformers."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.eos_ban_steps:
            options["min_new_tokens"] = self.eos_ban_steps
        if processors := self.processors(ids, start):
            options["logits_processor"] = LogitsProcessorList(processors)
        return options


class Refused(ValueError):
    """This method says nothing of this receiver or data set; the message tells why."""


# -- what stands for the contexts


@dataclass
class Reading:
    """What a receiver is given in the place of the contexts.

    Attributes:
        receiver: with the template of this method.
        tokens: places a context takes, one number an example.
        sent: bytes of the text that is sent, or None where it is a message: see [`message_sizes`].
        injection, bridge: of a message.
        contexts, max_tokens: of text, and how much of it.
    """

    receiver: Receiver
    tokens: list[int]
    sent: list[int] | None = None
    injection: Injection | None = None
    bridge: Any = None
    contexts: list[str] | None = None
    max_tokens: list[int] | None = None

    def compose(self, prompts: Sequence[str], answers: Sequence[str] | None = None) -> ComposedBatch:
        if self.contexts is not None:
            return self.receiver.compose_text(self.contexts, prompts, answers, self.max_tokens)
        try:
            return self.receiver.compose(self.injection, prompts, answers)
        except ValueError as error:
            if self.injection is not None:
                raise
            raise Refused(
                f"without a context a row holds nothing ({error}): train the wire with `--bos yes`, where the "
                "tokenizer has a BOS token, or with an anchor"
            ) from error

    def reader(self) -> AbstractContextManager[None]:
        """Within, the receiver is the one that reads this."""
        return without_adapter(self.receiver) if self.bridge is None else nullcontext()


def token_ids(receiver: Receiver, text: str) -> list[int]:
    return receiver.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def other_contexts(examples: Sequence[Example], seed: int) -> list[str]:
    """For each example the context of one that has another, no context more often than its own.

    Raises:
        Refused: more than half of the examples share a context.
    """
    groups: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        groups.setdefault(example.context, []).append(place)
    largest = max(map(len, groups.values()))
    if 2 * largest > len(examples):
        raise Refused(f"{largest} of {len(examples)} examples share a context: there is none to shuffle it with")

    def rank(context: str) -> str:
        return hashlib.sha256(f"{seed}/{context}".encode()).hexdigest()

    # side by side what is equal: moved on by the largest group, nothing meets its own
    order = [place for context in sorted(groups, key=rank) for place in groups[context]]
    found = [""] * len(examples)
    for place, other in zip(order, order[largest:] + order[:largest], strict=True):
        found[place] = examples[other].context
    return found


@torch.no_grad()
def read(
    wire: LatentForgeWire,
    name: str,
    method: str,
    contexts: Sequence[str],
    num_latents: int | None = None,
    compress: Callable[[str, int], str] | None = None,
) -> Reading:
    """What stands for the contexts by one of the methods that ask one receiver.

    Args:
        name: of the receiver.
        contexts: of the examples; for `shuffled` [`other_contexts`].
        num_latents: M; None: as many as the wire makes of its own.
        compress: of `llmlingua2`: text and number of tokens -> text.

    Raises:
        Refused: the method says nothing here.
        ValueError: a text that is too long for encoder or receiver, an unknown method.
    """
    receiver, bridge, contexts = wire.receiver(name), wire.bridges[name], list(contexts)
    if method == "text":
        ids = [token_ids(receiver, context) for context in contexts]
        return Reading(receiver, [len(x) for x in ids], [len(x.encode()) for x in contexts], contexts=contexts)
    if method == "closed_book":
        return Reading(receiver, [0] * len(contexts), [0] * len(contexts))
    if method in ("replay", "raw", "anchor", "adapter"):
        return _of_embeddings(receiver, bridge, method, contexts)
    if method not in OF_LATENTS or method in ("joint", "linear_probe"):
        raise ValueError(f"{method!r} is none of the methods that ask one receiver: {', '.join(METHODS[:-2])}")
    message: Any = wire.encode(contexts, num_latents)
    counts = message.latent_mask.sum(1).tolist()
    if method == "token_budget":
        kept = [token_ids(receiver, context)[:count] for context, count in zip(contexts, counts, strict=True)]
        sent = [len(receiver.tokenizer.decode(ids).encode()) for ids in kept]
        return Reading(receiver, [len(ids) for ids in kept], sent, contexts=contexts, max_tokens=counts)
    if method == "llmlingua2":
        assert compress is not None
        short = [compress(context, count) for context, count in zip(contexts, counts, strict=True)]
        return replace(read(wire, name, "text", short), receiver=receiver)
    if method == "zero":
        message.last_hidden_state = torch.zeros_like(message.last_hidden_state)
    injection = wire.inject(name, message)
    places = torch.zeros_like(message.latent_mask[:, 0], dtype=torch.long)
    for mask in (injection.mask, injection.key_value_mask, injection.latent_mask):
        if mask is not None:
            places = places + mask.sum(1)
    return Reading(receiver, places.tolist(), injection=injection, bridge=bridge)


def _of_embeddings(receiver: Receiver, bridge: Any, method: str, contexts: list[str]) -> Reading:
    template = receiver.template
    own = f"the receiver's template has {'an' if template.anchor else 'no'} anchor"
    if method == "raw":
        if not (template.before or template.after or template.anchor):
            raise Refused("the receiver's template has no words: raw is replay")
        receiver = _with_template(receiver, before="", after="", anchor="")
    if method == "anchor":
        if template.anchor:
            raise Refused(f"{own}: anchor is replay")
        receiver = _with_template(receiver, anchor=ANCHOR)
    injection = receiver.text_injection(contexts)
    assert injection.mask is not None and injection.embeds is not None
    tokens = injection.mask.sum(1).tolist()
    if method == "adapter":
        size = bridge.shape.hidden_size
        latent_size = bridge.norm.weight.numel() if bridge.mode != "cross" else None
        if bridge.mode != "soft" or latent_size != size:
            raise Refused(
                f"the bridge is of mode {bridge.mode} and reads {latent_size or 'other'} numbers, the receiver's "
                f"embeddings have {size}: they do not go through it"
            )
        return Reading(
            receiver, tokens, injection=bridge(injection.embeds.to(bridge.out.weight.dtype), injection.mask)
        )
    return Reading(receiver, tokens, [len(context.encode()) for context in contexts], injection=injection)


def _with_template(receiver: Receiver, **fields: Any) -> Receiver:
    return Receiver(receiver.model, receiver.tokenizer, replace(receiver.template, **fields))


def llmlingua2(model: str, device: str) -> Callable[[str, int], str]:
    """LLMLingua-2 (arXiv 2403.12968): text and number of tokens, by its own count, -> text.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from llmlingua import PromptCompressor  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("the method llmlingua2 needs the package: pip install llmlingua, or drop it") from error
    compressor = PromptCompressor(model_name=model, use_llmlingua2=True, device_map=device)
    return lambda text, count: compressor.compress_prompt(text, target_token=count)["compressed_prompt"]


# -- what the receiver makes of it


@torch.no_grad()
def score_answers(
    reading: Reading, prompts: Sequence[str], answers: Sequence[str], num_tokens: int | None = None
) -> list[dict[str, float]]:
    """What the receiver says about the gold answers, one entry an example.

    Args:
        num_tokens: only the first so many tokens count; None: all.

    Returns:
        `nll`, nats per token of the answer, its end (EOS) left out: a bridge learns to end, the receiver of a plain
        text was never asked to. `first_token_top1`, `first_token_top5`: whether the first token is among the
        likeliest. `answer_tokens`, that count.
    """
    batch = reading.compose(prompts, answers)
    with reading.reader():
        logits, targets = reading.receiver.answer_logits(reading.injection, batch, reading.bridge)
    lengths = (targets != IGNORED).sum(1) - 1
    if num_tokens is not None:
        lengths = lengths.clamp(max=num_tokens)
    counts = torch.arange(targets.shape[1], device=targets.device) < lengths[:, None]
    nats = (answer_nll(logits, targets) * counts).sum(1).double() / lengths
    first = logits[:, 0].float()
    rank = (first > first.gather(1, targets[:, :1])).sum(1)
    return [
        {
            "nll": float(nats[row]),
            "first_token_top1": float(rank[row] < 1),
            "first_token_top5": float(rank[row] < 5),
            "answer_tokens": int(lengths[row]),
        }
        for row in range(len(prompts))
    ]


def write_answers(reading: Reading, prompts: Sequence[str], ids: Sequence[str], decoding: Decoding) -> list[str]:
    """What the receiver answers; `ids` of the examples seed a draw."""
    batch = reading.compose(prompts)
    options = decoding.options(ids, 0 if batch.input_ids is None else batch.input_ids.shape[1])
    with reading.reader():
        return reading.receiver.write(reading.injection, batch, reading.bridge, **options)


def task_metrics(metric: str, example: Example) -> tuple[str, ...]:
    """What is measured of an answer, the main one first."""
    if example.labels:
        return ("accuracy",)
    return ("f1", "em") if metric == "f1" else (metric,)


def answer_quality(metric: str, example: Example, prediction: str, tokenizer: Any) -> dict[str, float]:
    """The [`task_metrics`] of an answer.

    Args:
        metric: of the task.
        tokenizer: counts the tokens of `token_f1`.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text.strip(), add_special_tokens=False)["input_ids"]

    scorers: dict[str, Callable[[], float]] = {
        "em": lambda: exact_match(prediction, example.answers),
        "f1": lambda: f1(prediction, example.answers),
        "accuracy": lambda: label_accuracy(prediction, example.answers[0], example.labels or ()),
        "gsm8k": lambda: gsm8k_match(prediction, example.answers[0]),
        "rouge_l": lambda: max(rouge_l(prediction, answer) for answer in example.answers),
        "token_f1": lambda: max(token_f1(ids(prediction), ids(answer)) for answer in example.answers),
    }
    return {name: scorers[name]() for name in task_metrics(metric, example)}


def answer_examples(
    wire: LatentForgeWire,
    name: str,
    method: str,
    examples: Sequence[Example],
    metric: str,
    decoding: Decoding,
    num_latents: int | None = None,
    num_tokens: int | None = None,
    batch_size: int = 8,
    compress: Callable[[str, int], str] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """One record an example: `prediction`, [`answer_quality`], [`score_answers`], `tokens` that stand for the context,
    `sent` bytes of text, `context_tokens` of the whole.

    Raises:
        Refused: see [`read`].
    """
    contexts = other_contexts(examples, decoding.seed) if method == "shuffled" else [x.context for x in examples]
    receiver, records = wire.receiver(name), []
    for start in progress(range(0, len(examples), batch_size)):
        batch = examples[start : start + batch_size]
        prompts = [example.prompt for example in batch]
        reading = read(wire, name, method, contexts[start : start + batch_size], num_latents, compress)
        texts = write_answers(reading, prompts, [example.id for example in batch], decoding)
        scores = score_answers(reading, prompts, [example.answers[0] for example in batch], num_tokens)
        for row, example in enumerate(batch):
            records.append(
                {
                    "prediction": texts[row],
                    **answer_quality(metric, example, texts[row], receiver.tokenizer),
                    **scores[row],
                    "tokens": reading.tokens[row],
                    "sent": None if reading.sent is None else reading.sent[row],
                    "context_tokens": len(token_ids(receiver, example.context)),
                }
            )
    return records


@torch.no_grad()
def answer_jointly(
    wire: LatentForgeWire,
    examples: Sequence[Example],
    metric: str,
    decoding: Decoding,
    num_latents: int | None = None,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """Every receiver proposes an answer to the same latents; taken is the one of the largest sum of log-probabilities
    (EOS included) under all of them.

    Returns:
        one record an example: `prediction` and its quality, `chosen` receiver, `proposals`, `agreement` (1 where all
        say the same), and `oracle_<metric>`, the best proposal's.

    Raises:
        Refused: fewer than two receivers.
    """
    names = sorted(wire.receivers)
    if len(names) < 2:
        raise Refused(f"joint rescoring needs two receivers, attached is {', '.join(names) or 'none'}")
    tokenizer, records = wire.receiver(names[0]).tokenizer, []
    for start in progress(range(0, len(examples), batch_size)):
        batch = examples[start : start + batch_size]
        prompts = [example.prompt for example in batch]
        message = wire.encode([example.context for example in batch], num_latents)
        readings = {name: Reading(wire.receiver(name), [], None, wire.inject(name, message)) for name in names}
        proposals: dict[str, list[str]] = {}
        totals: dict[str, torch.Tensor] = {}
        for name, reading in readings.items():
            reading.bridge = wire.bridges[name]
            proposals[name] = write_answers(reading, prompts, [example.id for example in batch], decoding)
        for name, texts in proposals.items():
            # nothing cannot be scored: it is taken where all say nothing
            asked = [text.strip() or "." for text in texts]
            totals[name] = torch.stack([wire.score(judge, message, prompts, asked)[0].cpu() for judge in names]).sum(0)
            totals[name][[row for row, text in enumerate(texts) if not text.strip()]] = -torch.inf
        for row, example in enumerate(batch):
            chosen = max(names, key=lambda name: float(totals[name][row]))
            own = {name: proposals[name][row] for name in names}
            found = {name: answer_quality(metric, example, text, tokenizer) for name, text in own.items()}
            records.append(
                {
                    "prediction": own[chosen],
                    **found[chosen],
                    **{f"oracle_{key}": max(found[name][key] for name in names) for key in found[chosen]},
                    "agreement": float(len({normalize_answer(text) for text in own.values()}) == 1),
                    "chosen": chosen,
                    "proposals": own,
                }
            )
    return records


# -- the probe


def logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, penalty: float = 1.0
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Multinomial logistic regression of `(n, d)` features that are z-scored, with an L2 penalty on its weights of
    `penalty / 2` times their square, beside the sum of the examples' losses; L-BFGS.

    Returns:
        features `(m, d)` -> logits `(m, num_classes)`.
    """
    mean, deviation = features.mean(0), features.std(0, unbiased=False)
    deviation = torch.where(deviation > 1e-8 * deviation.max().clamp(min=1e-300), deviation, torch.ones(()).double())
    inputs = (features - mean) / deviation
    weight = torch.zeros(features.shape[1], num_classes, dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, labels) + penalty / 2 * weight.square().sum() / len(labels)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    weight, bias = weight.detach(), bias.detach()
    return lambda x: (x - mean) / deviation @ weight + bias


def probe_folds(
    features: torch.Tensor, labels: Sequence[str], documents: Sequence[str], seed: int, folds: int = FOLDS
) -> list[str]:
    """The label that a regression on the other folds gives to each example, `(n, d)` features.

    A document is in one fold only; features are z-scored by what the regression learns from.

    Raises:
        Refused: fewer documents than folds, or one class.
    """
    classes = sorted(set(labels))
    names = sorted(set(documents), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
    if len(classes) < 2 or len(names) < folds:
        raise Refused(f"a probe needs two classes and {folds} texts, there are {len(classes)} and {len(names)}")
    fold_of = {name: place % folds for place, name in enumerate(names)}
    fold = torch.tensor([fold_of[name] for name in documents])
    target = torch.tensor([classes.index(label) for label in labels])
    features, found = features.double().cpu(), torch.zeros(len(labels), dtype=torch.long)
    for number in range(folds):
        held_out = fold == number
        model = logistic_regression(features[~held_out], target[~held_out], len(classes))
        found[held_out] = model(features[held_out]).argmax(1)
    return [classes[place] for place in found.tolist()]


@torch.no_grad()
def pooled_latents(wire: LatentForgeWire, contexts: Sequence[str], num_latents: int | None = None) -> torch.Tensor:
    """Mean over a message's latents, `(B, D)`."""
    message: Any = wire.encode(contexts, num_latents)
    mask = message.latent_mask[..., None]
    return ((message.last_hidden_state * mask).sum(1) / mask.sum(1)).float().cpu()


@torch.no_grad()
def pooled_states(receiver: Receiver, contexts: Sequence[str], prompts: Sequence[str]) -> torch.Tensor:
    """Mean over a row of text of the receiver's last states, `(B, H)`."""
    batch = receiver.compose_text(contexts, prompts)
    with without_adapter(receiver):
        states = receiver.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states[-1]
    mask = batch.attention_mask[..., None]
    return ((states * mask).sum(1) / mask.sum(1)).float().cpu()


def probe_examples(
    wire: LatentForgeWire,
    name: str | None,
    examples: Sequence[Example],
    seed: int,
    num_latents: int | None = None,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[dict[str, Any]]:
    """`prediction` and `accuracy` of a probe, one record an example.

    Args:
        name: whose states of the text are read; None: latents are.

    Raises:
        Refused: the examples have no labels; see also [`probe_folds`].
    """
    if not all(example.labels for example in examples):
        raise Refused("a probe tells classes apart, and these examples have no labels")
    parts = []
    for start in progress(range(0, len(examples), batch_size)):
        batch = examples[start : start + batch_size]
        contexts = [example.context for example in batch]
        if name is None:
            parts.append(pooled_latents(wire, contexts, num_latents))
        else:
            parts.append(pooled_states(wire.receiver(name), contexts, [example.prompt for example in batch]))
    labels = [example.answers[0] for example in examples]
    found = probe_folds(torch.cat(parts), labels, [example.document for example in examples], seed)
    return [
        {"prediction": label, "accuracy": float(label == right)} for label, right in zip(found, labels, strict=True)
    ]


# -- what is sent, and how long it takes


@torch.no_grad()
def message_sizes(
    wire: LatentForgeWire, contexts: Sequence[str], num_latents: int | None = None
) -> list[dict[str, Any]]:
    """Bytes of each context's message, by packing it: `latents`, `context_bytes` (UTF-8) and `bytes` by codec, header
    included: those of `CODECS` and of the wire's own `codec`."""
    output = wire(*wire.ids_of(contexts), num_latents=num_latents, quantized=False)
    quantizers = {kind: LatentQuantizer(kind, wire.config.latent_size) for kind in CODECS}
    quantizers[wire.quantizer.kind] = wire.quantizer
    return [
        {
            "latents": int(mask.sum()),
            "context_bytes": len(context.encode()),
            "codec": wire.quantizer.kind,
            "bytes": {
                kind: len(quantizer.pack(latents[mask].float()).to_bytes()) for kind, quantizer in quantizers.items()
            },
        }
        for context, latents, mask in zip(contexts, output.last_hidden_state, output.latent_mask, strict=True)
    ]


def latency(
    wire: LatentForgeWire,
    name: str,
    method: str,
    examples: Sequence[Example],
    num_latents: int | None = None,
    new_tokens: int = 16,
    compress: Callable[[str, int], str] | None = None,
) -> dict[str, float]:
    """Milliseconds of one example at a time, medians: `encode` until the message is there, `prefill` until the first
    token, and `token` each further one.

    Args:
        new_tokens: written of each, the end held back; at least 2.
    """

    def clock() -> float:
        if wire.device.type == "cuda":
            torch.cuda.synchronize(wire.device)
        return time.perf_counter()

    times: dict[str, list[float]] = {"encode": [], "prefill": [], "token": []}
    for place, example in enumerate([examples[0], *examples]):
        start = clock()
        reading = read(wire, name, method, [example.context], num_latents, compress)
        encoded, elapsed = clock(), {}
        for count in (1, new_tokens):
            before = clock()
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            with reading.reader():
                composed = reading.compose([example.prompt])
                reading.receiver.write(reading.injection, composed, reading.bridge, **options)
            elapsed[count] = clock() - before
        if place:  # the first warms up
            times["encode"].append(encoded - start)
            times["prefill"].append(elapsed[1])
            times["token"].append((elapsed[new_tokens] - elapsed[1]) / (new_tokens - 1))
    return {key: 1000 * statistics.median(values) for key, values in times.items()}
