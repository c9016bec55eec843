"""What strategies refuse: streams, memories and company that they cannot serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cl_moe.errors import InputError
from cl_moe.strategies.base import Setting, Strategy
from cl_moe.stream import Stream


def only_one(strategies: Mapping[str, Strategy], hook: str, why: str) -> Strategy | None:
    """The strategy that has a hook of which a run may have one, if any has.

    Args:
        strategies: of the run, by name.
        hook: its name.
        why: of two of them, what they cannot both do.

    Raises:
        InputError: two have it.
    """
    having = [name for name, s in strategies.items() if getattr(type(s), hook) is not getattr(Strategy, hook)]
    if len(having) > 1:
        raise _refused(strategies, f"one of {', '.join(having)}: {why}")
    return strategies[having[0]] if having else None


def check_rows(rows: str, strategies: Mapping[str, Strategy]) -> None:
    """Refuse to let tables learn by rows where a strategy has to see the gradient of all of them.

    Args:
        rows: as asked of the optimizer.
        strategies: of the run, by name.

    Raises:
        InputError: names the strategy.
    """
    for name, one in strategies.items():
        if rows == "row" and not one.takes_rows and type(one).gradients is not Strategy.gradients:
            raise InputError(
                got=f"optimizer.rows=row with strategy={name}, which works on whole gradients",
                allowed="optimizer.rows=auto or dense",
                key="optimizer.rows (or strategy)",
            )


def check_new_classes(name: str, stream: Stream) -> None:
    """Refuse a strategy on a stream of which new experiences bring no new classes.

    Args:
        name: of the strategy.
        stream: as evaluated.

    Raises:
        InputError: it is of language or regression, or domain-incremental.
    """
    classless = stream.kind != "classification"
    if classless or stream.scenario == "domain":
        what = f"a {stream.kind} stream" if classless else "stream.scenario=domain"
        raise InputError(
            got=f"strategy={name} with {what} ({stream.name})",
            allowed="a stream of which new experiences bring new classes: scenario class or task",
            key="strategy (or stream)",
        )


def check_probabilities(name: str, stream: Stream) -> None:
    """Refuse a strategy that asks for probabilities of answers where answers are numbers.

    Args:
        name: of the strategy.
        stream: as evaluated.

    Raises:
        InputError: it is of regression.
    """
    if stream.kind == "regression":
        raise InputError(
            got=f"strategy={name} with a regression stream ({stream.name}): its answers are no probabilities",
            allowed="naive, joint, cumulative, replay, der, gem, agem, si, mas; or a stream of another kind",
            key="strategy (or stream)",
        )


def check_together(strategies: Mapping[str, Strategy], setting: Setting, rows: str) -> None:
    """Refuse what one of the strategies cannot serve, or of which one would undo another, or do nothing.

    Args:
        strategies: of the run, by name.
        setting: what each of them is asked to look at.
        rows: as asked of the optimizer.

    Raises:
        InputError: names the strategies.
    """
    for strategy in strategies.values():
        strategy.check(setting)
    check_rows(rows, strategies)
    replacing = [name for name, strategy in strategies.items() if strategy.replaces_task_loss]
    if len(replacing) > 1:
        raise _refused(
            strategies, f"one of {', '.join(replacing)}: each puts its own in the task loss's place"
        )
    idle = [name for name, strategy in strategies.items() if strategy.needs_past and "joint" in strategies]
    if idle:
        raise _refused(strategies, f"joint without {', '.join(idle)}: it leaves no past to look back to")


def check_beside(name: str, setting: Setting, others: Sequence[str], why: str) -> None:
    """Refuse company that a strategy cannot have.

    Args:
        name: of the strategy.
        setting: with the names of all.
        others: names of those that it does not go with.
        why: what would happen, after "which".

    Raises:
        InputError: names both.
    """
    found = [other for other in setting.names if other in others]
    if found:
        raise InputError(
            got=f"strategy={name} beside {', '.join(found)}, which {why}",
            allowed=f"{name} without {', '.join(found)}",
            key="strategy",
        )


def check_room(name: str, memory_size: int, stream: Stream) -> None:
    """Refuse a memory that has no place for an example of each class.

    Args:
        name: of the strategy.
        memory_size: examples kept.
        stream: as evaluated.

    Raises:
        InputError: it has more classes.
    """
    if memory_size < stream.num_classes:
        raise InputError(
            got=f"strategy={name} with a memory of {memory_size} for {stream.num_classes} classes",
            allowed=f"at least {stream.num_classes}, one example for each",
            key=f"strategy.{name}.memory_size",
        )


def _refused(strategies: Mapping[str, Strategy], allowed: str) -> InputError:
    return InputError(got=f"strategy=[{','.join(strategies)}]", allowed=allowed, key="strategy")
