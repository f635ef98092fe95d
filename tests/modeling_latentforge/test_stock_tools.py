"""What a user of any causal LM does with a model from the Hub."""

import json
import re
from threading import Thread

import peft
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    StaticCache,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
    set_seed,
)

from modeling_latentforge import (
    LatentForgeAutoencoderConfig,
    LatentForgeConfig,
    LatentForgeForCausalLM,
    LatentForgeModel,
    LatentHeadConfig,
)
from tests.conftest import HEAD_DECODER, PAD, VOCAB, text_batch, tiny_autoencoder, tiny_student
from tests.trainers.training_helpers import byte_tokenizer


DECODERS = pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
PAIRS = pytest.mark.parametrize("head, decoder", HEAD_DECODER)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def _generate(student, ids, **kwargs):
    return student.generate(ids, **{**GREEDY, "max_new_tokens": 11, **kwargs})


@pytest.fixture
def folder(tmp_path):
    """A student and its tokenizer, as a training run leaves them."""
    tiny_student().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


# -- generate()


@DECODERS
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[65], [66]]},
        {"suppress_tokens": list(range(200))},
    ],
    ids=lambda options: "-".join(options),
)
def test_processors_shape_every_token_as_they_would_a_token_models(decoder, options):
    """A processor that is applied per patch, or to a patch's first token only, leaves most tokens unshaped."""
    student, ids = tiny_student("regression", decoder), text_batch(2, 6)
    set_seed(3)
    recorded = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    made = _generate(student, ids, do_sample=True, **recorded, **options)
    for logits, scores in zip(made.logits, made.scores, strict=True):
        assert not torch.equal(logits, scores)
    set_seed(3)
    assert torch.equal(made.sequences, _generate(student, ids, do_sample=True, use_cache=False, **options))


@DECODERS
def test_lengths_are_counted_in_tokens(decoder):
    """A limit in patches would end texts K times too late."""
    student, ids = tiny_student("regression", decoder), text_batch(2, 6)
    assert _generate(student, ids, max_new_tokens=None, max_length=13).shape == (2, 13)
    first = int(_generate(student, ids[:1])[0, 6])
    ended = _generate(student, ids[:1], eos_token_id=first)
    assert ended.shape == (1, 7)
    late = _generate(student, ids[:1], eos_token_id=first, min_new_tokens=5)
    assert first not in late[0, 6:11]


@DECODERS
def test_stop_strings_and_criteria_end_inside_a_patch(decoder):
    """Text behind the stop would reach the user."""
    student, ids, tokenizer = tiny_student("regression", decoder), text_batch(1, 6), byte_tokenizer()
    letters = set(tokenizer("abcdefghijklmnopqrstuvwxyz").input_ids)  # other bytes are no text on their own
    only = {"suppress_tokens": [i for i in range(VOCAB) if i not in letters]}
    text = tokenizer.decode(_generate(student, ids, **only)[0, 6:])
    end = 3  # inside a patch: they end after 2, 6 and 10 new tokens
    stopped = _generate(student, ids, **only, stop_strings=[text[:end]], tokenizer=tokenizer)
    assert tokenizer.decode(stopped[0, 6:]) == text[:end]
    criteria = StoppingCriteriaList([lambda input_ids, scores, **_: torch.tensor([input_ids.shape[1] >= 11])])
    assert _generate(student, ids, stopping_criteria=criteria).shape == (1, 11)


def test_streamers_receive_what_generate_returns(capsys):
    """A chat window shows the streamer's text, the log keeps the returned one."""
    student, ids, tokenizer = tiny_student(), text_batch(1, 6), byte_tokenizer()
    text = tokenizer.decode(_generate(student, ids)[0, 6:])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=_generate, args=(student, ids), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == text
    thread.join()
    _generate(student, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")


@PAIRS
def test_several_sequences_of_a_prompt_are_drawn_apart(head, decoder):
    """Rows that share a latent or a cache would repeat each other."""
    student = tiny_student(head, decoder)
    set_seed(0)
    made = _generate(student, text_batch(2, 6), do_sample=True, num_return_sequences=3)
    assert made.shape == (6, 17)
    assert len({tuple(row.tolist()) for row in made}) == 6


@DECODERS
def test_scores_give_the_log_probability_of_each_token(decoder):
    """`compute_transition_scores` is how tools ask for them."""
    student, ids = tiny_student("regression", decoder), text_batch(2, 6)
    made = _generate(student, ids, output_scores=True, return_dict_in_generate=True)
    scores = student.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    offset = None if decoder == "autoregressive" else -6 % 4
    expected = student(made.sequences, patch_offset=offset).logits.log_softmax(-1)[:, 5:-1]
    torch.testing.assert_close(scores, expected.gather(2, made.sequences[:, 6:, None])[..., 0], rtol=0, atol=1e-4)


@DECODERS
def test_static_caches_hold_patches(decoder):
    """Sized in tokens it would take K times the memory; sized in patches and counted in tokens, it would overflow."""
    student, ids = tiny_student("regression", decoder), text_batch(1, 6)
    made = _generate(student, ids, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(made.sequences, _generate(student, ids))
    assert made.past_key_values.backbone.layers[0].max_cache_len <= 17 // 4 + 2
    own = StaticCache(config=student.config.backbone_config, max_cache_len=6)
    assert torch.equal(_generate(student, ids, past_key_values=own), made.sequences)


@DECODERS
def test_a_prompt_may_be_continued_from_its_cache(decoder):
    """A chat sends its history again; the cache saves reading it."""
    student, ids = tiny_student("regression", decoder), text_batch(1, 9)
    first = _generate(student, ids, return_dict_in_generate=True)
    more = torch.cat([first.sequences, text_batch(1, 5)], dim=1)
    kept = _generate(student, more, past_key_values=first.past_key_values)
    if decoder == "autoregressive":  # a parallel grid stays where the first prompt put it
        assert torch.equal(kept, _generate(student, more))
    assert torch.equal(
        kept, _generate(student, more, use_cache=False, patch_offset=-9 % 4 if decoder == "parallel" else None)
    )


@DECODERS
def test_tokens_may_be_constrained_one_by_one(decoder):
    """Grammars and JSON modes are functions of the tokens so far."""
    student, ids = tiny_student("regression", decoder), text_batch(1, 6)

    def alternate(batch, so_far):
        return [65] if len(so_far) % 2 else [66]

    assert _generate(student, ids, prefix_allowed_tokens_fn=alternate, num_beams=2)[0, 6:].tolist() == [66, 65] * 5 + [
        66
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cache_implementation": "paged"}, "this model's counts patches. Call `generate` on a left-padded batch"),
        ({"inputs_embeds": torch.zeros(1, 6, 32)}, "`inputs_embeds` to `.generate..`"),
        ({"misspelt": 1}, "not used by the model: .'misspelt'"),
        ({"do_sample": True, "temperature": 0.0}, "temperature. .=0.0. has to be a strictly positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_says_so(options, message):
    """transformers' paged worker logs an error and gives the bare prompt back."""
    with pytest.raises(ValueError, match=message):
        _generate(tiny_student(), text_batch(1, 6), **options)


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.full((1, 8200), 65), "8200 tokens, the model reads at most 2048 patches of 4, 8192 tokens"),
        (torch.zeros(1, 0, dtype=torch.long), r"shape \(1, 0\) hold no token: give at least one, EOS"),
        (torch.full((1, 4), VOCAB), f"the id {VOCAB}, and the model knows 0 to {VOCAB - 1}: tokenize with"),
        (torch.full((1, 4), -1), f"the id -1, and the model knows 0 to {VOCAB - 1}"),
    ],
    ids=["long", "empty", "unknown", "negative"],
)
def test_prompts_that_cannot_be_read_are_refused_with_the_remedy(ids, message):
    """An index error of an embedding names neither the id nor the tokenizer; on a GPU it ends the process."""
    student = tiny_student()
    with pytest.raises(ValueError, match=message):
        _generate(student, ids)
    if ids.shape[1] < 8000:
        with pytest.raises(ValueError, match=message):
            student(ids)
        with pytest.raises(ValueError, match=message):
            tiny_autoencoder()(ids)


@DECODERS
def test_an_id_under_the_mask_may_be_any(decoder):
    """A pad token that was added to the tokenizer later has an id that the model does not know."""
    student, ids = tiny_student("regression", decoder), text_batch(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padded, strange = ids.masked_fill(mask == 0, PAD), ids.masked_fill(mask == 0, VOCAB)
    assert torch.equal(student(strange, attention_mask=mask).logits, student(padded, attention_mask=mask).logits)
    made = _generate(student, strange, attention_mask=mask)
    assert torch.equal(made[:, 6:], _generate(student, padded, attention_mask=mask)[:, 6:])


@DECODERS
def test_a_mask_of_another_width_is_refused(decoder):
    """It would be broadcast, cut, or end in an error about shapes inside."""
    student, ids = tiny_student("regression", decoder), text_batch(2, 6)
    for shape in ((2, 7), (2, 5), (1, 6), (2, 1, 6, 6)):
        mask = torch.ones(shape, dtype=torch.long)
        mask[..., 0] = 0
        with pytest.raises(ValueError, match=re.escape(f"shape {shape} does not fit `input_ids` (2, 6)")):
            student(ids, attention_mask=mask)
        if len(shape) == 2:
            with pytest.raises(ValueError, match=re.escape(f"shape {shape} does not fit `input_ids` (2, 6)")):
                _generate(student, ids, attention_mask=mask)
    cache = student(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"\(2, 6\) does not fit `input_ids` \(2, 1\) after 6 tokens in the cache"):
        student(ids[:, :1], attention_mask=torch.ones(2, 6), past_key_values=cache)


@DECODERS
def test_a_text_beyond_a_table_of_positions_is_refused_before_it_is_written(decoder):
    """An index error after minutes names no length, and the text so far is lost."""
    backbone = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=4)
    student = LatentForgeForCausalLM.from_autoencoder(tiny_autoencoder(), backbone, decoder_type=decoder)
    assert _generate(student, text_batch(1, 8), max_new_tokens=12).shape == (1, 20)
    with pytest.raises(ValueError, match="table of positions ends at 4 .16 tokens.: shorten the text, or lower"):
        _generate(student, text_batch(1, 8), max_new_tokens=13)
    with pytest.raises(ValueError, match="A text of 20 tokens has 5 patches"):
        student(text_batch(1, 20))
    cache = student(text_batch(1, 16), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="A text of 20 tokens has 5 patches"):
        student(text_batch(1, 4), past_key_values=cache)


@DECODERS
def test_a_static_cache_with_too_few_slots_is_refused_before_it_is_filled(decoder):
    """`index_copy_` out of bounds, from inside of transformers."""
    student, ids = tiny_student("regression", decoder), text_batch(1, 6)
    config = student.config.backbone_config
    assert _generate(student, ids, past_key_values=StaticCache(config, max_cache_len=4)).shape == (1, 17)
    with pytest.raises(ValueError, match="fills 4 slots, one a patch of 4, and the static cache has 3: pass one with"):
        _generate(student, ids, past_key_values=StaticCache(config, max_cache_len=3))
    with pytest.raises(ValueError, match="fills 2 slots, one a patch of 4, and the static cache has 1"):
        student(text_batch(1, 8), past_key_values=StaticCache(config, max_cache_len=1))


@DECODERS
def test_guidance_weighs_the_text_without_its_prompt(decoder):
    """The stock processor runs the model a second time, from the prompt's last token on: with a grid of its own."""
    student, ids = tiny_student("regression", decoder), text_batch(1, 8)
    options = {"return_dict_in_generate": True, "output_scores": True}
    made = _generate(student, ids, guidance_scale=1.5, max_new_tokens=6, **options)
    for step, scores in enumerate(made.scores):
        so_far = made.sequences[:, : 8 + step]
        offsets = {} if decoder == "autoregressive" else {"patch_offset": 0}
        given = student(so_far, **offsets).logits[:, -1].log_softmax(-1)
        offsets = {} if decoder == "autoregressive" else {"patch_offset": 3}
        alone = student(so_far[:, 7:], **offsets).logits[:, -1].log_softmax(-1)
        torch.testing.assert_close(scores, alone + 1.5 * (given - alone), rtol=0, atol=1e-4)


def test_drafts_into_a_static_cache_are_refused():
    """transformers goes back in no static cache."""
    with pytest.raises(ValueError, match="assisted generate is not supported with Static cache"):
        _generate(tiny_student(), text_batch(1, 6), prompt_lookup_num_tokens=3, cache_implementation="static")


# -- loading


@pytest.mark.parametrize("cls", [tiny_autoencoder, tiny_student])
def test_a_damaged_file_is_named(cls, tmp_path):
    """A download that was cut off looks like a broken library."""
    cls().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20000])
    with pytest.raises(ValueError, match=f"The weights in {tmp_path} are damaged, most likely cut off"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("field, value", [("vocab_size", 100), ("patch_size", 8)])
def test_a_codec_that_disagrees_with_the_weights_is_refused(folder, field, value):
    """Half-random weights write fluent nonsense."""
    config = json.loads((folder / "config.json").read_text())
    config["autoencoder_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{folder} have other shapes than its config says"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("part, field", [("backbone_config", "num_hidden_layers"), ("head_config", "num_layers")])
def test_weights_without_a_place_are_refused(folder, part, field):
    """Of a config with fewer layers than the checkpoint, half a model would load, with a warning."""
    config = json.loads((folder / "config.json").read_text())
    config[part][field] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weights that its config has no place for, .* the config was edited"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_part_of_a_student_loads_from_the_whole(folder):
    """Its other weights are none too many."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    part = LatentForgeModel.from_pretrained(folder)
    assert all(
        torch.equal(x, y) for x, y in zip(part.state_dict().values(), whole.model.state_dict().values(), strict=True)
    )


def test_a_misspelt_field_is_refused_in_code_and_in_a_file(folder):
    """transformers keeps unknown keys, and the field keeps its default."""
    config = json.loads((folder / "config.json").read_text())
    for part, name, meant in (
        (None, "decoder_windw", "decoder_window"),
        ("autoencoder_config", "latent_sise", "latent_size"),
        ("head_config", "num_sample", "num_samples"),
    ):
        wrong = json.loads(json.dumps(config))
        (wrong[part] if part else wrong)[name] = 3
        (folder / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=re.escape(f"`{name}` (value 3): did you mean `{meant}`?")):
            AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="did you mean `decoder_type`"):
        LatentForgeConfig(decoder_typ="parallel")
    with pytest.raises(ValueError, match="no field `window` .value 3.: did you mean `decoder_window`"):
        LatentForgeConfig(window=3)
    with pytest.raises(ValueError, match=re.escape("is a field of `head_config`: pass head_config={'head_type': ")):
        LatentForgeConfig(head_type="energy")
    with pytest.raises(ValueError, match="`hidden_size` .64. is a field of `backbone_config`"):
        LatentForgeConfig(hidden_size=64)
    with pytest.raises(ValueError, match="no field `kl` .value 1.: did you mean `kl_weight`"):
        LatentForgeAutoencoderConfig(kl=1)
    assert LatentForgeConfig(note_of_mine="kept").note_of_mine == "kept"
    assert LatentForgeConfig(eot_token_id=3).eot_token_id == 3  # near `eos_token_id`, and meant
    with pytest.raises(ValueError, match="`patch_size` .16. is a field of `autoencoder_config`"):
        LatentForgeConfig(patch_size=16)
    with pytest.raises(StrictDataclassClassValidationError, match="`decoder_num_heads` must be at least 1, got 0"):
        LatentForgeConfig(decoder_num_heads=0)


def test_students_do_not_write_into_a_config_they_share():
    """The second would get the first one's sizes."""
    head = LatentHeadConfig()
    small, large = ({"hidden_size": size, "num_attention_heads": 2, "intermediate_size": 64} for size in (32, 64))
    widths = [
        LatentForgeConfig(backbone_config=backbone, head_config=head).head_config.intermediate_size
        for backbone in (small, large)
    ]
    assert widths == [64, 128] and head.intermediate_size is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_backbone_takes_attention_dtype_and_device_map(folder, attention):
    """The three arguments that everybody passes."""
    student = AutoModelForCausalLM.from_pretrained(
        folder, dtype="bfloat16", device_map="cpu", attn_implementation=attention
    )
    assert student.model.backbone.config._attn_implementation == attention
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert _generate(student, text_batch(2, 6)).shape == (2, 17)


def test_weights_are_safetensors_only(folder):
    """A pickle runs code when it is opened."""
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt")) and (folder / "model.safetensors").exists()


def test_configs_hold_no_paths(folder):
    """The folders of the machine that trained would stand on the Hub."""
    tiny_autoencoder().save_pretrained(folder / "codec")
    codec = AutoModel.from_pretrained(folder / "codec")
    backbone = AutoModelForCausalLM.from_pretrained(folder).config.backbone_config
    LatentForgeForCausalLM.from_autoencoder(codec, backbone, decoder_num_heads=2).save_pretrained(folder / "student")
    for path in folder.rglob("*.json"):
        assert str(folder) not in path.read_text(), path


# -- pipelines


def test_text_generation_pipeline(folder):
    """The first line that most people try."""
    pipe = pipeline("text-generation", model=str(folder))
    prompts = ["The ferry leaves", "On Thursdays there is also a goat"]
    together = pipe(prompts, batch_size=2, return_full_text=False, max_new_tokens=9, do_sample=False)
    for prompt, (record,) in zip(prompts, together, strict=True):
        (alone,) = pipe(prompt, return_full_text=False, max_new_tokens=9, do_sample=False)
        assert alone["generated_text"] == record["generated_text"]


def test_a_chat_goes_through_its_template(folder):
    """A chat that is joined without its template is another text."""
    pipe = pipeline("text-generation", model=str(folder))
    turn = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    pipe.tokenizer.chat_template = turn + "{% if add_generation_prompt %}<assistant>{% endif %}"
    messages = [{"role": "user", "content": "Where is the goat?"}]
    (answer,) = pipe(messages, max_new_tokens=9, do_sample=False)
    (text,) = pipe("<user>Where is the goat?\n<assistant>", return_full_text=False, max_new_tokens=9, do_sample=False)
    assert answer["generated_text"][-1] == {"role": "assistant", "content": text["generated_text"]}


def test_feature_extraction_pipeline_gives_latents(tmp_path):
    """`model_outputs[0]` is what the pipeline returns: of logits nobody would notice but by their width."""
    codec, tokenizer = tiny_autoencoder(), byte_tokenizer()
    codec.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "Whoever wants a seat by the wind"
    features = pipeline("feature-extraction", model=str(tmp_path))(text, return_tensors=True)
    expected = codec.encode(tokenizer(text, return_tensors="pt").input_ids).mean
    assert features.shape == (1, len(text) // 4, 16)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


def test_feature_extraction_takes_texts_of_any_length(tmp_path):
    """Few texts are whole patches: the last one is filled up, as a text's end was in training."""
    codec, tokenizer = tiny_autoencoder(), byte_tokenizer()
    codec.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    features = pipeline("feature-extraction", model=str(tmp_path))("The ferry leaves on", return_tensors=True)
    ids = tokenizer("The ferry leaves on", return_tensors="pt").input_ids  # 19
    filled = torch.nn.functional.pad(ids, (0, 1), value=codec.config.pad_token_id)
    torch.testing.assert_close(features, codec.encode(filled).mean, rtol=0, atol=1e-6)
    assert codec(ids).logits.shape[1] == 19
    with pytest.raises(ValueError, match="19 tokens are no multiple of `patch_size` .4.. Pad the text"):
        codec(ids, labels=ids)
    codec.config.pad_token_id, codec.config.eos_token_id = None, [7, 9]
    filled[0, -1] = 7
    torch.testing.assert_close(codec(ids).last_hidden_state, codec.encode(filled).mean, rtol=0, atol=1e-6)
    codec.config.eos_token_id = None
    with pytest.raises(ValueError, match="19 tokens are no multiple"):
        codec(ids)


# -- adapters


def test_lora_on_the_backbone_saves_loads_and_merges(folder, tmp_path):
    """An adapter that merges into another model, or loads as nothing, is silent."""
    base, ids = AutoModelForCausalLM.from_pretrained(folder), text_batch(2, 9)
    plain = _generate(base, ids)
    lora = peft.LoraConfig(r=2, target_modules=r"model\.backbone\..*\.(q_proj|v_proj)", init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora).eval()
    assert all("backbone" in name for name, p in adapted.named_parameters() if p.requires_grad)
    made = _generate(adapted, ids)
    assert not torch.equal(made, plain)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(_generate(again, ids), made)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(reloaded(ids).logits, merged(ids).logits)
    by_adapter = AutoModelForCausalLM.from_pretrained(
        tmp_path / "adapter"
    )  # the card of an adapter on the Hub says so
    assert torch.equal(_generate(by_adapter.eval(), ids), made)
