"""Intents: what does a user want? Published sets of short questions, one domain at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import TensorDataset

from cl_moe.errors import InputError
from cl_moe.stream import Experience, Scenario, Stream
from tasks import cells, hub
from tasks.arrange import arrange, finish, whole
from tasks.labelled import Labelled, by_classes, group_size, known_scenario
from tasks.sources import DATA_VARIABLE, available, find
from tasks.tokens import BytePairs, Bytes, check_tokenizer, padded, tokenizer_of


@dataclass(frozen=True)
class IntentSet:
    """Where a set comes from: a file NAME.parquet (split, text, label_name, maybe domain), or the hub.

    Args:
        origin: where to get it.
        hub: its name on the hub; None if it is not there.
        config: which of its versions.
        label: the hub's column of intents.
    """

    origin: str
    hub: str | None = None
    config: str | None = None
    label: str = "label"


INTENT_SETS = {
    "clinc150": IntentSet("github.com/clinc/oos-eval", "clinc/clinc_oos", "plus", "intent"),
    "banking77": IntentSet("github.com/PolyAI-LDN/task-specific-datasets", "PolyAI/banking77"),
    "hwu64": IntentSet("github.com/xliuhw/NLU-Evaluation-Data"),
    "snips7": IntentSet("github.com/sonos/nlu-benchmark"),
}
OUT_OF_SCOPE = "oos"


class Question(NamedTuple):
    """One example: its text, its intent, the domain of that intent ("" where a set has none)."""

    text: str
    intent: str
    domain: str


def intents(
    dataset: str = "clinc150",
    scenario: str = "class",
    classes_per_experience: int | None = None,
    context: int = 64,
    truncate: bool = True,
    tokenizer: Mapping[str, object] | None = None,
    order: Sequence[str] | None = None,
    seed: int | None = None,
    cut: int = 1,
    tune_on_first: int | None = None,
    shape: Mapping[str, object] | None = None,
    data_seed: int = 0,
) -> Stream:
    """Groups of intents; inputs (n, context) int64, padded with 0, targets (n,) int64.

    CLINC150 (Larson et al. 2019; 150 intents in 10 domains, out-of-scope questions left out), BANKING77
    (Casanueva et al. 2020), HWU64 (Liu et al. 2019; 64 intents in 18 domains), SNIPS (Coucke et al. 2018; 7).
    Training and test data are the sets' own; what they have for validation is not used. An intent is matched
    by its name, and numbered by the place of its name in the alphabet.

    Args:
        dataset: ``clinc150``, ``banking77``, ``hwu64`` or ``snips7``.
        scenario: ``class``: no task label. ``task``: the experience's number is one. ``domain``: a label is
            the place of an intent in its experience, so all experiences need equally many.
        classes_per_experience: null: a domain per experience, where the set has domains; a number: so many
            intents, in the alphabet's order unless ``order`` or ``seed`` say another; a divisor of theirs.
        context: tokens per question.
        truncate: whether longer questions are cut after that; if not, they are refused.
        tokenizer: null: bytes. ``{kind: bpe, vocab_size: 1024}``: trained on the training text of the
            experience that arrives first; takes ``model.vocabulary=1024``.
        order: of the domains, or of the intents: a permutation of their names.
        seed: draws that order; null and no ``order``: the alphabet's.
        cut: how many shorter experiences each is cut into.
        tune_on_first: keep only so many, for choosing hyperparameters; ``num_classes`` stays.
        shape: the shape of time; see ``tasks.shapes.Shape``.
        data_seed: draws what ``cut`` and ``shape`` draw.

    Raises:
        InputError: a value that is not allowed; a set that is neither there nor to be had, with where to get
            it.
    """
    setting, size = known_scenario(scenario), check_tokenizer(tokenizer)
    length = whole(context, "stream.context", 1)
    train, test = (questions(dataset, split) for split in ("train", "test"))
    classes = tuple(sorted({question.intent for question in train}))
    groups = _groups(train, classes, setting, classes_per_experience, order, seed)
    first = set(groups[0][1])
    tokens = tokenizer_of(size, [question.text for question in train if question.intent in first])
    data = Labelled(
        _encoded(train, classes, tokens, length, truncate, dataset),
        _encoded(test, classes, tokens, length, truncate, dataset),
        classes,
    )
    numbers = [[classes.index(name) for name in group] for _, group in groups]
    experiences = by_classes(data, numbers, setting, [name for name, _ in groups])
    return finish(_stream(experiences, setting, data, tokens), tune_on_first, cut, data_seed, shape)


def questions(dataset: str, split: str) -> list[Question]:
    """One split of a set, without questions out of scope.

    Raises:
        InputError: no such set, or no file and no hub; the message says where to get it.
    """
    if dataset not in INTENT_SETS:
        raise InputError(got=f"{dataset!r}", allowed=", ".join(INTENT_SETS), key="stream.dataset")
    wanted, name = INTENT_SETS[dataset], f"{dataset}.parquet"
    columns = "columns split (train, test), text, label_name"
    local = f"the file {name} ({columns}; from {wanted.origin}) in the folder that {DATA_VARIABLE} names"
    if dataset in available():
        rows = _rows(hub.from_files([find(name, "stream.dataset")], "stream.dataset"), name, "label_name")
        splits = cells.texts_of(rows.table, "split", name, "stream.dataset")
        found = [question for question, part in zip(rows.questions, splits, strict=True) if part == split]
    elif wanted.hub is None:
        raise InputError(got=f"no file {name}; the hub does not have it", allowed=local, key="stream.dataset")
    else:
        found = _rows(
            hub.from_hub(wanted.hub, wanted.config, local, "stream.dataset")[split], wanted.hub, wanted.label
        ).questions
        found = _with_domains(found, dataset)
    return [question for question in found if question.intent != OUT_OF_SCOPE]


class _Rows(NamedTuple):
    table: Any
    questions: list[Question]


def _rows(table: Any, what: str, label: str) -> _Rows:
    key = "stream.dataset"
    texts, names = cells.texts_of(table, "text", what, key), cells.texts_of(table, label, what, key)
    has_domains = "domain" in table.features
    domains = cells.texts_of(table, "domain", what, key) if has_domains else [""] * len(texts)
    return _Rows(table, [Question(*row) for row in zip(texts, names, domains, strict=True)])


def _with_domains(found: list[Question], dataset: str) -> list[Question]:
    """The domains that the hub's copy has not, by the intents' names."""
    name = f"{dataset}_domains"
    if name not in available(".csv"):
        return found
    table = hub.from_files([find(f"{name}.csv", "stream.dataset")], "stream.dataset")
    domain_of = dict(zip(table["label_name"][:], table["domain"][:], strict=True))
    return [question._replace(domain=domain_of.get(question.intent, "")) for question in found]


def _groups(
    train: Sequence[Question],
    classes: Sequence[str],
    scenario: Scenario,
    per: int | None,
    order: Sequence[str] | None,
    seed: int | None,
) -> list[tuple[str, list[str]]]:
    """Names of the experiences in order of arrival, and the intents of each."""
    if per is not None:
        size = group_size(per, len(classes), scenario, "intents")
        names = arrange(classes, order, seed)
        groups = [names[start : start + size] for start in range(0, len(names), size)]
        return [(f"{group[0]} .. {group[-1]}" if size > 1 else group[0], group) for group in groups]
    domain_of = {question.intent: question.domain for question in train}
    domains = sorted(set(domain_of.values()))
    if "" in domains:
        raise InputError(
            got="null for a set without domains",
            allowed="so many intents per experience",
            key="stream.classes_per_experience",
        )
    return [
        (domain, [name for name in classes if domain_of[name] == domain])
        for domain in arrange(domains, order, seed)
    ]


def _encoded(
    rows: Sequence[Question],
    classes: Sequence[str],
    tokens: Bytes | BytePairs,
    context: int,
    truncate: bool,
    what: str,
) -> TensorDataset:
    inputs_nS = padded([row.text for row in rows], tokens, context, truncate, what)
    targets_n = cells.numbers_of([row.intent for row in rows], classes, what, "stream.dataset")
    return TensorDataset(inputs_nS, targets_n)


def _stream(
    experiences: tuple[Experience, ...], scenario: Scenario, data: Labelled, tokens: Bytes | BytePairs
) -> Stream:
    domain = scenario == "domain"
    return Stream(
        name="intents",
        kind="classification",
        scenario=scenario,
        experiences=experiences,
        num_classes=len(experiences[0].classes) if domain else len(data.classes),
        input_shape=data.input_shape,
        vocabulary=tokens.vocabulary,
    )
