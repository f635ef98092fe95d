"""Messages of latents: quantizers, and bytes on the wire."""

import random

import pytest
import torch

from modeling_latentforge.latent_packet import HEADER, Packet
from modeling_latentforge.latent_quantizer import LatentQuantizer, num_payload_bytes, pack_digits, unpack_digits


KINDS = [("none", ()), ("fp16", ()), ("int8", ()), ("int4", ()), ("fsq", (5,) * 16), ("fsq", (8, 5, 3, 2, 4))]


@pytest.mark.parametrize(("kind", "levels"), KINDS)
@pytest.mark.parametrize("shape", [(32, 48), (7, 5), (1, 1)])
def test_what_is_unpacked_is_what_the_quantizer_gave_in_training(kind, levels, shape):
    """A receiver that was trained on other numbers than it gets reads another message."""
    torch.manual_seed(0)
    quantizer = LatentQuantizer(kind, shape[1], levels)
    latents = 3 * torch.randn(shape)
    packet = Packet.from_bytes(quantizer.pack(latents).to_bytes())
    assert torch.equal(quantizer.unpack(packet), quantizer(latents).detach())
    batch = torch.stack([latents, torch.zeros_like(latents), -latents])
    # a message does not depend on its neighbours, but for the rounding of larger products
    torch.testing.assert_close(quantizer(batch)[2], quantizer(-latents))


@pytest.mark.parametrize(("kind", "levels"), KINDS)
def test_bytes_are_those_of_the_formula(kind, levels):
    """Bytes that are estimated are how a compression of 4 became an expansion of 30."""
    quantizer = LatentQuantizer(kind, 256, levels)
    packet = quantizer.pack(torch.randn(32, 256))
    numbers = 32 * 256
    expected = {"none": 4 * numbers, "fp16": 2 * numbers, "int8": numbers + numbers // 16}
    expected["int4"] = numbers // 2 + numbers // 16
    expected["fsq"] = {16: 149, 5: 40}.get(len(levels), 0)  # log2(5^16 ... ) and log2(960) bits a latent, rounded up
    if len(levels) == 5:
        expected["fsq"] = -(-(960**32 - 1).bit_length() // 8)
    assert packet.num_bytes == len(packet.to_bytes()) == HEADER.size + expected[kind]
    assert num_payload_bytes(kind, 32, quantizer.numbers, levels) == expected[kind]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp16"])
def test_rounding_stays_within_half_a_step(kind):
    """A scale of the wrong group, or a sign lost among nibbles, still looks like numbers."""
    torch.manual_seed(0)
    latents = torch.randn(8, 64) * torch.logspace(-3, 3, 8)[:, None]
    error = (LatentQuantizer(kind, 64)(latents) - latents).abs()
    step = (
        latents.unflatten(1, (2, 32)).abs().amax(-1, keepdim=True)
        * {"int8": 1 / 127, "int4": 1 / 7, "fp16": 2**-10}[kind]
    )
    assert bool((error.unflatten(1, (2, 32)) <= 0.51 * step + 2**-14).all())


@pytest.mark.parametrize(("kind", "levels"), KINDS)
def test_gradients_pass_the_rounding(kind, levels):
    """Without them the encoder behind a quantizer learns nothing."""
    latents = torch.randn(4, 16, requires_grad=True)
    LatentQuantizer(kind, 16, levels)(latents).square().sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_fsq_uses_every_level_and_no_other():
    """A level that is never reached is paid for and wasted."""
    quantizer = LatentQuantizer("fsq", 2, (5, 4))
    with torch.no_grad():
        codes = quantizer._round(torch.linspace(-6, 6, 1001)[:, None].expand(-1, 2))
    assert sorted(set(codes[:, 0].tolist())) == [-2, -1, 0, 1, 2]
    assert sorted(set(codes[:, 1].tolist())) == [-2, -1, 0, 1]


def test_digits_of_mixed_bases_come_back():
    """Off by one in a base shifts all that follows."""
    draw = random.Random(0)
    for _ in range(200):
        bases = [draw.randint(2, 70) for _ in range(draw.randint(1, 40))]
        digits = [draw.randrange(base) for base in bases]
        assert unpack_digits(pack_digits(digits, bases), bases) == digits
    with pytest.raises(ValueError, match="too large"):
        unpack_digits(b"\xff", [3])


def test_a_packet_that_was_cut_changed_or_is_none_is_refused():
    """A message with one wrong bit would be read as another message."""
    data = LatentQuantizer("int8", 16).pack(torch.randn(3, 16)).to_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(ValueError):
            Packet.from_bytes(bytes(changed))
    for length in (0, 3, HEADER.size, len(data) - 1):
        with pytest.raises(ValueError):
            Packet.from_bytes(data[:length])
    with pytest.raises(ValueError, match="version 2"):
        Packet.from_bytes(data[:2] + b"\x02" + data[3:])


def test_a_packet_of_another_quantizer_is_refused():
    """Levels of another model make numbers, and no sense."""
    packet = LatentQuantizer("fsq", 16, (5, 5)).pack(torch.randn(3, 16))
    for other in (LatentQuantizer("fsq", 16, (5, 4)), LatentQuantizer("int8", 16), LatentQuantizer("fsq", 16, (5,))):
        with pytest.raises(ValueError, match="another model"):
            other.unpack(packet)
    short = Packet("fsq", 4, packet.numbers, packet.quantizer, packet.payload)
    with pytest.raises(ValueError, match="take"):
        LatentQuantizer("fsq", 16, (5, 5)).unpack(short)
