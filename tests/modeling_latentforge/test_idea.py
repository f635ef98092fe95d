"""The idea model's numbers: shapes of the first one, what an idea is made of, thinking, reading, what lies between."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

from modeling_latentforge import LatentForgeIdea, LatentForgeIdeaConfig, LatentForgeWire, Receiver
from modeling_latentforge.latent_receiver import answer_nll
from modeling_latentforge.modeling_idea import interpolate
from tests.modeling_latentforge.test_wire import ANSWERS, CONTEXTS, PROMPTS, bpe, receiver, wire


ENCODER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 256,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
}
SHORT = {"max_new_tokens": 6}


def idea(kind: str = "gpt2", **kwargs) -> LatentForgeIdea:
    torch.manual_seed(0)
    fields = {"num_ideas": 3, "latent_size": 24, "middle_hidden": 20, "compression_hidden": 40, "prefix_len": 4}
    fields |= {"encoder_config": ENCODER, "source": "bytes", "initializer_range": 0.2, "receiver": None}
    model = LatentForgeIdea(LatentForgeIdeaConfig(**{**fields, **kwargs})).eval()
    model.add_receiver(kind, receiver(kind))
    return model


def linears(module: torch.nn.Module) -> list[tuple[int, int]]:
    return [(x.in_features, x.out_features) for x in module.modules() if isinstance(x, torch.nn.Linear)]


def test_shapes_of_the_seed():
    """Whoever has the first model's figures compares with something else."""
    encoder = {"num_hidden_layers": 1, "vocab_size": 300, "pad_token_id": 2}  # all else as ModernBERT-base
    model = LatentForgeIdea(LatentForgeIdeaConfig.seed(encoder_config=encoder))
    tokenizer = bpe(300, bos=False)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, vocab_size=300, n_positions=64))  # all else as GPT-2
    model.add_receiver("gpt2", Receiver(gpt2, tokenizer))
    model.attach_tokenizer(tokenizer)
    assert model.config.encoder_config.model_type == "modernbert" and model.config.num_ideas == 1
    assert model.config.receiver == "openai-community/gpt2"
    assert linears(model.encoder.to_latent) == [(768, 512), (512, 256)]
    assert linears(model.middle) == [(256, 512), (512, 512), (512, 256)]
    assert linears(model.bridges["gpt2"]) == [(256, 10 * 768)]
    assert model.get_latent_vector(CONTEXTS[0]).shape == (256,)
    with torch.no_grad():
        message = model.encode(CONTEXTS)
        assert message.last_hidden_state.shape == (3, 1, 256)
        assert model.inject("gpt2", message).embeds.shape == (3, 10, 768)
    assert LatentForgeIdeaConfig().num_ideas == 8


@pytest.mark.parametrize("count", [1, 3, 7])
def test_an_idea_is_the_mean_of_its_part_of_the_text_and_of_no_padding(count):
    """Padding that is averaged in gives a short text another meaning in a long batch."""
    model = wire(pooling="mean", num_pooling_layers=0, receivers=())
    with torch.no_grad():
        ids, mask = model.ids_of(CONTEXTS)
        found, present = model.encoder(ids, mask, count)
        assert found.shape[1] == count and present.all(), "as many of a text of four bytes as of any other"
        for row, text in enumerate(CONTEXTS):
            alone = torch.tensor([list(text.encode())])
            states = model.encoder.backbone(input_ids=alone).last_hidden_state[0]
            length = len(states)
            for number in range(count):
                part = states[number * length // count : -(-(number + 1) * length // count)]
                expected = model.encoder.to_latent(model.encoder.norm(part.mean(0)))
                torch.testing.assert_close(found[row, number], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"pooling": "queries", "num_pooling_layers": 1}, {"compression_hidden": None}])
def test_gradients_reach_all_that_is_trained_and_nothing_of_the_receiver(fields):
    """The first model ran its decoder without gradients, and learned nothing."""
    model = idea(steps=2, **fields).train()
    output = model(*model.ids_of(CONTEXTS), receiver="gpt2", prompts=PROMPTS, answers=ANSWERS)
    answer_nll(output.answer_logits, output.answer_ids).sum().backward()
    unused = [name for name, x in model.named_parameters() if x.grad is None or not x.grad.abs().sum()]
    assert not [name for name in unused if "embed" not in name and "backbone" not in name], unused
    assert model.encoder.backbone.layers[0].mlp.Wi.weight.grad.abs().sum() > 0
    assert all(x.grad is None for x in model.receivers["gpt2"].model.parameters())


def test_the_first_token_of_a_target_is_learned_and_so_is_its_end():
    """The first model cut off the logit that says the first token, and had no end of text."""
    model = idea()
    output = model(*model.ids_of(CONTEXTS), receiver="gpt2", prompts=["", "", ""], answers=ANSWERS)
    tokenizer = model.receivers["gpt2"].tokenizer
    for row, answer in enumerate(ANSWERS):
        targets = [token for token in output.answer_ids[row].tolist() if token >= 0]
        assert targets == [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    nats = answer_nll(output.answer_logits, output.answer_ids)
    for place in (0, -1):  # the longest row's last is EOS
        (gradient,) = torch.autograd.grad(
            nats[0, place if place == 0 else nats[0].nonzero()[-1, 0]], model.middle.mlp[0].weight, retain_graph=True
        )
        assert gradient.abs().sum() > 0


def test_thinking_is_the_same_step_again_and_every_step_can_be_read():
    """Steps that cannot be read one by one cannot be supervised one by one."""
    model = idea(steps=3)
    with torch.no_grad():
        message = model.encode(CONTEXTS)
        assert len(message.thoughts) == 4 and torch.equal(message.thoughts[-1], message.last_hidden_state)
        plain = model.encode(CONTEXTS, steps=0).last_hidden_state
        assert torch.equal(message.thoughts[0], plain)
        thoughts = model.think(plain)
        assert len(thoughts) == 4 and all(map(torch.equal, thoughts, message.thoughts))
        assert torch.equal(model.think(plain, 5)[3], thoughts[3])
        assert torch.equal(model.think(thoughts[2], 1)[1], thoughts[3])
        assert not torch.allclose(thoughts[1], thoughts[2])
        one = model.think(plain[0])  # of a text alone, as `get_latent_vector` gives it
        torch.testing.assert_close(one[3], thoughts[3][0])
    read = [model.read(ideas, **SHORT) for ideas in thoughts]
    assert all(len(texts) == 3 for texts in read)
    assert read[3] == model.generate_batch(CONTEXTS, **SHORT)
    assert read[0] == model.generate_batch(CONTEXTS, steps=0, **SHORT)
    assert model.read(model.get_latent_vector(CONTEXTS[1]), **SHORT) == read[3][1:2]


def test_a_text_alone_and_in_a_batch_says_the_same():
    """A neighbour's length must not change a text's idea."""
    model = idea(steps=2).double()
    model.receivers["gpt2"].model.double()
    texts = model.generate_batch(CONTEXTS, PROMPTS, **SHORT)
    assert texts == [model.generate(*pair, **SHORT) for pair in zip(CONTEXTS, PROMPTS, strict=True)]
    with torch.no_grad():
        together = model.encode(CONTEXTS).last_hidden_state
    for row, text in enumerate(CONTEXTS):
        torch.testing.assert_close(model.get_latent_vector(text), together[row])


@pytest.mark.parametrize("kind", ["linear", "slerp"])
def test_the_ends_of_an_interpolation_are_the_texts_themselves(kind):
    """An end that is nearly the text's own idea says nearly the text."""
    model = idea()
    ends = [model.generate(text, **SHORT) for text in CONTEXTS[:2]]
    assert ends[0] != ends[1]
    for alpha, text in zip((0, 1, 0.0, 1.0), [*ends, *ends], strict=True):
        assert model.interpolate_and_generate(*CONTEXTS[:2], alpha, kind, **SHORT) == text
    first, second = (model.get_latent_vector(text) for text in CONTEXTS[:2])
    assert torch.equal(interpolate(first, second, 0, kind), first)
    assert torch.equal(interpolate(first, second, 1, kind), second)
    assert not torch.allclose(interpolate(first, second, 0.5, kind), first, atol=1e-2)


def test_slerp_goes_along_the_arc_and_knows_where_there_is_none():
    """A straight line between two directions passes through ideas that are shorter than any."""
    first, second = (
        torch.tensor([[3.0, 0.0], [1.0, 1.0], [1.0, 0.0]]),
        torch.tensor([[0.0, 3.0], [2.0, 2.0], [-1.0, 0.0]]),
    )
    third = interpolate(first, second, 1 / 3, "slerp")
    angle = torch.tensor(torch.pi / 6)
    torch.testing.assert_close(third[0], 3 * torch.stack([angle.cos(), angle.sin()]))
    torch.testing.assert_close(third[1:], torch.tensor([[4 / 3, 4 / 3], [1 / 3, 0.0]]))
    with pytest.raises(ValueError, match="must lie in"):
        interpolate(first, second, 1.5)
    with pytest.raises(ValueError, match="linear, slerp"):
        interpolate(first, second, 0.5, "cubic")


def test_a_saved_model_says_the_same_once_its_receiver_is_attached(tmp_path):
    """An idea model whose middle comes back untrained thinks at random."""
    model = idea(steps=2)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, LatentForgeIdea) and isinstance(again, LatentForgeWire)
    assert (again.config.num_ideas, again.config.steps, again.config.receiver) == (3, 2, None)
    assert not any("receiver" in name for name in again.state_dict())
    assert torch.equal(again.get_latent_vector(CONTEXTS[1]), model.get_latent_vector(CONTEXTS[1]))
    again.attach("gpt2", receiver("gpt2"))
    assert again.generate_batch(CONTEXTS, **SHORT) == model.generate_batch(CONTEXTS, **SHORT)


def test_a_packet_holds_what_was_thought():
    """Sent before it is thought about, an idea says something else where it arrives."""
    model = idea(steps=2, quantizer="int8")
    packets = model.pack(CONTEXTS)
    with torch.no_grad():
        message = model.encode(CONTEXTS)
    torch.testing.assert_close(model.unpack(packets).last_hidden_state, message.last_hidden_state)
    assert model.read(model.unpack(packets).last_hidden_state, **SHORT) == model.generate_batch(CONTEXTS, **SHORT)


def test_wrong_use_is_told():
    """Each of these is somebody's first try."""
    model = idea()
    for wrong, message in (
        (lambda: LatentForgeIdeaConfig(pooling="ratio"), "as many ideas of every text"),
        (lambda: LatentForgeIdeaConfig(steps=-1), "must not be negative"),
        (lambda: LatentForgeIdeaConfig(prefix_len=0), "at least 1"),
        (lambda: LatentForgeIdeaConfig(middle_hiden=4), "did you mean `middle_hidden`"),
        (lambda: model.think(torch.zeros(1, 3, 24), -1), "must not be negative"),
        (lambda: model.think(torch.zeros(2, 24)), "this model's are"),
        (lambda: model.encode(CONTEXTS, num_latents=2), "thinks with all its 3 ideas"),
        (lambda: model.read(torch.zeros(3, 24), receiver="llama"), "No receiver 'llama'"),
        (lambda: model.generate(""), "are empty"),
    ):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            wrong()
    model.add_receiver("llama", receiver("llama"))
    with pytest.raises(ValueError, match="several receivers"):
        model.generate("a")
    del model.receivers["llama"], model.receivers["gpt2"]
    with pytest.raises(ValueError, match="Call `attach` first"):
        model.generate("a")
