"""Subword vocabularies: byte pair encoding by the `tokenizers` library.

Both languages use one vocabulary, so that they can share an embedding. Its
tokens are bytes of the training text and merged pairs of tokens. It can encode
rare characters, and decoding returns the exact text, including spaces.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# The first token ids of every vocabulary.
PADDING, UNKNOWN, START, END = range(4)
_SPECIAL = ["[PADDING]", "[UNKNOWN]", "[START]", "[END]"]


def trained(texts, *, size):
    """Returns the vocabulary of some texts.

    Args:
        texts: iterable of str.
        size: int, maximum number of tokens, including the special ones.

    Returns:
        `tokenizers.Tokenizer`.

    Example:

    >>> tokenizer = trained(["two two", "two three"], size=13)
    >>> tokenizer.get_vocab_size()
    13
    >>> tokenizer.encode("two three").tokens
    ['Ġt', 'wo', 'Ġt', 'h', 'r', 'e', 'e']
    >>> decoded(tokenizer, [tokenizer.encode("two three").ids])
    ['two three']
    """
    tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL[UNKNOWN]))
    # With a space before the first word, its tokens are those of other words.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=_SPECIAL, show_progress=False
        ),
    )
    return tokenizer


def encoded(tokenizer, texts):
    """Returns the token ids of each text, followed by `END`."""
    return [
        [*encoding.ids, END] for encoding in tokenizer.encode_batch_fast(texts)
    ]


def decoded(tokenizer, ids):
    """Returns the text of each sequence of token ids."""
    return [
        text.strip() for text in tokenizer.decode_batch([list(i) for i in ids])
    ]
