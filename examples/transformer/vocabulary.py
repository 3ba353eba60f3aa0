"""Subword vocabularies: byte pair encoding by the `tokenizers` library.

One vocabulary serves both languages, so that they can share an embedding. It is
made of the bytes of the training text and of the pairs that are merged: no
character is too rare for it, and decoding gives the text back, spaces and all.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Token ids that every vocabulary begins with.
PADDING, UNKNOWN, START, END = range(4)
_SPECIAL = ["[PADDING]", "[UNKNOWN]", "[START]", "[END]"]


def trained(texts, *, size):
    """Returns the vocabulary of some texts.

    Args:
        texts: iterable of str.
        size: int, number of tokens at most, those that are no text included.

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
    # With a space before the first word, a word is the same wherever it stands.
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
    """Returns the token ids of each text, `END` the last of them."""
    return [
        [*encoding.ids, END] for encoding in tokenizer.encode_batch_fast(texts)
    ]


def decoded(tokenizer, ids):
    """Returns the text of each sequence of token ids."""
    return [
        text.strip() for text in tokenizer.decode_batch([list(i) for i in ids])
    ]
