"""What a teacher says about a batch (`TeacherSignal`), and what a teacher must be able to do (`Teacher`).

B batch, T tokens, H the teacher's hidden size, V vocabulary, k stored entries per token, M tokens of one chunk.

Position t of a signal speaks about token t + 1, like the logits of a causal LM. A student's forward asks for the loss
of one chunk of tokens after another (`distillation(logits (M, V), index (M,))`, `index` into the flattened B * T
positions), so no form of the signal needs (B, T, V).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from modeling_latentforge.modeling_token_loss import SparseTargets, TokenLoss

from ..losses.aligned_noise import choice_interval, draw_from, sparse_choice_interval
from ..losses.chunk_likelihood import chunk_likelihood_loss
from ..losses.divergence import (
    ABSENT_LOGPROB,
    bucket_targets,
    dense_kl,
    refuse_temperature,
    sampled_tail_targets,
    sparse_loss,
)


NOISE_CHUNK = 2048  # tokens whose whole distributions are held at once


def speaking_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """`(B, T)` mask -> for every position the last unmasked one up to it, -1 where there is none.

    Padding is invisible to a teacher: what it says about the token after a gap was said at the last token before the
    gap. Asked at the padding itself it would answer about a text that holds a pad token.
    """
    steps = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)
    return torch.where(attention_mask != 0, steps, -1).cummax(-1).values


def check_vocabulary(
    student_size: int, teacher_size: int, num_tokens: int | None = None, tokenizer_id: str | None = None
) -> None:
    """Refuse a student whose ids cannot be the teacher's.

    Many checkpoints pad their output matrix (Qwen: 151643 ids, 151936 columns). A student without those columns is
    accepted when the teacher's tokenizer size is known and fits; the surplus columns are then cut and the rest
    renormalised.

    Args:
        student_size: columns of the student's logits.
        teacher_size: columns of the teacher's.
        num_tokens: ids that the teacher's tokenizer really has; None: unknown, then only equality passes.
        tokenizer_id: named in the message.

    Raises:
        ValueError: naming both sizes.
    """
    smallest = teacher_size if num_tokens is None else num_tokens
    if smallest <= student_size <= teacher_size:
        return
    used = "" if num_tokens is None else f" ({num_tokens} of them used by its tokenizer)"
    name = f", tokenizer {tokenizer_id}" if tokenizer_id else ""
    raise ValueError(
        f"The student has {student_size} token ids and the teacher {teacher_size}{used}{name}: their distributions "
        "cannot be compared id by id. "
        "Train the codec with the teacher's tokenizer, or pick a teacher that shares the codec's."
    )


class TeacherSignal(ABC):
    """A teacher's next-token distributions for one batch, as data.

    Attributes:
        vocab_size: columns of the teacher's distributions.
        num_tokens: ids that the teacher's tokenizer really has; columns beyond are padding of its matrix. None:
            unknown.
        temperature: at which the values were made; 1 is the teacher's own distribution.
        tokenizer_id: name, path or fingerprint of the teacher's tokenizer, where known.
        positions: `(B, T)`, see [`speaking_positions`]; None: every position speaks for itself.
    """

    vocab_size: int
    num_tokens: int | None
    temperature: float
    tokenizer_id: str | None
    positions: torch.Tensor | None

    @property
    def starts(self) -> torch.Tensor | None:
        """`(B, T)`, False where a position's loss needs the logits of the one before in the same call; None: nowhere.
        What a student's forward takes as `distillation_starts`."""
        return None

    def loss(self, student_logits: torch.Tensor, index: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """KL(teacher || student) of one chunk, `temperature**2` included: `(M, V)`, `(M,)` -> `(M,)` nats per token.

        0 where the teacher has seen no token yet.

        Raises:
            ValueError: the vocabularies differ, or the signal cannot be brought to `temperature`.
        """
        self.check_vocabulary(student_logits.shape[-1])
        if self.positions is None:
            return self.divergence(student_logits, index, temperature)
        asked, says = self._speaking(index)
        loss = self.divergence(student_logits, asked, temperature)
        return torch.where(says.to(loss.device), loss, 0.0)

    def _speaking(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which place speaks for each of `index (M,)`, and whether any does."""
        assert self.positions is not None
        length = self.positions.shape[1]
        position = self.positions.flatten()[index.to(self.positions.device)].to(index.device)
        return index // length * length + position.clamp(min=0), position >= 0

    def distillation(self, student_size: int, temperature: float = 1.0) -> TokenLoss | SparseTargets:
        """What a student with `student_size` columns takes as `distillation`: [`loss`], in the form that is fastest.

        Raises:
            ValueError: the vocabularies differ, or the signal cannot be brought to `temperature`.
        """
        self.check_vocabulary(student_size)
        return partial(self.loss, temperature=temperature)

    def aligned_noise(self, input_ids: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """`(B, T)` in [0, 1): the noise with which the teacher would have drawn each token of the text (see
        `losses/aligned_noise.py`); any number for a token that it says nothing about.

        Raises:
            ValueError: the signal speaks about no single tokens.
        """
        count = input_ids.numel()
        lower, width = torch.zeros(count), torch.ones(count)
        # position t - 1 speaks about token t; nothing about a row's first
        index = torch.arange(count).view_as(input_ids)[:, :-1].flatten()
        says = torch.ones(len(index), dtype=torch.bool)
        asked = index
        if self.positions is not None:
            asked, says = (x.cpu() for x in self._speaking(index))
        ids = input_ids.flatten().cpu()[index + 1]
        for start in range(0, len(index), NOISE_CHUNK):
            part = slice(start, start + NOISE_CHUNK)
            found = self.choice_interval(asked[part], ids[part])
            for values, of_part, neutral in zip((lower, width), found, (0.0, 1.0), strict=True):
                values[index[part] + 1] = torch.where(says[part], of_part.float().cpu(), neutral)
        return draw_from(lower, width, generator).view_as(input_ids.cpu()).to(input_ids.device)

    def choice_interval(self, index: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of flattened positions `index (M,)` and the tokens that follow them: see `losses/aligned_noise.py`."""
        raise ValueError(
            f"{type(self).__name__} holds likelihoods of pieces of text, and an aligned head learns from the choice "
            "of single tokens: take a teacher with the student's tokenizer."
        )

    @abstractmethod
    def divergence(self, student_logits: torch.Tensor, index: torch.Tensor, temperature: float) -> torch.Tensor:
        """[`loss`] with the entries at exactly `index`."""

    def covered(self) -> torch.Tensor | None:
        """`(B, T)` bool: where the teacher said anything at all; None: everywhere."""
        return None if self.positions is None else self.positions >= 0

    def check_vocabulary(self, student_size: int) -> None:
        """[`check_vocabulary`] with this signal's sizes."""
        check_vocabulary(student_size, self.vocab_size, self.num_tokens, self.tokenizer_id)


@dataclass
class DenseSignal(TeacherSignal):
    """Full distributions, kept as hidden states: `(B, T, V)` would be 32 GB for 64k tokens of a 128k vocabulary.

    Args:
        hidden_states: `(B, T, H)`.
        projection: `(M, H) -> (M, V)` logits, usually the teacher's output matrix.
        vocab_size, num_tokens, temperature, tokenizer_id, positions: see [`TeacherSignal`]. Logits can be brought to
            any temperature, so `temperature` is 1.
    """

    hidden_states: torch.Tensor
    projection: Callable[[torch.Tensor], torch.Tensor]
    vocab_size: int
    num_tokens: int | None = None
    temperature: float = 1.0
    tokenizer_id: str | None = None
    positions: torch.Tensor | None = None

    @classmethod
    def from_logits(cls, logits: torch.Tensor, **kwargs: Any) -> "DenseSignal":
        """From full logits `(B, T, V)`, where a teacher offers nothing smaller."""
        return cls(hidden_states=logits, projection=_identity, vocab_size=logits.shape[-1], **kwargs)

    def logits(self, index: torch.Tensor) -> torch.Tensor:
        """Logits `(M, V)` at flattened positions `index (M,)`; no gradient flows into the teacher."""
        # no_grad and not inference_mode: the student's backward keeps these tensors. Autocast off: the teacher has
        # chosen its own dtype.
        with torch.no_grad(), torch.autocast(self.hidden_states.device.type, enabled=False):
            hidden = self.hidden_states.flatten(0, 1)[index.to(self.hidden_states.device)]
            return self.projection(hidden)

    def divergence(self, student_logits: torch.Tensor, index: torch.Tensor, temperature: float) -> torch.Tensor:
        teacher_logits = self.logits(index)[:, : student_logits.shape[-1]]
        return dense_kl(student_logits, teacher_logits.to(student_logits.device), temperature)

    def choice_interval(self, index: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits(index)[:, : self.num_tokens]
        # an id that the teacher does not know, padding say, is asked about by nobody
        return choice_interval(logits, ids.to(logits.device).clamp(max=logits.shape[1] - 1))


def _identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


@dataclass
class SparseSignal(TeacherSignal):
    """A few ids per token: the k most likely, the mass of all others implied (`1 - sum`), never renormalised away; or
    an exact head and a sampled tail.

    Args:
        top_ids: `(B, T, k)`.
        top_logprobs: `(B, T, k)`, at temperature 1; values <= -1e3 (or NaN) mark absent entries.
        vocab_size, num_tokens, tokenizer_id, positions: see [`TeacherSignal`].
        num_draws: how many of the k, the last ones, are draws with replacement from the ids outside the first k -
            num_draws. Each holds the logarithm of its share of their mass, log(residual / num_draws), so that any sum
            over the entries estimates the sum over the vocabulary without bias. 0: all are the most likely ids.
        entropy: `(B, T)` nats, of the teacher's whole distribution; needed with draws, whose own probabilities are not
            kept, to give a divergence and not only a cross-entropy.

    Raises:
        ValueError: unequal shapes, `num_draws` out of range, draws without entropy, or a temperature other than 1
            (vLLM, for one, ignores it for given tokens).
    """

    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    vocab_size: int
    num_tokens: int | None = None
    temperature: float = 1.0
    tokenizer_id: str | None = None
    positions: torch.Tensor | None = None
    num_draws: int = 0
    entropy: torch.Tensor | None = None

    def __post_init__(self):
        if self.top_ids.shape != self.top_logprobs.shape or self.top_ids.ndim != 3:
            raise ValueError(
                f"`top_ids` {tuple(self.top_ids.shape)} and `top_logprobs` {tuple(self.top_logprobs.shape)} must both "
                "be (B, T, k)."
            )
        if self.temperature != 1:
            raise ValueError(
                f"A sparse signal must be made at temperature 1, got {self.temperature}: the tail's share at another "
                "one is unknown. "
                "Ask the teacher for log-probabilities at temperature 1."
            )
        if not 0 <= self.num_draws <= self.top_ids.shape[-1]:
            raise ValueError(
                f"`num_draws` must lie in 0 to {self.top_ids.shape[-1]} (entries of a token), got {self.num_draws}."
            )
        if self.num_draws and self.entropy is None:
            raise ValueError(
                f"`num_draws` is {self.num_draws} but there is no `entropy`: without it the loss of draws is no "
                "divergence. Keep the teacher's entropy beside them, as `to_sparse` does."
            )
        if self.entropy is not None and self.entropy.shape != self.top_ids.shape[:2]:
            raise ValueError(
                f"`entropy` {tuple(self.entropy.shape)} must be (B, T), as `top_ids` {tuple(self.top_ids.shape)}."
            )

    def covered(self) -> torch.Tensor:
        present = (self.top_logprobs > ABSENT_LOGPROB).any(-1)
        if self.positions is None:
            return present
        return present.gather(1, self.positions.clamp(min=0)) & (self.positions >= 0)

    def distillation(self, student_size: int, temperature: float = 1.0) -> SparseTargets:
        self.check_vocabulary(student_size)
        refuse_temperature(temperature)
        if self.positions is None:
            return self._targets(slice(None), student_size)
        asked, says = self._speaking(torch.arange(self.positions.numel(), device=self.top_ids.device))
        return self._targets(asked, student_size).only(says)

    def divergence(self, student_logits: torch.Tensor, index: torch.Tensor, temperature: float) -> torch.Tensor:
        refuse_temperature(temperature)
        targets = self._targets(index.to(self.top_ids.device), student_logits.shape[-1])
        return sparse_loss(student_logits, targets.rows(slice(None), student_logits.device))

    def choice_interval(self, index: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exact = self.top_ids.shape[-1] - self.num_draws
        index = index.to(self.top_ids.device)
        top_ids, logprobs = (x.flatten(0, 1)[index, :exact] for x in (self.top_ids, self.top_logprobs))
        return sparse_choice_interval(top_ids, logprobs, ids.to(top_ids.device))

    def _targets(self, index: slice | torch.Tensor, student_size: int) -> SparseTargets:
        """Of positions `index` into the flattened B * T."""
        top_ids, top_logprobs = self.top_ids.flatten(0, 1)[index], self.top_logprobs.flatten(0, 1)[index]
        if student_size < self.vocab_size:
            # padded columns of the teacher: no text holds them, their mass falls into the tail
            top_logprobs = top_logprobs.masked_fill(top_ids >= student_size, 10 * ABSENT_LOGPROB)
        if not self.num_draws:
            return bucket_targets(top_ids, top_logprobs, student_size)
        assert self.entropy is not None  # see __post_init__
        return sampled_tail_targets(top_ids, top_logprobs, self.num_draws, self.entropy.flatten()[index], student_size)


@dataclass
class ChunkSignal(TeacherSignal):
    """Likelihoods of pieces of the text itself, from a teacher with another tokenizer; see `alignment.py`.

    A chunk's loss stands at the position that predicts its last token, 0 at all others.

    Args:
        targets: `(B, T)`, the student's id that each position predicts; any id where it belongs to no chunk.
        chunks: `(B, T)`, the chunk of each position, 0 to N - 1 in ascending order, or -1 for none. A chunk lies in
            one row.
        teacher_logprobs: `(N,)`, of the whole chunk, at temperature 1.
        vocab_size: the *student's* columns: nothing else is known of the teacher's distributions.
        num_tokens, temperature, tokenizer_id, positions: see [`TeacherSignal`].

    Raises:
        ValueError: unequal shapes, or another temperature than 1.
    """

    targets: torch.Tensor
    chunks: torch.Tensor
    teacher_logprobs: torch.Tensor
    vocab_size: int
    num_tokens: int | None = None
    temperature: float = 1.0
    tokenizer_id: str | None = None
    positions: torch.Tensor | None = None

    def __post_init__(self):
        if self.targets.shape != self.chunks.shape or self.targets.ndim != 2:
            raise ValueError(
                f"`targets` {tuple(self.targets.shape)} and `chunks` {tuple(self.chunks.shape)} must both be (B, T)."
            )
        refuse_temperature(self.temperature)
        num_chunks = len(self.teacher_logprobs)
        flat = self.chunks.flatten()
        places = torch.arange(len(flat), device=flat.device)
        buffer = flat.remainder(num_chunks + 1)  # the last place takes what belongs to none
        first = places.new_full((num_chunks + 1,), len(flat)).scatter_reduce(0, buffer, places, "amin")[:num_chunks]
        last = places.new_zeros(num_chunks + 1).scatter_reduce(0, buffer, places, "amax")[:num_chunks]
        self._lengths = torch.bincount(buffer, minlength=num_chunks + 1)[:num_chunks]
        inside = places.new_zeros(len(flat) + 1)
        known = self._lengths > 0
        inside = inside.index_add(0, first[known] + 1, torch.ones_like(first[known]))
        inside = inside.index_add(0, last[known] + 1, -torch.ones_like(last[known]))
        self._starts = (inside.cumsum(0)[:-1] == 0).view_as(self.chunks)

    @property
    def starts(self) -> torch.Tensor:
        """`(B, T)`, False inside a chunk: its tokens must be judged together."""
        return self._starts

    def divergence(self, student_logits: torch.Tensor, index: torch.Tensor, temperature: float) -> torch.Tensor:
        refuse_temperature(temperature)
        index = index.to(self.chunks.device)
        chunks = self.chunks.flatten()[index]
        num_chunks = len(self.teacher_logprobs)
        here = torch.bincount(chunks.remainder(num_chunks + 1), minlength=num_chunks + 1)[:num_chunks]
        if bool(((here > 0) & (here < self._lengths)).any()):
            raise ValueError(
                "A chunk of the text was parted: its likelihood is the product over all of its tokens. Pass the "
                "signal's `starts` to the student's forward as `distillation_starts`."
            )
        targets = self.targets.flatten()[index]
        device = student_logits.device
        return chunk_likelihood_loss(
            student_logits, targets.to(device), chunks.to(device), self.teacher_logprobs.to(device)
        )


@dataclass(frozen=True)
class TeacherCapabilities:
    """What a teacher can give. Asked before training starts, and refused there.

    Attributes:
        form: `dense` (full distributions), `sparse` (top-k with a tail, or draws) or `chunks` (likelihoods of pieces
            of the text, across tokenizers).
        scores_given_tokens: it gives distributions for *our* text; a teacher that only writes its own cannot be used
            in [`KDTrainer`].
        any_temperature: its distributions can be softened (full logits can, a top-k cannot).
        remote: a call waits for a network; computing the next batch's signal meanwhile (`prefetch`) pays.
        parallel_calls: threads that may call `signal` at once.
    """

    form: str = "dense"
    scores_given_tokens: bool = True
    any_temperature: bool = True
    remote: bool = False
    parallel_calls: int = 1


@dataclass(frozen=True)
class TeacherIdentity:
    """What a stored answer depends on, whoever carried it here: two teachers with equal identities may share a store.

    Attributes:
        name: Hub id or directory's content hash; never a URL, a machine's path or a key.
        revision: resolved commit of the weights, or what the user declares for a server that cannot tell.
        numerics: `float32`, `bfloat16`, `fp8`, `awq`, ...: of the weights and the forward pass.
        tokenizer: hash of [`tokenizer_fingerprint`].
    """

    name: str
    revision: str
    numerics: str
    tokenizer: str


@runtime_checkable
class Teacher(Protocol):
    """A source of [`TeacherSignal`]. `signal` is called from as many threads at once as its capabilities allow."""

    vocab_size: int
    num_tokens: int | None
    capabilities: TeacherCapabilities

    def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> TeacherSignal:
        """`(B, T)` ids and mask (0: not text) -> what the teacher says at every position. Finite everywhere, also
        under the mask."""
        ...

    def check(self) -> None:
        """Do whatever shows that the teacher works. Raises an exception that says what is wrong and what to do."""
        ...

    def close(self) -> None:
        """Give back memory, connections, files. May be called twice; `signal` raises afterwards."""
        ...


# Strings on which tokenizers that merely have the same size come apart: spaces, case, digits, code, accents, CJK,
# emoji, control characters.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "    def f(x, *, y=None):\n        return x ** 2  # 3.14159\n",
    "naïve Straße, 東京, Привет, 👩‍🚀",
    "1234567890 0xDEADBEEF \t\r\n\n  https://example.org/?a=b&c=d",
    "don't WON'T it's “quoted” — and…",
)


def tokenizer_fingerprint(tokenizer: Any) -> list[list[int]]:
    """Ids of [`PROBES`], without special tokens: equal for two tokenizers that mean the same text by the same ids."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


def check_same_tokenizer(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Refuse two tokenizers that read the same text as different ids.

    Sizes say nothing: two BPE vocabularies of 32000 differ in nearly every id, and a teacher asked about another one's
    ids answers without any error.

    Raises:
        ValueError: with the first text that differs and both readings.
    """
    ours, theirs = tokenizer_fingerprint(student_tokenizer), tokenizer_fingerprint(teacher_tokenizer)
    for text, a, b in zip(PROBES, ours, theirs, strict=True):
        if a != b:
            raise ValueError(
                f"The teacher's tokenizer ({getattr(teacher_tokenizer, 'name_or_path', '') or 'unnamed'}, "
                f"{len(teacher_tokenizer)} ids) is not the "
                f"codec's ({getattr(student_tokenizer, 'name_or_path', '') or 'unnamed'}, {len(student_tokenizer)} "
                f"ids): {text[:24]!r} reads "
                f"{b[:6]} there and {a[:6]} here. Train the codec with the teacher's tokenizer (`--tokenizer` of "
                "train_autoencoder.py), or learn from the likelihoods of whole pieces of text "
                "(`--kd_alignment bytes`)."
            )
