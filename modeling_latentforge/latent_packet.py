"""A latent message as bytes: versioned, with a checksum, and exactly as long as is counted.

    magic 2 | version 1 | kind 1 | latents 2 | numbers per latent 2 | what the quantizer is 2 | CRC-32 4 | payload

Little-endian; the checksum is of all other bytes.
"""

import struct
import zlib
from dataclasses import dataclass


MAGIC = b"LW"
VERSION = 1
KINDS = ("none", "fp16", "int8", "int4", "fsq")
HEADER = struct.Struct("<2sBBHHHI")


@dataclass(frozen=True)
class Packet:
    """One message.

    Attributes:
        kind: of quantizer, one of `KINDS`.
        num_latents: M.
        numbers: stored per latent: D, or the dimensions of FSQ.
        quantizer: two bytes that tell quantizers of one kind apart (FSQ's levels).
        payload: the numbers.
    """

    kind: str
    num_latents: int
    numbers: int
    quantizer: int
    payload: bytes

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a packet's kind is one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("num_latents", "numbers", "quantizer"):
            if not 0 <= getattr(self, name) < 2**16:
                raise ValueError(f"`{name}` of a packet must lie in 0 to 65535, got {getattr(self, name)}")

    @property
    def num_bytes(self) -> int:
        """Of the whole message, header included."""
        return HEADER.size + len(self.payload)

    def to_bytes(self) -> bytes:
        return self._header(zlib.crc32(self.payload, zlib.crc32(self._header(0)))) + self.payload

    def _header(self, checksum: int) -> bytes:
        kind = KINDS.index(self.kind)
        return HEADER.pack(MAGIC, VERSION, kind, self.num_latents, self.numbers, self.quantizer, checksum)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Packet":
        """Read a message.

        Raises:
            ValueError: no packet, one of a newer version, a cut or a changed one.
        """
        if len(data) < HEADER.size:
            raise ValueError(f"{len(data)} bytes are no packet: its header alone has {HEADER.size}.")
        magic, version, kind, num_latents, numbers, quantizer, checksum = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ValueError(f"These bytes begin with {magic!r}, a packet with {MAGIC!r}: they are something else.")
        if version != VERSION:
            raise ValueError(
                f"The packet has version {version}, this code reads {VERSION}: use the code that wrote it."
            )
        if kind >= len(KINDS):
            raise ValueError(f"The packet's kind is {kind}, known are 0 to {len(KINDS) - 1}: it is damaged.")
        packet = cls(KINDS[kind], num_latents, numbers, quantizer, bytes(data[HEADER.size :]))
        if zlib.crc32(packet.payload, zlib.crc32(packet._header(0))) != checksum:
            raise ValueError("The packet's checksum is wrong: it was cut or changed on its way, send it again.")
        return packet
