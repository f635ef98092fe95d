"""A byte-level BPE tokenizer for any corpus."""

from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


EOS, PAD = "<|endoftext|>", "<|pad|>"
MIN_VOCAB_SIZE = 258  # 256 bytes and the two specials


def train_tokenizer(pieces: Any, vocab_size: int, max_characters: int | None = None) -> PreTrainedTokenizerFast:
    """Learn `vocab_size` entries; every text round-trips, `decode(encode(text)) == text`.

    Args:
        pieces: a `datasets.Dataset` with a column `text`, as `load_texts` gives.
        vocab_size: entries, the 256 bytes and the specials `<|endoftext|>` (EOS and BOS) and `<|pad|>` included; fewer
            where the text has no more pairs to merge.
        max_characters: learn from the first so many characters (about).

    Raises:
        ValueError: `vocab_size` below 258.
    """
    check_vocab_size(vocab_size)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(first_texts(pieces, max_characters), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=PAD,
        # otherwise decode() takes the spaces before . and , away
        clean_up_tokenization_spaces=False,
    )


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError where there is no room for every byte and the specials."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size ({vocab_size}) is less than 256 bytes and 2 special tokens: take at least {MIN_VOCAB_SIZE}"
        )


def first_texts(pieces: Any, max_characters: int | None) -> Iterator[str]:
    """Texts of a dataset until `max_characters` are reached."""
    seen = 0
    for batch in pieces.iter(batch_size=64):
        for text in batch["text"]:
            yield text
            seen += len(text)
            if max_characters is not None and seen >= max_characters:
                return
