"""Text domains: next-token prediction on one domain of text after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cl_moe.errors import InputError
from cl_moe.stream import Experience, Stream
from tasks.arrange import arrange, finish, whole
from tasks.held_out import held_out_texts
from tasks.sources import available, find, read_parquet
from tasks.tokens import check_tokenizer, tokenizer_of, windows


def text_domains(
    domains: Sequence[str] = ("novels_en", "bible_en", "python_code"),
    context: int = 128,
    train_bytes: int | None = None,
    test_bytes: int | None = None,
    order: Sequence[str] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    shape: Mapping[str, object] | None = None,
    data_seed: int = 0,
    column: str = "text",
    tokenizer: Mapping[str, object] | None = None,
    held_out: Mapping[str, object] | Sequence[str] | None = None,
) -> Stream:
    """One experience per domain: inputs and targets (n, context) int64, target = the next token (byte).

    A domain is a parquet file of that name with columns ``split`` (``train`` or ``validation``) and text. The
    texts of a split follow each other in the file's order, with nothing between them; windows of ``context``
    tokens do not overlap, and every token but the first is predicted exactly once. The last window is padded
    (input 0, target ``IGNORE``).

    Args:
        domains: which, in natural order, each once.
        context: tokens per window, at least 1.
        train_bytes: use only the first so many bytes of each domain's training text, at least 2; null: all
            (1 to 2 million in the bundled files). A limit may split a character: the model sees bytes.
        test_bytes: the same for the validation text (50 to 100 thousand bytes in the bundled files).
        order: the domains in order of arrival, a permutation of ``domains``.
        seed: draws that order; null and no ``order``: as in ``domains``.
        cut: how many shorter experiences each domain is cut into.
        tune_on_first: keep only so many domains, for choosing hyperparameters.
        shape: the shape of time; see ``tasks.shapes.Shape``.
        data_seed: deals windows out to the parts of ``cut``, and draws what ``shape`` draws.
        column: the column that holds the text.
        tokenizer: null: bytes. ``{kind: bpe, vocab_size: 1024}``: byte-pair encoding, trained on the training
            text of the experience that arrives first and on nothing else, so it depends on the order. Losses
            are nats per token, so those of two tokenizers do not compare; ``byte_perplexity`` and
            ``word_perplexity`` do. A character that ``train_bytes`` cuts off is left out.
        held_out: further texts to measure on, never trained on: names of text files (their validation text),
            or ``{name: {path: ...}}``; see ``tasks.held_out.Text``.

    Raises:
        InputError: a value that is not allowed, a domain without a file, a file without the column.
    """
    names = arrange(known_domains(domains), order, seed)
    size = whole(context, "stream.context", 1)
    vocab_size = check_tokenizer(tokenizer)
    texts = []
    for name in names:
        train, test = read_domain(name, column)
        train = _first(train, train_bytes, f"{name}, train", "stream.train_bytes")
        texts.append((train, _first(test, test_bytes, f"{name}, validation", "stream.test_bytes")))
    tokens = tokenizer_of(vocab_size, [texts[0][0].decode("utf-8", "ignore")])
    experiences = []
    for index, (name, both) in enumerate(zip(names, texts, strict=True)):
        train_windows, test_windows = (windows(tokens.encode(text), size) for text in both)
        experiences.append(Experience(index, name, train_windows, test_windows))
    whole_stream = Stream(
        name="text_domains",
        kind="language",
        scenario="domain",
        experiences=tuple(experiences),
        num_classes=tokens.num_tokens,
        input_shape=(size,),
        vocabulary=tokens.vocabulary,
        held_out=held_out_texts(held_out, tokens, size),
    )
    return finish(whole_stream, tune_on_first, cut, data_seed, shape)


def known_domains(domains: Sequence[str]) -> list[str]:
    """The domains as a list of different names of text files that exist."""
    is_list = isinstance(domains, Sequence) and not isinstance(domains, str | bytes)
    names = list(domains) if is_list else []
    right = names and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    if not right:
        raise InputError(
            got=f"domains {names or domains!r}",
            allowed=f"a list of different names of: {', '.join(available())}",
            key="stream.domains",
        )
    for name in names:
        find(f"{name}.parquet", "stream.domains")
    return names


def read_domain(name: str, column: str) -> tuple[bytes, bytes]:
    """The training and the validation text of a domain."""
    path = find(f"{name}.parquet", "stream.domains")
    table = read_parquet(path, [("split", "stream.domains"), (column, "stream.column")])
    unknown = set(table["split"]) - {"train", "validation"}
    if unknown:
        raise InputError(
            got=f"{path} with splits {sorted(set(table['split']))}",
            allowed="train and validation",
            key="stream.domains",
        )
    train, test = (
        "".join(text for text, split in zip(table[column], table["split"], strict=True) if split == wanted)
        for wanted in ("train", "validation")
    )
    return train.encode(), test.encode()


def _first(text: bytes, limit: int | None, what: str, key: str) -> bytes:
    """The first ``limit`` bytes, all for None."""
    if len(text) < 2:
        raise InputError(
            got=f"{len(text)} bytes of {what}",
            allowed="at least 2: a byte and the next",
            key="stream.domains",
        )
    if limit is None:
        return text
    return text[: whole(limit, key, 2, len(text), f"the bytes of {what}; or null for all")]
