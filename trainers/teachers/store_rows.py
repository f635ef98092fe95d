"""One row of a KD store: what a teacher said about one text, the key it is found by, and its bytes.

n tokens of the text, k entries per position. A row has n - 1 positions: what is said after the last token is about a
token that the text does not hold.

Bytes of a row, all numbers little-endian (`encode_row`, `decode_row`):

    header   "<BBBBIHH": FORMAT_VERSION; flags; bytes of an entry id, of a token id; n; k; draws
    noise    not packed: the lowest byte plane of the entry ids where the flag NOISY_IDS says so, and that of the
             log-probabilities
    body     one zstd frame of   token ids (n)
                                 entry ids (k, n - 1)       first all the most likely ones, then the second, ...
                                 log-probabilities (k, n - 1), fp16 bits, each less the entry's before it, mod 2**16
                                 tail log-mass (n - 1), fp16; entropy (n - 1), fp16, where HAS_ENTROPY

each cut into byte planes (all lowest bytes, then the next): high bytes repeat, low ones are noise, which zstd must not
see mixed with them, and at best not at all. Measured on 20 entries of a Zipf vocabulary of 151,936, bytes per token:
as it is 122; planes and zstd 67; with the differences along k 60, at level 1 and at level 6 alike; without the noise
the same, unpacked in half the time. (Lowest bytes of a vocabulary of 4096 are none: 51, and 56 unpacked.) The zstd is
pyarrow's, which `datasets` needs anyway; the package zstandard unpacks a row 20 us sooner.

fp16 and not bf16: its error costs 4e-6 nats of KL, that of bf16 a thousandth of a nat.
"""

import hashlib
import json
import struct
import zlib
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from .base import TeacherIdentity


FORMAT_VERSION = 1  # of the bytes above and of the key: a store of another version is refused
MODES = ("score",)  # the teacher's distributions for given tokens, at temperature 1
ABSENT = np.float16(-65504)  # fp16's smallest: an entry that the teacher did not give
HAS_ENTROPY, NOISY_IDS = 1, 2
NOISE = 7.25  # bits a byte, from which on a plane is not worth its unpacking
_HEADER = struct.Struct("<BBBBIHH")
_ZSTD = pa.Codec("zstd", compression_level=1)


def content_key(identity: TeacherIdentity, token_ids: np.ndarray, mode: str = "score") -> bytes:
    """32 bytes that name a question: this text, to this teacher.

    sha256 over `latentforge kd row`, the format's version, mode, name, revision, numerics and tokenizer as a JSON list
    in ASCII, a zero byte, and the ids that the teacher really reads (padding taken out, what stands in front of the
    text included) as uint32, little-endian. The transport, a URL say, is no part of it. How the answer is cut (k,
    draws, their seed) is not either: that stands beside the key in a store, so that 20 entries can answer for 8.
    """
    return KeyMaker(identity, mode)(token_ids)


class KeyMaker:
    """[`content_key`] for many texts and one teacher."""

    def __init__(self, identity: TeacherIdentity, mode: str = "score"):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        words = ["latentforge kd row", FORMAT_VERSION, mode, *astuple(identity)]
        self._started = hashlib.sha256(json.dumps(words, separators=(",", ":")).encode() + b"\0")

    def __call__(self, token_ids: np.ndarray) -> bytes:
        digest = self._started.copy()
        digest.update(np.ascontiguousarray(token_ids, dtype="<u4").tobytes())
        return digest.digest()


@dataclass(frozen=True)
class StoredRow:
    """What a teacher said about one text.

    Args:
        token_ids: `(n,)` uint32.
        top_ids: `(n - 1, k)` uint32; entry t speaks about token t + 1.
        top_logprobs: `(n - 1, k)` float16, `ABSENT` where there is no entry.
        tail: `(n - 1,)` float16, log of the mass outside all k entries, -inf where none is left (with draws, which
            share all of it, everywhere).
        entropy: `(n - 1,)` float16 nats or None.
        num_draws: of the k, the last, see [`SparseSignal`].
    """

    token_ids: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    tail: np.ndarray
    entropy: np.ndarray | None = None
    num_draws: int = 0

    @classmethod
    def of(
        cls,
        token_ids: np.ndarray,
        top_ids: np.ndarray,
        top_logprobs: np.ndarray,
        entropy: np.ndarray | None = None,
        num_draws: int = 0,
    ) -> "StoredRow":
        """From values in any precision; the tail is what they leave of 1, computed before they are rounded."""
        logprobs = np.asarray(top_logprobs, dtype=np.float64)
        logprobs = np.where(logprobs > -1e3, np.minimum(logprobs, 0.0), -np.inf)  # NaN is absent too
        with np.errstate(divide="ignore"):
            tail = np.log(np.clip(1.0 - np.exp(logprobs).sum(-1), 0.0, 1.0))
        return cls(
            token_ids=np.asarray(token_ids).astype(np.uint32),
            top_ids=np.asarray(top_ids).astype(np.uint32),
            top_logprobs=np.maximum(logprobs, float(ABSENT)).astype(np.float16),
            tail=(np.full_like(tail, -np.inf) if num_draws else tail).astype(np.float16),
            entropy=None if entropy is None else np.asarray(entropy).astype(np.float16),
            num_draws=num_draws,
        )

    @property
    def k(self) -> int:
        return self.top_ids.shape[1]

    @property
    def num_exact(self) -> int:
        """Entries that are the most likely ids."""
        return self.k - self.num_draws

    def head(self, k: int) -> "StoredRow":
        """The k most likely ids alone, and the tail that they leave."""
        logprobs = self.logprobs()[:, :k]
        return replace(StoredRow.of(self.token_ids, self.top_ids[:, :k], logprobs), entropy=self.entropy)

    def logprobs(self) -> np.ndarray:
        """`(n - 1, k)` float32 log-probabilities whose sum leaves exactly the stored tail.

        Rounded to fp16 a probability of one half may be off by 1e-4, as much as a confident teacher's whole tail: the
        entries are moved together, by less than their rounding, so that what they leave of 1 is right again.
        """
        # in one order of memory: sums are rounded by it, and a row that was read must equal the one that was written
        logprobs = self.top_logprobs.astype(np.float32, order="C")
        mass = np.exp(logprobs).sum(-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            left = -np.expm1(self.tail.astype(np.float32))[:, None]
            shift = np.log(left) - np.log(mass)
        # nothing to move where the teacher said nothing; what is further off than rounding was no distribution
        shift = np.where(np.isfinite(shift) & (np.abs(shift) < 0.01), shift, 0.0).astype(np.float32)
        return np.where(logprobs > -1e3, logprobs + shift, logprobs)

    def content_checksum(self, key: bytes) -> int:
        """crc32 over key and plain values, for formats that have a compression of their own."""
        checksum = zlib.crc32(key)
        for values in (self.token_ids, self.top_ids, self.top_logprobs, self.tail, self.entropy):
            if values is not None:
                checksum = zlib.crc32(np.ascontiguousarray(values).data, checksum)
        return checksum


def encode_row(row: StoredRow) -> bytes:
    """See the head of this file."""
    token_bytes, id_bytes = _needed_bytes(row.token_ids), _needed_bytes(row.top_ids)
    bits = row.top_logprobs.view(np.uint16)
    ids = _planes(row.top_ids.T, id_bytes)
    logprobs = _planes(np.diff(bits.T, axis=0, prepend=np.uint16(0)), 2)
    noisy_ids = int(_is_noise(ids[0]))
    noise = [*ids[:noisy_ids], logprobs[0]]
    body = [*_planes(row.token_ids, token_bytes), *ids[noisy_ids:], logprobs[1], *_planes(_bits(row.tail), 2)]
    if row.entropy is not None:
        body += _planes(_bits(row.entropy), 2)
    flags = HAS_ENTROPY * (row.entropy is not None) + NOISY_IDS * noisy_ids
    header = _HEADER.pack(FORMAT_VERSION, flags, id_bytes, token_bytes, len(row.token_ids), row.k, row.num_draws)
    return b"".join([header, *noise, _ZSTD.compress(b"".join(body), asbytes=True)])


def decode_row(data: bytes) -> StoredRow:
    """Raises ValueError where the bytes are no row of this version."""
    try:
        version, flags, id_bytes, token_bytes, tokens, k, num_draws = _HEADER.unpack_from(data)
    except struct.error as error:
        raise ValueError(f"{len(data)} bytes are no row") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"a row of format {version}, this version reads {FORMAT_VERSION}")
    positions = tokens - 1
    size = positions * k
    noisy_ids, has_entropy = int(bool(flags & NOISY_IDS)), flags & HAS_ENTROPY
    packed = _HEADER.size + size * (noisy_ids + 1)
    # what is not packed bounds the sizes: a damaged header would otherwise ask for all memory
    if (
        tokens < 1
        or not 0 <= num_draws <= k
        or k < 1
        or not {id_bytes, token_bytes} <= {1, 2, 3, 4}
        or packed > len(data)
    ):
        raise ValueError(
            f"a row whose header says {tokens} tokens of {k} entries and {num_draws} draws: it is damaged"
        )
    length = tokens * token_bytes + size * (id_bytes - noisy_ids + 1) + positions * 2 * (1 + has_entropy)
    try:
        body = _ZSTD.decompress(data[packed:], decompressed_size=length, asbytes=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"a row that cannot be unpacked: {error}") from error
    noise = _Reader(data, _HEADER.size, size)
    reader = _Reader(body, 0, tokens)
    token_ids = _joined(reader.planes(token_bytes), np.uint32)
    reader.size = size
    ids = _joined([*noise.planes(noisy_ids), *reader.planes(id_bytes - noisy_ids)], np.uint32).reshape(k, positions)
    bits = _joined([*noise.planes(1), *reader.planes(1)], np.uint16).reshape(k, positions)
    step = 1
    while step < k:  # running sums along k, by doubling: numpy's own takes twice as long on so few long rows
        bits[step:] += bits[:-step].copy()
        step *= 2
    reader.size = positions
    return StoredRow(
        token_ids=token_ids,
        top_ids=ids.T,
        top_logprobs=bits.view(np.float16).T,
        tail=_joined(reader.planes(2), np.uint16).view(np.float16),
        entropy=_joined(reader.planes(2), np.uint16).view(np.float16) if has_entropy else None,
        num_draws=num_draws,
    )


def row_checksum(key: bytes, data: bytes) -> int:
    """crc32 over key and bytes: a row that is damaged, or filed under another's key, is found out."""
    return zlib.crc32(data, zlib.crc32(key))


def _needed_bytes(ids: np.ndarray) -> int:
    return max(1, (int(ids.max(initial=0)).bit_length() + 7) // 8)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint16)


def _planes(values: np.ndarray, count: int) -> list[bytes]:
    flat = np.ascontiguousarray(values).reshape(-1)
    # shifts and not a transposed view of the bytes: four times faster
    return [(flat >> (8 * place)).astype(np.uint8).tobytes() for place in range(count)]


def _is_noise(plane: bytes) -> bool:
    share = np.bincount(np.frombuffer(plane, np.uint8), minlength=256) / max(1, len(plane))
    share = share[share > 0]
    return bool(-(share * np.log2(share)).sum() > NOISE)


@dataclass
class _Reader:
    """Takes planes of `size` bytes off `data`, one after the other."""

    data: bytes
    offset: int
    size: int

    def planes(self, count: int) -> list[np.ndarray]:
        start, self.offset = self.offset, self.offset + count * self.size
        return [np.frombuffer(self.data, np.uint8, self.size, start + place * self.size) for place in range(count)]


def _joined(planes: list[np.ndarray], dtype: Any) -> np.ndarray:
    values = planes[0].astype(dtype)
    for place, plane in enumerate(planes[1:], start=1):
        higher = plane.astype(dtype)
        higher <<= 8 * place
        values |= higher
    return values
