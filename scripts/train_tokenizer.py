"""Train a byte-level BPE tokenizer on any corpus.

    python scripts/train_tokenizer.py --data builtin:python --output_dir checkpoints/tokenizer
    python scripts/train_tokenizer.py --data my_books/ --vocab_size 8192 --output_dir checkpoints/tokenizer

Specials: <|endoftext|> (ends and begins documents) and <|pad|>. Every text round-trips: decode(encode(text)) == text.
`AutoTokenizer.from_pretrained` loads the directory. Prints the vocabulary's size and the bytes per token on held-out
text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class TokenizerArguments:
    """What is trained, and where it goes."""

    output_dir: str = field(metadata={"help": "Folder of the tokenizer."})
    vocab_size: int = field(default=4096, metadata={"help": "Entries, the two special ones and 256 bytes included."})
    max_characters: int | None = field(
        default=None, metadata={"help": "Learn from the first so many characters (about)."}
    )

    def __post_init__(self) -> None:
        from trainers.tokenizer import check_vocab_size

        check_vocab_size(self.vocab_size)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, train, save, measure; returns `vocab_size` and `bytes_per_token`."""
    from trainers.arguments import parse_arguments
    from trainers.command_line import check_writable
    from trainers.data import DataArguments, load_texts
    from trainers.tokenizer import first_texts, train_tokenizer

    arguments, data_args = parse_arguments(TokenizerArguments, DataArguments, argv=argv, description=__doc__)
    check_writable(arguments.output_dir)
    train, held_out = load_texts(data_args)

    tokenizer = train_tokenizer(train, arguments.vocab_size, arguments.max_characters)
    tokenizer.save_pretrained(arguments.output_dir)

    texts = list(first_texts(held_out, 2_000_000))
    num_tokens = sum(len(encoding) for encoding in tokenizer(texts, add_special_tokens=False)["input_ids"])
    result = {
        "vocab_size": len(tokenizer),
        "bytes_per_token": sum(len(text.encode()) for text in texts) / num_tokens,
    }
    bytes_per_token = f"{result['bytes_per_token']:.3f} bytes per token on held-out text"
    print(f"{arguments.output_dir}: {len(tokenizer)} entries, {bytes_per_token}")
    if len(tokenizer) < arguments.vocab_size:
        print(f"fewer than --vocab_size {arguments.vocab_size}: the text has no more pairs to merge")
    return result


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
