"""What generation needs beyond transformers' own loop.

The loop is stock: `forward` with a [`LatentForgeCache`] takes and predicts tokens like any causal LM and runs the
backbone once per patch, so processors, stopping criteria and streamers work unchanged.
"""

import torch
from transformers.generation import GenerationConfig, GenerationMixin, StoppingCriteriaList

from .cache_latentforge import LatentForgeCache
from .configuration_autoencoder import nearest_name
from .latent_sampling import PatchSampling, check_patch_options, check_patch_sampling
from .modeling_autoencoder import check_mask, check_token_ids


# entries of a GenerationConfig that transformers does not know, and their defaults
PATCH_OPTIONS = {"patch_temperature": None, "patch_sampling": "exact", "max_draws": 256}
# a patch that is sampled whole leaves these nothing to choose from; the value that stock transformers takes for "off"
TOKEN_OPTIONS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "guidance_scale": 1.0,
}


class RememberedCriteria(StoppingCriteriaList):
    """Stopping criteria that keep which rows `(B,)` they ended."""

    rows: torch.Tensor | None = None

    def __call__(self, input_ids, scores, **kwargs):
        ended = super().__call__(input_ids, scores, **kwargs)
        self.rows = ended if self.rows is None else self.rows | ended
        return ended


class LatentGenerationMixin(GenerationMixin):
    """`generate()` for students. Hooks `_sample`, `_prepare_generation_config`, `_prepare_cache_for_generation`
    (private in transformers: setup.cfg bounds the version).

    An aligned head's noise chooses the tokens: `do_sample=True` with `top_p` keeps it below p, `do_sample=False` sets
    it to zero, and every other option that reshapes probabilities is refused.

    An energy head with a parallel decoder gives patches a distribution P(x) that no temperature on tokens sharpens.
    For it `generate`, and a GenerationConfig, take three more options:

        patch_temperature: T in (0, 1]; whole patches are drawn from P(x)^(1/T). None, the default: token by token from
            the softmaxes of one latent, with the options of tokens.
        patch_sampling: `exact`, or `batched`, nearly so and bounded; see `latent_sampling.py`.
        max_draws: latents per patch at most, 256; `exact` then chooses like `batched`.

    The loop, streamers and stopping criteria then see logits that are sure of the sampled patch: a score says which
    token was taken and is no probability of the model. Processors that forbid tokens still do.
    """

    def _prepare_generation_config(self, generation_config, *args, **kwargs):
        own = {} if generation_config is None else vars(generation_config)
        # an entry that is there says something, also None: "off", whatever the model's own config stores. A draft's
        # config is made of the other model's
        is_draft = bool(own.get("is_assistant"))
        given = {name: own[name] for name in PATCH_OPTIONS if name in own and not is_draft}
        given |= {name: kwargs.pop(name) for name in PATCH_OPTIONS if name in kwargs}
        top_k = [kwargs.get("top_k"), own.get("top_k"), self.generation_config.top_k]
        result, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        for name in set(vars(result)) - set(vars(GenerationConfig())) - set(PATCH_OPTIONS):
            meant = nearest_name(name, PATCH_OPTIONS)
            if meant:
                raise ValueError(
                    f"The generation config has no entry `{name}` (value {getattr(result, name)!r}): did you mean "
                    f"`{meant}`?"
                )
        for name, default in PATCH_OPTIONS.items():
            stored = getattr(self.generation_config, name, None)
            value = given.get(name, stored)
            setattr(result, name, default if value is None else value)
        if result.patch_temperature is not None:
            # transformers fills in 50 where nobody asked
            result.top_k = next((value for value in top_k if value is not None), 0)
        if self.is_aligned:
            result.top_k = next((value for value in top_k if value is not None), 0)
        check_patch_options(result.patch_sampling, result.max_draws)
        return result, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        # LatentForge specific: the backbone's cache counts patches. Rows of a padded batch complete theirs at
        # different tokens, and each time takes a slot of all rows: then only the tokens bound their number.
        if batch_size == 1 or self.config.decoder_type == "parallel":
            max_cache_length = -(-int(max_cache_length) // self.config.patch_size) + 1
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache = model_kwargs["past_key_values"] = self._as_latentforge_cache(cache)
            if generation_config.is_assistant:
                cache.activate_past_recording()  # before this wrapper there was only the backbone's
        return result

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, tokenizer=None, **kwargs):
        # `tokenizer` (of `stop_strings`) is named: stock hands on to `forward` what a signature does not name
        kwargs = self._with_grid(input_ids, generation_config, kwargs)
        # without EOS the stock loop goes on writing rows that ended
        if kwargs.get("patch_sampling") is not None and any(hasattr(x, "eos_token_id") for x in stopping_criteria):
            stopping_criteria = criteria = RememberedCriteria(stopping_criteria)
            kwargs["patch_sampling"] = kwargs["patch_sampling"]._replace(ended=lambda: criteria.rows)
        return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _beam_search(
        self, input_ids, logits_processor, stopping_criteria, generation_config, tokenizer=None, **kwargs
    ):
        kwargs = self._with_grid(input_ids, generation_config, kwargs)
        return super()._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        kwargs = self._with_grid(input_ids, generation_config, kwargs)
        if kwargs.get("patch_sampling") is not None:
            raise ValueError(
                f"`patch_temperature` ({kwargs['patch_sampling'].temperature}) samples whole patches whose "
                "probability is not known, which the test of a draft needs: drop the draft, or pass "
                "`patch_temperature=None`."
            )
        result = super()._assisted_decoding(
            input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
        )
        kwargs["past_key_values"].stop_recording()  # it may be returned, and read on from without drafts
        return result

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        # LatentForge specific: another model knows no grid, and a student lays its own
        model_kwargs = {name: x for name, x in model_kwargs.items() if name not in ("patch_offset", "sample_noise")}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _with_grid(self, input_ids, generation_config, kwargs: dict) -> dict:
        """LatentForge specific: what `forward` must be told at every token of one `generate`."""
        mask = kwargs.get("attention_mask")
        if mask is not None:
            check_mask(mask, input_ids)
        # an id under the mask may be any: nothing reads it
        check_token_ids(input_ids if mask is None else input_ids.masked_fill(mask == 0, 0), self.config.vocab_size)
        patch_size = self.config.patch_size
        backbone_limit = getattr(self.config.backbone_config, "max_position_embeddings", None)
        if backbone_limit and input_ids.shape[1] > backbone_limit * patch_size:
            raise ValueError(
                f"The prompt has {input_ids.shape[1]} tokens, the model reads at most {backbone_limit} patches of "
                f"{patch_size}, {backbone_limit * patch_size} tokens: shorten the prompt."
            )
        read = generation_config.max_length - 1  # tokens; the last one is never read
        if self.config.decoder_type == "parallel":
            read += -input_ids.shape[1] % patch_size
        self._check_context(read)
        self._check_slots(kwargs.get("past_key_values"), read)
        kwargs = dict(kwargs)
        if mask is not None:
            empty = [row for row, tokens in enumerate(mask[:, : input_ids.shape[1]].sum(1).tolist()) if not tokens]
            if empty:
                raise ValueError(
                    f"Rows {empty} of the prompts hold nothing but padding: give each at least one token, EOS to "
                    "start a new text."
                )
        # the grid of a parallel decoder ends at the prompt's end and must not move while the text grows
        if self.config.decoder_type == "parallel" and kwargs.get("patch_offset") is None:
            kwargs["patch_offset"] = -input_ids.shape[1] % self.config.patch_size
        if kwargs.get("sample_noise") is None:
            kwargs["sample_noise"] = bool(generation_config.do_sample)
            if self.is_aligned and generation_config.do_sample:
                kwargs["sample_noise"] = self._noise_below(generation_config)
        if kwargs["sample_noise"] and self.head.noise_size and not kwargs.get("use_cache", True):
            raise ValueError(
                "Sampling from a head that reads noise needs the cache: without it every token of a patch would be "
                "decoded from another latent. Leave `use_cache` on, or set `do_sample=False`."
            )
        if getattr(generation_config, "patch_temperature", None) is not None:
            kwargs["patch_sampling"] = self._patch_sampling(input_ids, generation_config, kwargs)
        return kwargs

    def _noise_below(self, generation_config) -> float:
        """LatentForge specific: `top_p`, which an aligned head's noise stays below."""
        for name, neutral in TOKEN_OPTIONS.items():
            value = getattr(generation_config, name, None)
            if name != "top_p" and value is not None and value != neutral:
                raise ValueError(
                    f"`{name}` ({value}) reshapes probabilities of tokens, and an aligned head's noise chooses whole "
                    f"patches: use `top_p`, or `do_sample=False` for greedy, and set `{name}` to {neutral}."
                )
        top_p = 1.0 if generation_config.top_p is None else float(generation_config.top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], got {top_p}: `do_sample=False` is greedy.")
        return top_p

    def _patch_sampling(self, input_ids, generation_config, kwargs: dict) -> PatchSampling:
        """LatentForge specific: what `patch_temperature` asks for. Raises ValueError where it cannot be had."""
        temperature = generation_config.patch_temperature
        sampling = PatchSampling(temperature, generation_config.patch_sampling, generation_config.max_draws)
        asked = f"`patch_temperature` ({temperature}) "
        off = ", or pass `patch_temperature=None`."
        if self.config.decoder_type != "parallel":
            raise ValueError(
                f"{asked}is for parallel decoders. This one is autoregressive and knows every token's probability: "
                "use `temperature`, `top_k`, `top_p`, which are exact."
            )
        if self.is_aligned:
            raise ValueError(f"{asked}is for energy heads. An aligned head's noise takes `top_p`{off}")
        if not self.head.noise_size:
            raise ValueError(
                f"{asked}is for energy heads. With this regression head the tokens of a patch are independent given "
                "its latent: `temperature`, `top_k`, `top_p` and greedy apply to each token exactly."
            )
        check_patch_sampling(*sampling[:3])
        if not generation_config.do_sample:
            raise ValueError(f"{asked}samples, and `do_sample` is False: set `do_sample=True`{off}")
        if generation_config.is_assistant:
            raise ValueError(
                f"{asked}gives no distribution of the draft, which the test of a drafted sample needs: set it to None "
                "in the draft's `generation_config`."
            )
        if generation_config.num_beams not in (None, 1):
            raise ValueError(
                f"{asked}samples one patch, and `num_beams` is {generation_config.num_beams}: set it to 1{off}"
            )
        for name, neutral in TOKEN_OPTIONS.items():
            value = getattr(generation_config, name, None)
            if value is not None and value != neutral:
                raise ValueError(
                    f"{asked}chooses whole patches and leaves `{name}` ({value}) nothing to choose: drop "
                    f"the latter ({neutral} where it is stored){off}"
                )
        cache, places = kwargs.get("past_key_values"), input_ids.shape[1] + kwargs["patch_offset"]
        if isinstance(cache, LatentForgeCache) and cache.seq_length:
            places = cache.lengths[0] + input_ids.shape[1] - cache.seq_length
        if places % self.config.patch_size:
            raise ValueError(
                f"{asked}chooses whole patches, and the prompt ends after {places % self.config.patch_size} of the "
                f"{self.config.patch_size} tokens of one: leave `patch_offset` and `past_key_values` out{off}"
            )
        return sampling

    def init_continuous_batching(self, *args, **kwargs):
        # a paged cache knows tokens only; the stock worker would log an error and return the bare prompts
        raise ValueError(
            "Continuous batching (`generate_batch`, `cache_implementation='paged'`, `transformers serve "
            "--continuous-batching`) pages a cache of tokens; this model's counts patches. Call `generate` on a "
            "left-padded batch."
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        """The new tokens and what `forward` knows; `position_ids` count tokens, the backbone's positions are patches.

        The stock method inspects `forward`'s signature at every token, a tenth of a small student's time (measured).
        """
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
