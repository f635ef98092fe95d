"""The wire's numbers before its plumbing: what a receiver reads, what is learned, what is sent, what is saved."""

import inspect

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_latentforge import LatentForgeWire, LatentForgeWireConfig, Packet, Receiver, Template
from modeling_latentforge.latent_bridge import MODES
from modeling_latentforge.latent_receiver import IGNORED, answer_nll


CONTEXTS = [
    "The ferry leaves the northern quay at a quarter past six.",
    "On Thursdays there is also a goat, which belongs to nobody that anyone can name, and always gets off first.",
    "Fog.",
]
PROMPTS = ["\nWhen does it leave?", "\nWho gets off first?", "\nWhat was there?"]
ANSWERS = ["a quarter past six", "a goat", "fog"]


def bpe(vocab_size: int, bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the texts above; of another size, other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CONTEXTS + PROMPTS + ANSWERS, trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def receiver(kind: str = "llama", template: Template | None = None, bos: bool = True) -> Receiver:
    torch.manual_seed(1)
    tokenizer = bpe({"llama": 300, "gpt2": 310, "qwen3": 290}[kind], bos)
    common = {"vocab_size": len(tokenizer), "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **common, num_key_value_heads=2)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **common, num_key_value_heads=2, head_dim=16)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, **common)),
    }[kind]()
    return Receiver(model, tokenizer, template)


def wire(mode: str = "soft", source: str = "bytes", receivers: tuple[str, ...] = ("llama",), **kwargs):
    torch.manual_seed(0)
    encoder = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder |= {
        "pad_token_id": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "cls_token_id": None,
        "sep_token_id": None,
    }
    config = LatentForgeWireConfig(
        encoder_config=encoder, source=source, latent_size=24, num_latents=16, initializer_range=0.2, **kwargs
    )
    model = LatentForgeWire(config).eval()
    for kind in receivers:
        model.add_receiver(kind, receiver(kind), mode=mode)
    if mode == "cross":
        for bridge in model.bridges.values():  # an adapter at its start changes nothing
            for adapter in bridge.adapters.values():
                torch.nn.init.constant_(adapter.gate, 0.5)
    return model


# -- what a receiver reads


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_contexts_own_embeddings_give_the_logits_of_text(kind, bos):
    """Whatever is not exact here is charged to the latents later, in every table."""
    reader = receiver(kind, bos=bos)
    batch = reader.compose(reader.text_injection(CONTEXTS), PROMPTS, ANSWERS)
    found = reader.logits(None, batch)
    tokenizer = reader.tokenizer
    rows = []
    for context, prompt, answer in zip(CONTEXTS, PROMPTS, ANSWERS, strict=True):
        ids = [tokenizer.bos_token_id] * bos + tokenizer(context, add_special_tokens=False)["input_ids"]
        ids += tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(ids)
    length = max(map(len, rows))
    assert batch.inputs_embeds.shape[1] == length
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        expected = reader.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert torch.equal(found[mask.bool()], expected[mask.bool()])
    options = {"max_new_tokens": 8, "do_sample": False}
    written = reader.generate(reader.text_injection(CONTEXTS), PROMPTS, **options)
    for row, context in enumerate(CONTEXTS):  # one by one, of ids, with the model's own cache
        start = [tokenizer.bos_token_id] * bos + tokenizer(context, add_special_tokens=False)["input_ids"]
        start += tokenizer(PROMPTS[row], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([start])
        out = reader.model.generate(
            ids, attention_mask=torch.ones_like(ids), eos_token_id=1, pad_token_id=2, **options
        )
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == written[row]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_loss_is_the_next_tokens_cross_entropy_once(kind):
    """Shifted twice, a model is trained to say the token after the next: the published wire's main fault."""
    reader = receiver(kind)
    batch = reader.compose(reader.text_injection(CONTEXTS[:1]), PROMPTS[:1], ANSWERS[:1])
    own = reader.model(inputs_embeds=batch.inputs_embeds, labels=batch.labels).loss
    logits, targets = reader.answer_logits(None, batch)
    count = int((batch.labels != IGNORED).sum())
    torch.testing.assert_close(answer_nll(logits, targets).sum() / count, own)
    # of several rows: each answer stands at the beginning, and each logit speaks of its own token
    batch = reader.compose(reader.text_injection(CONTEXTS), PROMPTS, ANSWERS)
    logits, targets = reader.answer_logits(None, batch)
    whole = reader.logits(None, batch)
    for row in range(3):
        places = (batch.labels[row] != IGNORED).nonzero()[:, 0]
        assert targets[row, : len(places)].tolist() == batch.labels[row, places].tolist()
        assert (targets[row, len(places) :] == IGNORED).all()
        torch.testing.assert_close(logits[row, : len(places)], whole[row, places - 1])


@pytest.mark.parametrize(
    "template", [Template(), Template(anchor="\nAnswer:"), Template(before="[user]", after="\n[model]\n", bos=True)]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_first_target_is_the_first_token_of_the_answer_as_text_would_have_it(kind, template):
    """Tokenized apart, the answer begins with a token that no text would have there."""
    reader = receiver(kind, template)
    batch = reader.compose(reader.text_injection(CONTEXTS), PROMPTS, ANSWERS)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        start = prompt + template.after + template.anchor
        gap = "" if start[-1].isspace() else " "
        joint = reader.tokenizer(start + gap + answer, add_special_tokens=False)["input_ids"]
        labels = [label for label in batch.labels[row].tolist() if label != IGNORED]
        assert labels[:-1] == joint[-(len(labels) - 1) :]
        assert labels[-1] == reader.tokenizer.eos_token_id, "the end is learned too"
        assert reader.tokenizer.decode(labels[:-1]).strip() == answer


def test_nothing_about_the_gold_answer_enters_what_is_generated():
    """A length of the gold answer that reaches the model flatters every figure."""
    for function in (Receiver.generate, LatentForgeWire.encode, LatentForgeWire.generate, LatentForgeWire.inject):
        names = set(inspect.signature(function).parameters)
        assert not {name for name in names if "answer" in name or "length" in name or "gold" in name}, function


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_row_is_read_and_written_alike_alone_and_in_a_batch(mode, kind):
    """Padding that is seen, or a slot of a neighbour, changes texts with the batch they stand in."""
    model = wire(mode, receivers=(kind,)).double()
    model.receivers[kind].model.double()
    with torch.no_grad():
        message = model.encode(CONTEXTS)
        scores, _ = model.score(kind, message, PROMPTS, ANSWERS)
        texts = model.generate(kind, message, PROMPTS, max_new_tokens=6, do_sample=False)
        for row in range(3):
            alone = model.encode(CONTEXTS[row : row + 1])
            count = alone.last_hidden_state.shape[1]
            torch.testing.assert_close(message.last_hidden_state[row, :count], alone.last_hidden_state[0])
            score, _ = model.score(kind, alone, PROMPTS[row : row + 1], ANSWERS[row : row + 1])
            torch.testing.assert_close(scores[row], score[0])
            text = model.generate(kind, alone, PROMPTS[row : row + 1], max_new_tokens=6, do_sample=False)
            assert texts[row] == text[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_generated_token_is_the_likeliest_by_the_score(mode):
    """Adapters that act while the prompt is read only, or keys that are lost after it, write another model's text."""
    model = wire(mode).double()
    reader = model.receivers["llama"]
    reader.model.double()
    message = model.encode(CONTEXTS[:1])
    with torch.no_grad():
        injection = model.inject("llama", message)
        batch = reader.compose(injection, PROMPTS[:1])
        with reader.adapted(injection, model.bridges["llama"]):
            options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
            ids = reader.model.generate(**batch.for_generate(), **options)[0]
        expected = []
        for place in range(5):
            again = reader.compose(injection, PROMPTS[:1])
            embeds = torch.cat([again.inputs_embeds, reader.embed(ids[:place])[None].double()], dim=1)
            again.inputs_embeds = embeds
            again.attention_mask = torch.nn.functional.pad(again.attention_mask, (0, place), value=1)
            last = again.position_ids[:, -1:]
            again.position_ids = torch.cat([again.position_ids, last + torch.arange(1, place + 1)], dim=1)
            expected.append(int(reader.logits(injection, again, model.bridges["llama"])[0, -1].argmax()))
    assert ids.tolist() == expected


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_carries_the_message(mode):
    """A bridge whose output nobody reads trains to nothing."""
    model = wire(mode)
    reads = []
    for contexts in (CONTEXTS[:1], CONTEXTS[1:2]):
        reads.append(model.score("llama", model.encode(contexts), PROMPTS[:1], ANSWERS[:1])[0])
    assert not torch.allclose(*reads, atol=1e-4)


@pytest.mark.parametrize("mode", ["soft", "kv"])
def test_the_order_of_latents_is_read(mode):
    """A receiver that gets a message as a bag of keys cannot say what comes first."""
    model = wire(mode)
    bridge = model.bridges["llama"]
    if mode == "kv":  # as they are after training
        torch.nn.init.normal_(bridge.place)
    message = model.encode(CONTEXTS[:1])
    nats = []
    for latents in (message.last_hidden_state, message.last_hidden_state.flip(1)):
        injection = bridge(latents, message.latent_mask)
        receiver = model.receiver("llama")
        with torch.no_grad():
            said, _ = receiver.answer_logits(injection, receiver.compose(injection, PROMPTS[:1], ANSWERS[:1]))
        nats.append(said)
    assert not torch.allclose(*nats, atol=1e-3)


@pytest.mark.parametrize("pooling", ["ratio", "queries", "patches"])
def test_padding_of_a_message_changes_nothing(pooling):
    """Bytes of padding that are read are how a short text got another meaning in a long batch."""
    model = wire(pooling=pooling).double()
    ids, mask = model.ids_of(CONTEXTS)
    with torch.no_grad():
        short = model(ids, mask)
        long = model(torch.nn.functional.pad(ids, (0, 7), value=5), torch.nn.functional.pad(mask, (0, 7)))
    count = short.last_hidden_state.shape[1]
    torch.testing.assert_close(long.last_hidden_state[:, :count], short.last_hidden_state)
    assert torch.equal(long.latent_mask[:, :count], short.latent_mask) and not long.latent_mask[:, count:].any()
    with pytest.raises(ValueError, match="on the right"):
        model(ids, mask.flip(1))


def test_the_first_queries_are_the_same_however_many_follow():
    """One checkpoint serves every length of message only if a shorter one is the beginning of the longer."""
    model = wire(pooling="queries").double()
    with torch.no_grad():
        ids = model.ids_of(CONTEXTS)
        whole, part = model(*ids).last_hidden_state, model(*ids, num_latents=5).last_hidden_state
    torch.testing.assert_close(whole[:, :5], part)
    assert part.shape[1] == 5


# -- what is sent


@pytest.mark.parametrize("quantizer", ["none", "int8", "int4", "fsq"])
def test_a_packet_is_read_as_the_message_was(quantizer):
    """Trained on one thing, served on another."""
    model = wire(quantizer=quantizer)
    with torch.no_grad():
        message = model.encode(CONTEXTS)
    packets = [Packet.from_bytes(packet.to_bytes()) for packet in model.pack(CONTEXTS)]
    opened = model.unpack([packets[0].to_bytes(), packets[1], packets[2]])
    assert torch.equal(opened.latent_mask, message.latent_mask)
    torch.testing.assert_close(opened.last_hidden_state, message.last_hidden_state)
    assert [packet.num_latents for packet in packets] == message.latent_mask.sum(1).tolist()


# -- what is learned and saved


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_all_that_is_trained_and_nothing_of_the_receiver(mode):
    """A receiver that learns is no longer the one that everybody else has."""
    model = wire(mode, num_refiner_layers=1).train()
    output = model(*model.ids_of(CONTEXTS), receiver="llama", prompts=PROMPTS, answers=ANSWERS)
    answer_nll(output.answer_logits, output.answer_ids).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # tokens of other texts, and what no bridge of this mode reads
    assert not [name for name in missing if "embed" not in name], missing
    assert all(parameter.grad is None for parameter in model.receivers["llama"].model.parameters())
    assert not any("receiver" in name for name in model.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_wire_reads_the_same_once_its_receivers_are_attached(mode, tmp_path):
    """Weights of the receiver on disk are gigabytes; bridges that come back untrained are silence."""
    model = wire(mode, receivers=("llama", "gpt2"), quantizer="int8")
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, LatentForgeWire) and set(again.bridges) == {"llama", "gpt2"}
    with pytest.raises(ValueError, match="Call `attach` first"):
        again.generate("llama", again.encode(CONTEXTS), PROMPTS)
    for kind in ("llama", "gpt2"):
        again.attach(kind, receiver(kind))
        message = model.encode(CONTEXTS)
        expected, _ = model.score(kind, message, PROMPTS, ANSWERS)
        found, _ = again.score(kind, again.encode(CONTEXTS), PROMPTS, ANSWERS)
        torch.testing.assert_close(found, expected)
    size = sum(parameter.numel() for parameter in again.parameters())
    assert size == sum(parameter.numel() for parameter in model.parameters())


def test_an_answer_with_no_token_before_it_is_refused():
    """Keys and values alone have no output that could say its first token: an error of shapes, or a pad's guess."""
    model = wire("kv")
    model.receivers["llama"] = receiver("llama", Template(False))
    message = model.encode(CONTEXTS)
    for prompts in (["", "", ""], [*PROMPTS[:2], ""]):
        with pytest.raises(ValueError, match="no token before its answer"):
            model.score("llama", message, prompts, ANSWERS)
    with pytest.raises(ValueError, match="no token before its answer"):
        model.receiver("llama").compose_text(["", "x", "y"], [""] * 3, ANSWERS)


def test_wrong_use_is_told():
    """Each of these is somebody's first try."""
    model = wire()
    with pytest.raises(ValueError, match="must be new"):
        model.add_receiver("llama", receiver())
    with pytest.raises(ValueError, match="built for another model"):
        model.attach("llama", receiver("qwen3"))
    with pytest.raises(ValueError, match="There is no bridge"):
        model.attach("qwen3", receiver("qwen3"))
    with pytest.raises(ValueError, match="rows \\[1\\] are empty"):
        model.encode(["a", ""])
    with pytest.raises(ValueError, match="answers of rows \\[0\\] are empty"):
        model.ask("llama", model.encode(["a"]), ["b"], [" "])
    with pytest.raises(ValueError, match="go together"):
        model(*model.ids_of(["a"]), receiver="llama")
    with pytest.raises(ValueError, match="give one of each per row"):
        model.generate("llama", model.encode(["a"]), ["b", "c"])
    with pytest.raises(ValueError, match="belongs to the answer"):
        Template(anchor="Answer: ")
    with pytest.raises(ValueError, match="attach_tokenizer"):
        wire(source="tokens").encode(["a"])
    with pytest.raises(ValueError, match="did you mean `ratio`"):
        LatentForgeWireConfig(ratios=4)
