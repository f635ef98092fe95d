"""Whole patches at a temperature, judged where all patches can be counted: three ids, two or three to a patch."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, WatermarkingConfig

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM
from modeling_latentforge.latent_sampling import (
    SAMPLERS,
    draw_tokens,
    log_falling_factorial,
    sample_batched,
    sample_exact,
)
from tests.conftest import PAD, text_batch, tiny_student
from trainers.evaluation.latent_sampling import sampler_named


FORMS = pytest.mark.parametrize("form", SAMPLERS)
PATCHES = torch.cartesian_prod(*[torch.arange(3)] * 3)
ROWS = 4000
# what the batched form's docstring promises, in total variation
BATCHED_BIAS = 0.02


def _zipf(size: int = 27, power: float = 1.0) -> torch.Tensor:
    weights = torch.arange(1, size + 1).double() ** -power
    return weights / weights.sum()


def _draw_from(probabilities: torch.Tensor):
    """`(R, 27)` or `(27,)` -> a `draw`."""
    table = probabilities.float().expand(ROWS, -1) if probabilities.dim() == 1 else probabilities.float()

    def draw(rows, count):
        return PATCHES[torch.multinomial(table[rows], count, replacement=True)]

    return draw


def _frequencies(ids: torch.Tensor, base: int = 3) -> torch.Tensor:
    places = base ** torch.arange(ids.shape[1] - 1, -1, -1)
    return torch.bincount((ids * places).sum(1), minlength=base ** ids.shape[1]).double() / len(ids)


def _sharpened(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    return probabilities ** (1 / temperature) / (probabilities ** (1 / temperature)).sum()


def _excess(frequencies: torch.Tensor, exact: torch.Tensor, rows: int) -> float:
    """Total variation less what a perfect sampler of so many rows has with three standard deviations."""
    floor = (torch.distributions.Multinomial(rows, exact).sample((300,)) / rows - exact).abs().sum(1) / 2
    return float((frequencies - exact).abs().sum() / 2 - floor.mean() - 3 * floor.std())


@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.5, 0.4, 0.25])
def test_the_exact_form_has_no_error_but_sampling(temperature):
    """A coin that is off by one toss gives text that is a little too wild, and nobody can tell."""
    exact = _sharpened(_zipf(), temperature)
    sample = sample_exact(_draw_from(_zipf()), ROWS, temperature, max_draws=100_000)
    assert sample.met.all()
    assert _excess(_frequencies(sample.ids), exact, ROWS) < 0
    if temperature < 1:
        assert _excess(_frequencies(sample.ids), _zipf(), ROWS) > 0.02  # the test can tell


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.5, 0.4, 0.25])
def test_the_batched_form_keeps_to_the_bias_it_states(temperature, power):
    """An approximation without a bound is a different model."""
    probabilities = _zipf(power=power)
    sample = sample_batched(_draw_from(probabilities), ROWS, temperature, max_draws=4096)
    assert sample.met.all()
    assert _excess(_frequencies(sample.ids), _sharpened(probabilities, temperature), ROWS) < BATCHED_BIAS


@FORMS
def test_temperature_one_is_one_plain_draw(form):
    """Whoever leaves the temperature at 1 must not pay for it."""
    torch.manual_seed(3)
    sample = SAMPLERS[form](_draw_from(_zipf()), ROWS, 1.0, max_draws=64)
    torch.manual_seed(3)
    plain = _draw_from(_zipf())(torch.arange(ROWS), 1)[:, 0]
    assert torch.equal(sample.ids, plain) and (sample.draws == 1).all()


@FORMS
def test_a_row_is_independent_of_its_neighbours(form):
    """A batch shares blocks of draws: an easy row must not end, and a hard one not prolong, another's."""
    table = _zipf().expand(ROWS, -1).clone()
    table[1::2] = 0
    table[1::2, 5] = 1  # every second row knows one patch
    sample = SAMPLERS[form](_draw_from(table), ROWS, 0.5, max_draws=100_000)
    assert (sample.ids[1::2] == PATCHES[5]).all()
    bias = 0 if form == "exact" else BATCHED_BIAS
    assert _excess(_frequencies(sample.ids[::2]), _sharpened(_zipf(), 0.5), ROWS // 2) < bias
    assert sample.draws[1::2].float().mean() < sample.draws[::2].float().mean()


@FORMS
@pytest.mark.parametrize("temperature, max_draws", [(0.5, 11), (0.25, 30), (0.7, 9)])
def test_max_draws_holds_and_the_fallback_still_sharpens(form, temperature, max_draws):
    """At real entropies nothing repeats: a server must not wait for what never comes."""
    flat = _zipf(power=0.3)
    seen = torch.zeros(ROWS, dtype=torch.long)

    def draw(rows, count):
        seen[rows] += count
        return _draw_from(flat)(rows, count)

    sample = SAMPLERS[form](draw, ROWS, temperature, max_draws)
    assert torch.equal(sample.draws, seen) and seen.max() == max_draws
    assert not sample.met.all() and (sample.draws[~sample.met] == max_draws).all()
    before, after = (float((x**2).sum()) for x in (flat, _frequencies(sample.ids)))
    assert after > before


def test_where_nothing_repeats_the_fallback_takes_a_draw():
    """CALM's last resort, n = 1."""
    sample = sample_batched(lambda rows, count: torch.randint(10**6, (len(rows), count, 3)), 5, 0.25, max_draws=20)
    assert sample.ids.shape == (5, 3) and not sample.met.any()


def test_the_weights_are_the_tuples_that_agree():
    """C(c, n) times n!, also between whole numbers."""
    counts = torch.arange(1, 7)
    torch.testing.assert_close(
        log_falling_factorial(counts, 2.0).exp(), (counts * (counts - 1)).double(), rtol=1e-12, atol=1e-12
    )
    between = log_falling_factorial(counts, 1.5).exp()
    assert (between[1:] > counts[1:]).all() and (between[1:] < (counts * (counts - 1))[1:] + 1).all()


def test_a_token_of_each_softmax_from_one_number():
    """A token of probability zero, or a tail that is cut, would be silent."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -torch.inf]])
    drawn = torch.bincount(draw_tokens(logits.expand(20_000, -1)), minlength=5) / 20_000
    torch.testing.assert_close(drawn, logits.softmax(-1)[0], rtol=0, atol=0.015)
    assert drawn[2] == drawn[4] == 0


# -- a student


PROMPT = torch.tensor([[0, 2, 1, 1, 2, 0, 1]])


@cache
def _counted(patch_size: int) -> tuple[LatentForgeForCausalLM, torch.Tensor]:
    """A student with energy head, parallel decoder and three ids, and the distribution of the patch after PROMPT."""
    torch.manual_seed(4)
    sizes = {"vocab_size": 3, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.5}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    codec = LatentForgeAutoencoder(LatentForgeAutoencoderConfig(**sizes, **ids, patch_size=patch_size, latent_size=4))
    backbone = LlamaConfig(**sizes, **ids, num_hidden_layers=1, num_attention_heads=2)
    head = {"head_type": "energy", "noise_size": 8}
    student = LatentForgeForCausalLM.from_autoencoder(
        codec, backbone, head_config=head, decoder_type="parallel", initializer_range=0.5
    ).eval()
    with torch.no_grad():
        student.head.from_noise.weight.mul_(8)  # the noise must matter, or tokens were independent
    return student, _patch_distribution(student, PROMPT)


@torch.no_grad()
def _patch_distribution(student, prompt, draws: int = 100_000) -> torch.Tensor:
    """`(3^K,)`, the mean over noise of the products of softmaxes."""
    conditions = []
    hook = student.model.register_forward_hook(lambda module, args, output: conditions.append(output[:, -1]))
    student(prompt)
    hook.remove()
    source = student.draws(conditions[0])
    softmaxes = source.logits(source.start(torch.zeros(1, dtype=torch.long), draws)[0]).double().softmax(-1)
    patches = torch.cartesian_prod(*[torch.arange(3)] * student.config.patch_size)
    return torch.stack([softmaxes[:, k, patches[:, k]] for k in range(patches.shape[1])]).prod(0).mean(0)


@FORMS
@pytest.mark.parametrize("patch_size, temperature", [(2, 0.5), (3, 0.5), (3, 0.8), (3, 0.3)])
def test_generated_patches_have_the_students_sharpened_distribution(form, patch_size, temperature):
    """Draws whose tokens are chosen late, and in part, must still be draws of whole patches."""
    student, probabilities = _counted(patch_size)
    made = student.generate(
        PROMPT.expand(ROWS // 2, -1),
        do_sample=True,
        max_new_tokens=patch_size,
        patch_temperature=temperature,
        patch_sampling=form,
        max_draws=4000,
    )[:, 7:]
    exact = _sharpened(probabilities, temperature)
    assert _excess(_frequencies(made), exact, ROWS // 2) < (0 if form == "exact" else BATCHED_BIAS)
    assert _excess(_frequencies(made), probabilities, ROWS // 2) > 0.02  # the test can tell


def _generate(student, ids, **kwargs):
    options = {"do_sample": True, "max_new_tokens": 11, "eos_token_id": None, "pad_token_id": PAD}
    return student.generate(ids, **{**options, "patch_temperature": 0.5, "max_draws": 24, **kwargs})


@FORMS
def test_a_seed_repeats_and_scores_are_sure_of_the_token_taken(form):
    """A patch's probability is not known: what a score means must be one thing."""
    student, ids, made = tiny_student("energy", "parallel"), text_batch(2, 6), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(
            _generate(student, ids, patch_sampling=form, output_scores=True, return_dict_in_generate=True, top_k=0)
        )
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert not torch.equal(made[0].sequences, made[2].sequences)
    scores = student.compute_transition_scores(made[0].sequences, made[0].scores, normalize_logits=True)
    assert (scores == 0).all()


def test_left_padding_does_not_change_a_rows_distribution():
    """A server pads its batches."""
    student, probabilities = _counted(2)
    exact = _sharpened(probabilities, 0.5)
    padded = torch.cat([torch.full((1, 4), 1), PROMPT], 1).expand(ROWS, -1).clone()
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    padded[1::2, :4], mask[1::2] = 2, 1  # neighbours with longer prompts
    made = student.generate(
        padded, attention_mask=mask, do_sample=True, max_new_tokens=2, patch_temperature=0.5, max_draws=4000
    )[:, 11:]
    assert _excess(_frequencies(made[::2]), exact, ROWS // 2) < 0


def test_eos_inside_a_sampled_patch_ends_the_row():
    """Tokens of the patch behind it would reach the user."""
    student, ids = tiny_student("energy", "parallel"), text_batch(2, 6)
    torch.manual_seed(5)
    free = _generate(student, ids)[:, 6:]
    eos = int(free[0, 1])
    torch.manual_seed(5)
    ended = _generate(student, ids, eos_token_id=eos)[:, 6:]
    assert ended[0, 1] == eos and (ended[0, 2:] == PAD).all()


def test_nothing_is_drawn_for_a_row_that_has_ended():
    """It would cost `max_draws` a patch until the longest row of the batch is done."""
    student, ids = tiny_student("energy", "parallel"), text_batch(3, 6)
    torch.manual_seed(5)
    eos = int(_generate(student, ids)[0, 7])
    torch.manual_seed(5)
    with sampler_named("exact", sample_exact) as samples:
        made = _generate(student, ids, eos_token_id=eos)[:, 6:]
    patches = [sum(bool((row[: 4 * n] != eos).all()) for row in made) for n in range(len(samples))]
    assert [len(sample.draws) for sample in samples] == patches and patches[1] < 3


def test_a_forbidden_token_of_a_sampled_patch_is_replaced():
    """All other tokens equally likely would be noise in the middle of a text."""
    student, ids = tiny_student("energy", "parallel"), text_batch(1, 6)
    torch.manual_seed(5)
    first = int(_generate(student, ids)[0, 6])
    torch.manual_seed(5)
    output = _generate(student, ids, suppress_tokens=[first], output_logits=True, return_dict_in_generate=True)
    assert output.sequences[0, 6] != first
    others = output.logits[0][0].sort(descending=True).values
    assert others[0] == 0 and others[1] < -1e4 and others[1] > others[-1]


def test_the_options_travel_with_the_model(tmp_path):
    """transformers drops entries of a generation config that it does not know."""
    student, ids = tiny_student("energy", "parallel"), text_batch(1, 6)
    student.generation_config.update(do_sample=True)
    student.generation_config.patch_temperature = 0.5
    student.generation_config.max_draws = 24
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.generation_config.patch_temperature, again.generation_config.max_draws) == (0.5, 24)
    made = []
    for model in (student, again):
        torch.manual_seed(1)
        made.append(model.generate(ids, max_new_tokens=8))
    own = GenerationConfig(do_sample=True, patch_temperature=0.5, max_draws=24, max_new_tokens=8)
    fresh = tiny_student("energy", "parallel")
    fresh.load_state_dict(student.state_dict())
    torch.manual_seed(1)
    made.append(fresh.generate(ids, generation_config=own))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    greedy = again.generate(ids, max_new_tokens=8, do_sample=False, patch_temperature=None)
    again.save_pretrained(tmp_path)  # and once more
    third = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert third.generation_config.patch_temperature == 0.5
    assert torch.equal(greedy, third.generate(ids, max_new_tokens=8, do_sample=False, patch_temperature=None))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_temperature": 0.0}, r"`patch_temperature` \(0.0\) must be a number in \(0, 1\]"),
        ({"patch_temperature": 1.2}, r"`patch_temperature` \(1.2\) .* sharpened, not flattened"),
        ({"patch_temperature": "0.5"}, r"`patch_temperature` \('0.5'\)"),
        ({"patch_sampling": "exakt"}, r"`patch_sampling` \('exakt'\) must be one of \['batched', 'exact'\]"),
        ({"max_draws": 1}, r"`max_draws` \(1\) must be a whole number of at least 2"),
        ({"do_sample": False}, "`do_sample` is False: set `do_sample=True`, or pass `patch_temperature=None`"),
        ({"num_beams": 2}, "`num_beams` is 2: set it to 1"),
        ({"temperature": 0.7}, r"leaves `temperature` \(0.7\) nothing to choose"),
        ({"top_p": 0.9}, r"leaves `top_p` \(0.9\) nothing to choose"),
        ({"top_k": 50}, r"leaves `top_k` \(50\) nothing to choose: drop the latter \(0 where it is stored\)"),
        ({"top_h": 0.4}, r"leaves `top_h` \(0.4\) nothing to choose"),
        ({"repetition_penalty": 1.2}, r"leaves `repetition_penalty` \(1.2\) nothing to choose"),
        ({"sequence_bias": [[[65], 2.0]]}, r"leaves `sequence_bias` \(.*65.*\) nothing to choose"),
        ({"exponential_decay_length_penalty": (2, 1.1), "eos_token_id": 3}, "leaves `exponential_decay_length"),
        ({"watermarking_config": WatermarkingConfig()}, "leaves `watermarking_config`"),
        ({"guidance_scale": 1.5}, r"leaves `guidance_scale` \(1.5\) nothing to choose"),
        ({"prompt_lookup_num_tokens": 3}, "which the test of a draft needs: drop the draft"),
        ({"patch_offset": 1}, "the prompt ends after 3 of the 4 tokens"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_sampled_says_so(options, message):
    """Each would give text, of another distribution than the one asked for."""
    with pytest.raises(ValueError, match=message):
        _generate(tiny_student("energy", "parallel"), text_batch(1, 6), **options)


def test_a_generation_config_that_says_none_switches_the_stored_value_off():
    """None means unset to transformers, and the stored temperature would come back."""
    student, ids = tiny_student("energy", "parallel"), text_batch(1, 6)
    greedy = student.generate(ids, do_sample=False, max_new_tokens=5)
    student.generation_config.patch_temperature = 0.5
    off = GenerationConfig(patch_temperature=None, do_sample=False, max_new_tokens=5)
    assert torch.equal(greedy, student.generate(ids, generation_config=off))


def test_options_are_checked_where_no_temperature_uses_them():
    """A slip in a stored file is found at its first use, not when somebody sets a temperature."""
    student, ids = tiny_student("energy", "parallel"), text_batch(1, 6)
    with pytest.raises(ValueError, match=r"`patch_sampling` \('exakt'\) must be one of"):
        student.generate(ids, patch_sampling="exakt")
    with pytest.raises(ValueError, match=r"`max_draws` \(0\) must be a whole number of at least 1"):
        student.generate(ids, max_draws=0)
    student.generation_config.patch_temperatur = 0.5
    with pytest.raises(ValueError, match="no entry `patch_temperatur` .value 0.5.: did you mean `patch_temperature`"):
        student.generate(ids)


@pytest.mark.parametrize(
    "head, decoder, message",
    [
        ("regression", "parallel", "independent given its latent: `temperature`, `top_k`, `top_p` and greedy apply"),
        ("regression", "autoregressive", "use `temperature`, `top_k`, `top_p`, which are exact"),
        ("energy", "autoregressive", "use `temperature`, `top_k`, `top_p`, which are exact"),
    ],
)
def test_students_that_need_no_patch_temperature_say_what_to_use(head, decoder, message):
    """There the exact thing costs nothing."""
    with pytest.raises(ValueError, match=message):
        _generate(tiny_student(head, decoder), text_batch(1, 6))


def test_a_draft_may_not_sample_whole_patches():
    """The speculative test divides by the draft's probability."""
    draft, teacher = tiny_student("energy", "parallel"), tiny_student("regression", "autoregressive")
    draft.generation_config.patch_temperature = 0.5
    with pytest.raises(ValueError, match="set it to None in the draft's `generation_config`"):
        teacher.generate(text_batch(1, 6), do_sample=True, max_new_tokens=4, assistant_model=draft)


def test_greedy_and_top_p_act_on_each_token_of_a_regression_heads_patch():
    """With one latent the softmaxes are the model's own: nothing is to be estimated."""
    student, ids = tiny_student("regression", "parallel"), text_batch(1, 8)
    kept = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    greedy = _generate(student, ids, patch_temperature=None, do_sample=False, **kept)
    assert torch.equal(greedy.sequences[0, 8:12], torch.cat(greedy.logits[:4]).argmax(-1))
    sampled = _generate(student, ids, patch_temperature=None, top_p=0.6, top_k=0, **kept)
    for logits, scores in zip(sampled.logits[:4], sampled.scores[:4], strict=True):
        probabilities = logits.softmax(-1)[0].sort(descending=True)
        count = int((probabilities.values.cumsum(0) < 0.6).sum()) + 1
        assert set(scores[0].isfinite().nonzero()[:, 0].tolist()) == set(probabilities.indices[:count].tolist())
