"""What generation needs beyond transformers' own loop.

The loop is stock: `forward` with a [`LatentForgeCache`] takes and predicts tokens like any causal LM and runs the
backbone once per patch, so processors, stopping criteria and streamers work unchanged.
"""

import torch
from transformers.generation import GenerationMixin

from .cache_latentforge import LatentForgeCache
from .modeling_autoencoder import check_token_ids


class LatentGenerationMixin(GenerationMixin):
    """`generate()` for students. Hooks `_sample`, `_prepare_cache_for_generation` (private in transformers: setup.cfg
    bounds the version)."""

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        user_cache = model_kwargs.get("past_key_values")
        # LatentForge specific: the backbone's cache counts patches. Rows of a padded batch complete theirs at
        # different tokens, and each time takes a slot of all rows: then only the tokens bound their number.
        if batch_size == 1 or self.config.decoder_type == "parallel":
            max_cache_length = -(-int(max_cache_length) // self.config.patch_size) + 1
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if cache is not None and user_cache is None:
            cache = model_kwargs["past_key_values"] = LatentForgeCache(cache)
            if generation_config.is_assistant:
                cache.activate_past_recording()  # before this wrapper there was only the backbone's
        return result

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        kwargs = self._with_grid(input_ids, generation_config, kwargs)
        return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _beam_search(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        kwargs = self._with_grid(input_ids, generation_config, kwargs)
        return super()._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        kwargs = self._with_grid(input_ids, generation_config, kwargs)
        return super()._assisted_decoding(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        # LatentForge specific: another model knows no grid, and a student lays its own
        model_kwargs = {name: x for name, x in model_kwargs.items() if name not in ("patch_offset", "sample_noise")}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _with_grid(self, input_ids, generation_config, kwargs: dict) -> dict:
        """LatentForge specific: what `forward` must be told at every token of one `generate`."""
        check_token_ids(input_ids, self.config.vocab_size)
        backbone_limit = getattr(self.config.backbone_config, "max_position_embeddings", None)
        if backbone_limit and input_ids.shape[1] > backbone_limit * self.config.patch_size:
            raise ValueError(
                f"The prompt has {input_ids.shape[1]} tokens, the model reads at most {backbone_limit} patches of "
                f"{self.config.patch_size}, {backbone_limit * self.config.patch_size} tokens: shorten the prompt."
            )
        kwargs = dict(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
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
        if kwargs["sample_noise"] and self.head.noise_size and not kwargs.get("use_cache", True):
            raise ValueError(
                "Sampling from an energy head needs the cache: without it every token of a patch would be "
                "decoded from another latent. Leave `use_cache` on, or set `do_sample=False`."
            )
        return kwargs

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
