"""Latents of a message -> fewer bits, trained with the task.

B messages, M latents, D numbers per latent, d dimensions of FSQ.
"""

import math
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import nn

from .latent_packet import KINDS, Packet


GROUP = 32  # numbers that share a scale


def straight_through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of `exact` (arXiv 1308.3432)."""
    return rounded.detach() + (exact - exact.detach())  # to the bit: what is added is 0


def pack_digits(digits: Sequence[int], bases: Sequence[int]) -> bytes:
    """Digits of a number with mixed bases, the last the least -> bytes, as few as can hold every such number."""
    value, largest = 0, 0
    for digit, base in zip(digits, bases, strict=True):
        value, largest = value * base + digit, largest * base + base - 1
    return value.to_bytes(-(-largest.bit_length() // 8), "little")


def unpack_digits(data: bytes, bases: Sequence[int]) -> list[int]:
    """[`pack_digits`] backwards.

    Raises:
        ValueError: a number that the bases cannot hold.
    """
    value = int.from_bytes(data, "little")
    digits = []
    for base in reversed(bases):
        value, digit = divmod(value, base)
        digits.append(digit)
    if value:
        raise ValueError("The packet's payload holds a number too large for its quantizer: it is damaged.")
    return digits[::-1]


class LatentQuantizer(nn.Module):
    """`none` (fp32 on the wire), `fp16`, `int8` and `int4` (a scale in fp16 per 32 numbers), or `fsq`: finite scalar
    quantization (arXiv 2309.15505), d bounded numbers of few levels each between two linear maps.

    Args:
        kind: one of these.
        latent_size: D.
        levels: of FSQ's dimensions, at least 2 each.

    Raises:
        ValueError: an unknown kind, or FSQ without levels.
    """

    def __init__(self, kind: str, latent_size: int, levels: Sequence[int] = ()):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"`quantizer` must be one of {', '.join(KINDS)}, got {kind!r}.")
        if kind == "fsq" and (not levels or min(levels) < 2):
            raise ValueError(f"FSQ needs `quantizer_levels` of at least 2 each, got {list(levels)}.")
        self.kind, self.latent_size, self.levels = kind, latent_size, tuple(levels)
        if kind == "fsq":
            self.down = nn.Linear(latent_size, len(levels))
            self.up = nn.Linear(len(levels), latent_size)

    @property
    def numbers(self) -> int:
        """Stored per latent."""
        return len(self.levels) if self.kind == "fsq" else self.latent_size

    @property
    def identity(self) -> int:
        return zlib.crc32(struct.pack(f"<{len(self.levels)}H", *self.levels)) & 0xFFFF if self.kind == "fsq" else 0

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """`(..., D)` -> what the receiver gets, `(..., D)`; the gradient passes straight through."""
        if self.kind == "none":
            return latents
        if self.kind == "fsq":
            return self.up(self._normalised(self._round(self.down(latents))))
        if self.kind == "fp16":
            return straight_through(latents, latents.half().to(latents.dtype))
        numbers, scales = self._integers(latents.detach())
        return straight_through(latents, self._from_integers(numbers, scales, latents))

    # -- FSQ

    def _levels(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.levels, device=like.device, dtype=torch.float32)

    def _round(self, numbers: torch.Tensor) -> torch.Tensor:
        """`(..., d)` -> whole numbers around 0, as many as each dimension has levels."""
        levels = self._levels(numbers)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = (numbers.float() + (offset / half).atanh()).tanh() * half - offset
        return straight_through(bounded, bounded.round())

    def _normalised(self, whole: torch.Tensor) -> torch.Tensor:
        return (whole / (self._levels(whole) // 2)).to(self.up.weight.dtype)

    # -- integers

    def _integers(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(..., D)` -> whole numbers `(G, 32)` and scales `(G, 1)`, which are numbers of fp16."""
        largest = 127 if self.kind == "int8" else 7
        flat = latents.float().flatten(-2) if latents.dim() > 1 else latents.float()
        groups = nn.functional.pad(flat, (0, -flat.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
        # a number of fp16 and not 0, also where all are 0
        scales = (groups.abs().amax(-1, keepdim=True) / largest).clamp(2**-14, 65504).half().float()
        return (groups / scales).round().clamp(-largest, largest), scales

    def _from_integers(self, numbers: torch.Tensor, scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        flat = (numbers * scales).flatten(-2)
        count = like.shape[-2] * like.shape[-1] if like.dim() > 1 else like.shape[-1]
        return flat[..., :count].reshape(like.shape).to(like.dtype)

    # -- on the wire

    @torch.no_grad()
    def pack(self, latents: torch.Tensor) -> Packet:
        """The latents of one message, `(M, D)`, before they were quantized.

        Raises:
            ValueError: numbers that are not finite, or that the quantizer cannot hold (fp16 ends at 65504).
        """
        if not (latents.isfinite().all() and self(latents).isfinite().all()):
            raise ValueError(
                f"A message holds numbers that are not finite, or too large for {self.kind}: the encoder's weights or "
                "its text are at fault."
            )
        latents = latents.detach().cpu() if self.kind != "fsq" else latents.detach()
        if self.kind == "fsq":
            codes = (self._round(self.down(latents)) + self._levels(latents) // 2).long().flatten().tolist()
            payload = pack_digits(codes, self.levels * len(latents))
        elif self.kind in ("none", "fp16"):
            flat = latents.flatten().to(torch.float16 if self.kind == "fp16" else torch.float32).tolist()
            payload = struct.pack(f"<{len(flat)}{'e' if self.kind == 'fp16' else 'f'}", *flat)
        else:
            numbers, scales = self._integers(latents)
            whole = numbers.flatten().long().tolist()[: latents.numel()]
            stored = struct.pack(f"<{scales.numel()}e", *scales.flatten().tolist())
            if self.kind == "int4":
                whole += [0] * (len(whole) % 2)
                pairs = zip(whole[::2], whole[1::2], strict=True)
                payload = stored + bytes((low & 15) | (high & 15) << 4 for low, high in pairs)
            else:
                payload = stored + struct.pack(f"<{len(whole)}b", *whole)
        return Packet(self.kind, len(latents), self.numbers, self.identity, payload)

    @torch.no_grad()
    def unpack(self, packet: Packet) -> torch.Tensor:
        """What [`forward`] gave of the message that was packed: `(M, D)`.

        Raises:
            ValueError: another quantizer's packet, a payload of another length, or one that [`pack`] never makes.
        """
        latents = self._unpack(packet)
        if not latents.isfinite().all():
            raise ValueError("The packet holds numbers that are not finite: it was not made by this code.")
        return latents

    def _unpack(self, packet: Packet) -> torch.Tensor:
        if (packet.kind, packet.numbers, packet.quantizer) != (self.kind, self.numbers, self.identity):
            raise ValueError(
                f"The packet is of quantizer {packet.kind} with {packet.numbers} numbers per latent "
                f"({packet.quantizer}), the model's is {self.kind} with {self.numbers} ({self.identity}): it was "
                "sent by another model."
            )
        count = packet.num_latents * packet.numbers
        length = num_payload_bytes(self.kind, packet.num_latents, self.numbers, self.levels)
        if len(packet.payload) != length:
            raise ValueError(
                f"The packet's payload has {len(packet.payload)} bytes, {packet.num_latents} latents of "
                f"{packet.numbers} numbers take {length}."
            )
        payload, shape = packet.payload, (packet.num_latents, packet.numbers)
        if self.kind == "fsq":
            device = self.up.weight.device
            codes = torch.tensor(unpack_digits(payload, self.levels * packet.num_latents), device=device).view(shape)
            return self.up(self._normalised(codes - self._levels(codes) // 2))
        if self.kind in ("none", "fp16"):
            return torch.tensor(struct.unpack(f"<{count}{'e' if self.kind == 'fp16' else 'f'}", payload)).view(shape)
        groups = -(-count // GROUP)
        scales = torch.tensor(struct.unpack_from(f"<{groups}e", payload))[:, None]
        rest = payload[2 * groups :]
        if self.kind == "int4":
            nibbles = [part for byte in rest for part in (byte & 15, byte >> 4)][:count]
            whole = [part - 16 if part > 7 else part for part in nibbles]
        else:
            whole = list(struct.unpack(f"<{count}b", rest))
        whole += [0] * (groups * GROUP - count)
        numbers = torch.tensor(whole, dtype=torch.float32).view(groups, GROUP)
        return (numbers * scales).flatten()[:count].view(shape)


def num_payload_bytes(kind: str, num_latents: int, numbers: int, levels: Sequence[int] = ()) -> int:
    """What a message of so many latents takes, without the header."""
    count = num_latents * numbers
    if kind == "fsq":
        return -(-(math.prod(levels) ** num_latents - 1).bit_length() // 8)
    if kind in ("none", "fp16"):
        return count * (2 if kind == "fp16" else 4)
    return 2 * -(-count // GROUP) + (count if kind == "int8" else -(-count // 2))
